"""Images through the autoencoder once, before training: `python -m bdm_jax.latents.precompute SOURCE OUT --vae DIR`.

Run by any number of processes at once (`--part 3/16`), on one folder; run again after an interruption, with another
number of processes too, it resumes with the chunks that are missing. Shards: see `bdm_jax.data.moments`.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdm_jax import command_line
from bdm_jax.data.moments import Chunk, begin, finished
from bdm_jax.data.records import open_source
from bdm_jax.data.select import Filters, Size, make_buckets, nearest
from bdm_jax.data.source import Skips, Source
from bdm_jax.data.threads import map_ahead
from bdm_jax.errors import BadRecord, Filtered, UserError
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents.moments import digest, encode
from bdm_jax.models.config import RobertaConfig, VAEConfig
from bdm_jax.models.functional import bind, cast
from bdm_jax.runtime.locks import held
from bdm_jax.systems.components import Component, default_dtype, load_component
from bdm_jax.systems.fetch import local
from bdm_jax.text.tokenizer import Tokenizer

_THREADS = 8


class Text(NamedTuple):
    """The tower that captions are encoded with."""

    tokenizer: Tokenizer
    tower: Component


def precompute(
    source: Source,
    out: Path,
    vae: Component,
    *,
    buckets: Sequence[Size] = ((512, 512),),
    filters: Filters | None = None,
    text: Text | None = None,
    part: tuple[int, int] = (0, 1),
    chunk: int = 16384,
    batch_size: int = 32,
    dtype: str | None = None,
    skips: Skips | None = None,
) -> dict[str, Any]:
    """Write the moments of every record that passes, of this part's chunks; returns the counts of all finished ones.

    An image is resized to cover the nearest bucket and cropped, never distorted. Float16, on this process's devices.

    Args:
        source: records with images; with a `fingerprint`.
        out: folder of the shards.
        vae: its config and weights, fp32, as a run loads them.
        buckets: (height, width) in multiples of the autoencoder's factor.
        text: also encode the captions, each cut to one window.
        part: (i, n): chunks i, i + n, i + 2 n, ... are of this process.
        chunk: records between two notes on disk; what an interruption costs at most.
        batch_size: images through the networks at a time; made a multiple of the devices.
        dtype: what is computed in; by default float32 on a CPU, else bfloat16.
        skips: counts the faults of this process; by default up to 1%.

    Raises:
        UserError: the folder was started with other settings, a bucket does not fit, too many faults, another process
            writes a chunk of this part.
    """
    filters, skips = filters or Filters(), Skips() if skips is None else skips
    if not 0 <= part[0] < part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: count from 0 to {part[1] - 1}")
    if wrong := [size for size in buckets if size[0] % vae.config.factor or size[1] % vae.config.factor]:
        raise UserError(f"bucket {wrong[0]}: its sides are no multiples of the autoencoder's {vae.config.factor}")
    chunks, dtype = -(-len(source) // chunk), dtype or default_dtype()
    settings = {
        "vae": digest(vae),
        "compute": dtype,
        "source": source.fingerprint,
        "records": len(source),
        "chunk": chunk,
        "chunks": chunks,
        "buckets": [list(size) for size in buckets],
        "filters": filters.identity(),
        "text": None if text is None else digest(text.tower),
    }
    begin(out, settings)
    encoder = _Encoder(vae, text, batch_size, dtype)
    done = finished(out)
    for number in range(part[0], chunks, part[1]):
        if number not in done:
            span = range(number * chunk, min((number + 1) * chunk, len(source)))
            with held(out / f".chunk-{number:06d}.lock", f"writing chunk {number}", "give each process its own --part"):
                _one_chunk(Chunk(out, number), source, span, tuple(buckets), filters, encoder, skips)
    index = {cause: len(names) for cause, names in getattr(source, "left_out", {}).items()}
    return {**_counts(out), "left_out_of_index": index}


class _Encoder:
    """Networks on all devices of this process; the batch is split over them."""

    def __init__(self, vae: Component, text: Text | None, batch_size: int, dtype: str):
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self._split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._vae = Component(vae.config, jax.device_put(cast(vae.params, dtype), whole))
        self.text = text
        self._tower = text and Component(text.tower.config, jax.device_put(cast(text.tower.params, dtype), whole))

    def moments(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """At most a batch of (H,W,3) uint8 -> (B,h,w,2C) float16."""
        return self._run(encode, self._vae, images).astype(np.float16)

    def states(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Captions -> their states (S,D) float16, and how many were cut."""
        tokenizer, states = self.text.tokenizer, []
        contents, room = tokenizer.content(list(texts)), tokenizer.format.room
        ids = [tokenizer.format.fill([content[:room]], 1)[0] for content in contents]
        for start in range(0, len(ids), self.batch_size):
            states += list(self._run(_states, self._tower, ids[start : start + self.batch_size]))
        return states, sum(len(content) > room for content in contents)

    def _run(self, function, network: Component, rows: Sequence[np.ndarray]) -> np.ndarray:
        filled = np.stack([*rows, *rows[-1:] * (self.batch_size - len(rows))])
        values = function(network.config, network.params, jax.device_put(filled, self._split))
        return np.asarray(values)[: len(rows)]


@partial(jax.jit, static_argnums=0)
def _states(config: RobertaConfig, params, ids: jax.Array) -> jax.Array:
    return bind(config, params)(ids).astype(jnp.float16)


