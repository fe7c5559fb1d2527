"""Shards of precomputed latents: written chunk by chunk, each chunk atomically; read bucket by bucket.

precompute.json                        the settings, including a digest of the autoencoder
chunk-000012-512x768.array_record      the samples of chunk 12 that fall in one bucket
chunk-000012.json                      written when the chunk is complete: its files and counts
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from array_record.python.array_record_module import ArrayRecordWriter

from bdm_jax.data.arrays import ArrayRecordSource, to_example
from bdm_jax.data.contents import digest_files
from bdm_jax.data.loader import MixturePart
from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json

MANIFEST = "precompute.json"
_DONE = re.compile(r"chunk-(\d+)\.json")


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings that the shards are made with, or check that existing shards were made with the same ones.

    Raises:
        UserError: existing shards were made with other settings (the message names both values).
    """
    if not (folder / MANIFEST).is_file():
        write_json(folder / MANIFEST, settings)
    _check(folder, settings)


def is_precomputed(folder: str | Path) -> bool:
    """Whether the folder holds such shards, complete or not."""
    return (Path(folder) / MANIFEST).is_file()


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """Chunk number -> what was recorded when the chunk was completed."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _DONE.fullmatch(path.name))}
    return {number: read_json(path) for number, path in sorted(found.items())}


class Chunk:
    """The files of one chunk while it is written. They become valid with `finish`; leftovers of an earlier attempt are
    overwritten.
    """

    def __init__(self, folder: Path, number: int):
        self._folder, self._stem = folder, f"chunk-{number:06d}"
        self._writers: dict[str, ArrayRecordWriter] = {}
        self._counts: dict[str, int] = {}

    def write(self, record: dict[str, Any], bucket: tuple[int, int]) -> None:
        """Append a record to its bucket's file."""
        name = f"{self._stem}-{bucket[0]}x{bucket[1]}.array_record"
        if name not in self._writers:
            self._writers[name] = ArrayRecordWriter(str(self._folder / f".{name}.tmp"), "group_size:1")
            self._counts[name] = 0
        self._writers[name].write(to_example(record))
        self._counts[name] += 1

    def finish(self, notes: Mapping[str, Any]) -> None:
        """Move the files into place, then write the chunk's record."""
        files = {}
        for name, writer in self._writers.items():
            writer.close()
            temporary, path = self._folder / f".{name}.tmp", self._folder / name
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            files[name] = {"records": self._counts[name], "bytes": path.stat().st_size}
        write_json(self._folder / f"{self._stem}.json", {**notes, "files": files})


def open_moments(folder: str | Path, vae: str | None = None) -> list[MixturePart]:
    """Precomputed latents as parts for `mix_loader`, one per bucket; nothing is read yet.

    A record holds `moments` (h,w,2C) float16, the mean and log-variance of the unscaled latents; `states`
    (captions,S,D) if text was encoded; and the metadata of its source.

    Args:
        folder: written by `python -m bdm_jax.latents.precompute`, on a disk.
        vae: digest of the run's autoencoder (`bdm_jax.latents.moments.digest`).

    Raises:
        UserError: not such a folder, made with another autoencoder, incomplete, or a file is missing or truncated.
    """
    folder = Path(folder)
    if not is_precomputed(folder):
        raise UserError(f"{folder} holds no precomputed latents: {MANIFEST} is missing")
    manifest = read_json(folder / MANIFEST)
    if vae is not None:
        _check(folder, {"vae": vae})
    done = finished(folder)
    if len(done) < manifest["chunks"]:
        raise UserError(
            f"{folder}: {len(done)} of {manifest['chunks']} chunks are complete: run the same precompute command again"
        )
    files: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for notes in done.values():
        for name, recorded in notes["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != recorded["bytes"]:
                raise UserError(f"{path}: missing or truncated: remove its chunk's .json and precompute it again")
            height, width = map(int, name.removesuffix(".array_record").rpartition("-")[2].split("x"))
            files[height, width][str(path)] = recorded["records"]
    fingerprint = hashlib.sha256(json.dumps([manifest, done], sort_keys=True).encode()).hexdigest()[:16]
    parts = []
    for bucket, counts in sorted(files.items()):
        source = ArrayRecordSource(list(counts), counts.values(), fingerprint)
        parts.append(MixturePart(source, range(len(source)), bucket=bucket))
    return parts


def moments_contents(folder: str | Path) -> str:
    """A digest of what lies in the shards (see `contents.digest_files`)."""
    names = sorted(name for notes in finished(Path(folder)).values() for name in notes["files"])
    return digest_files(fsspec.filesystem("file"), [str(Path(folder) / name) for name in names])


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    existing = read_json(folder / MANIFEST)
    for name, value in settings.items():
        if existing.get(name) != value:
            raise UserError(
                f"{folder} was precomputed with {name} {existing.get(name)}, this run has {value}: choose another "
                "folder, or the same settings"
            )