def _one_chunk(chunk, source, span, buckets, filters, encoder, skips) -> None:
    left_out: Counter[str] = Counter()
    waiting: dict[Size, list[tuple[dict, np.ndarray]]] = defaultdict(list)
    cut = 0

    def flush(bucket: Size) -> int:
        rows, waiting[bucket] = waiting[bucket], []
        return _write(chunk, bucket, rows, encoder, left_out, skips) if rows else 0

    for found in map_ahead(partial(_read, source, buckets, filters), span, _THREADS):
        if isinstance(found, BadRecord):
            left_out[found.cause] += 1
            if not isinstance(found, Filtered):
                skips.bad(found)
            continue
        bucket, record, image = found
        waiting[bucket].append((record, image))
        if len(waiting[bucket]) == encoder.batch_size:
            cut += flush(bucket)
    cut += sum(flush(bucket) for bucket in list(waiting))
    chunk.finish({"records": len(span), "left_out": left_out, "captions_cut": cut})


def _write(chunk, bucket, rows, encoder, left_out, skips) -> int:
    """Encode and write one batch; returns how many captions were cut."""
    moments = encoder.moments([image for _, image in rows])
    texts = [text for record, _ in rows for text in record.get("captions", ())]
    states, cut = encoder.states(texts) if encoder.text and texts else ([], 0)
    rest: Iterator[np.ndarray] = iter(states)
    for (record, _), values in zip(rows, moments, strict=True):
        own = [next(rest) for _ in record.get("captions", ())] if states else []
        if not np.isfinite(values).all():
            error = BadRecord(record["key"], "latents not finite", "its latents are not finite")
            left_out[error.cause] += 1
            skips.bad(error)
            continue
        skips.good()
        chunk.write({**record, "moments": values, **({"states": np.stack(own)} if own else {})}, bucket)
    return cut


def _read(source, buckets, filters, index) -> tuple[Size, dict, np.ndarray] | BadRecord:
    try:
        record = filters.apply(source[index])
        bucket = buckets[nearest((record["height"], record["width"]), buckets)]
        image = decode_image(record.pop("image"), name=record["key"], strict=True)
    except BadRecord as error:
        return error
    return bucket, record, resize_to_cover(image, bucket)


def _counts(out: Path) -> dict[str, Any]:
    notes = finished(out).values()
    left_out: Counter[str] = sum((Counter(note["left_out"]) for note in notes), Counter())
    written = sum(file["records"] for note in notes for file in note["files"].values())
    cut = sum(note["captions_cut"] for note in notes)
    return {"finished_chunks": len(notes), "written": written, "left_out": dict(left_out), "captions_cut": cut}


@dataclass(frozen=True)
class PrecomputeArgs:
    """Precompute the latents, and on request the text states, of a set."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """records: a prepared set, .tar or .array_record files, an image folder"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """folder of the shards"""
    vae: command_line.ModelPath
    """folder or file of the autoencoder"""
    text_encoder: command_line.OptionalModelPath = None
    """also encode captions: folder of the text encoder"""
    tokenizer: command_line.OptionalModelPath = None
    """folder of the text encoder's tokenizer"""
    split: str = "train"
    """of the source"""
    size: int = 512
    """side of the square image in pixels"""
    buckets: bool = False
    """sizes of about as many pixels, by the images' aspect ratios"""
    part: Annotated[str, tyro.conf.arg(metavar="I/N")] = "0/1"
    """the part of this process: 3/16 is the fourth of sixteen"""
    chunk: int = 16384
    """records per chunk"""
    batch_size: int = 32
    """images at a time"""
    rate: float = 0.01
    """share of faulty records that is tolerated"""
    cache: Path | None = None
    """folder for the index of tar shards"""
    filters: Filters = Filters()


def main(args: Sequence[str] | None = None) -> int:
    """Precompute this process's part and print the counts."""

    def command() -> None:
        counts = _precompute(command_line.parse(PrecomputeArgs, args, prog="python -m bdm_jax.latents.precompute"))
        print(json.dumps(counts, ensure_ascii=False))

    return command_line.run(command)


def _precompute(asked: PrecomputeArgs) -> dict[str, Any]:
    index, _, count = asked.part.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UserError(f"--part {asked.part}: write 3/16 for the fourth of sixteen processes")
    if (asked.text_encoder is None) != (asked.tokenizer is None):
        raise UserError("--text-encoder and --tokenizer go together")
    if asked.chunk < 1 or asked.batch_size < 1:
        raise UserError("--chunk and --batch-size must be at least 1")
    vae = load_component(asked.vae, "float32", kind="vae")
    if not isinstance(vae.config, VAEConfig):
        raise UserError(f"{asked.vae}: a tiny autoencoder has no moments; name an AutoencoderKL")
    text = None
    if asked.text_encoder is not None:
        tokenizer = Tokenizer.from_pretrained(local(asked.tokenizer, "tokenizer"))
        text = Text(tokenizer, load_component(asked.text_encoder, "float32"))
    return precompute(
        open_source(asked.source, asked.split, asked.cache),
        asked.out,
        vae,
        buckets=make_buckets(asked.size) if asked.buckets else ((asked.size, asked.size),),
        filters=asked.filters,
        text=text,
        part=(int(index), int(count)),
        chunk=asked.chunk,
        batch_size=asked.batch_size,
        skips=Skips(asked.rate, asked.out / f"left_out-{index}-of-{count}.jsonl"),
    )


if __name__ == "__main__":
    sys.exit(main())
