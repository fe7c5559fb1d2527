"""Reading any prepared set: TFDS array_record -> random access records -> safe pixels -> batches through Grain."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from bdm_jax.errors import UserError

MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP")


class Source(Protocol):
    """Random access to records: `len(source)`, `source[i] -> dict`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class RecordSource:
    """A TFDS split whose images stay encoded: text is `str`, sequences of text are `list[str]`, images are bytes."""

    def __init__(self, folder: Path, split: str, data: Sequence, image_keys: tuple[str, ...]):
        self.folder, self.split = folder, split
        self._data, self._image_keys = data, image_keys

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._data[int(index)]
        return {key: value if key in self._image_keys else _plain(value) for key, value in record.items()}

    def __repr__(self) -> str:
        return f"RecordSource({self.folder.name}, {self.split}, {len(self)} records)"


def open_source(folder: str | Path, split: str = "train") -> RecordSource:
    """Open a prepared TFDS folder (the one with `dataset_info.json`), whatever its size.

    Raises:
        UserError: no such folder, not a prepared set in array_record files, or no such split.
    """
    folder = Path(folder)
    if not (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder} is not a prepared data set: dataset_info.json is missing there")
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    features = builder.info.features
    images = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.Image))
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    try:
        data = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(f"{folder} is not array_record: prepare it with file_format='array_record'") from error
    return RecordSource(folder, split, data, images)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, name: str = "image") -> np.ndarray:
    """PNG, JPEG or WebP bytes -> uint8 (H, W, 3); transparent pictures are laid over white.

    Args:
        data: encoded bytes, not trusted.
        max_pixels: refuse larger pictures before a pixel is decoded.
        name: what the error message calls the record.

    Raises:
        UserError: unreadable, truncated, of another format, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise UserError(f"{name}: {image.width} x {image.height} pixels exceed the limit of {max_pixels}")
                return np.array(_over_white(image))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: the image cannot be read ({error})") from error
    except (ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: the image is damaged ({error})") from error


def make_loader(
    source: Source,
    indices: Sequence[int],
    transform: Callable[[dict, np.random.Generator], dict[str, np.ndarray]],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 32,
) -> "Loader":
    """Endless shuffled batches over `indices` of `source`, the same on every machine and after every restart.

    The order is a fresh permutation per epoch, made from `seed`. Batches run across the ends of epochs: all are full.
    Sample number p of the run goes through `transform(record, rng)`, whose generator depends only on (seed, p).
    With several processes, process i gets samples i, i + count, i + 2 count, ... of each global batch.

    Args:
        source: random access records, as from `open_source`.
        indices: the records to use; for English-side training take them from `captions.concepts`.
        transform: record -> dict of arrays (or scalars) of fixed shape.
        batch_size: samples per global batch; a multiple of `process_count`.
        seed: of the order and of the transforms.
        start_step: number of the first batch, as after a restart.
        threads, prefetch: reading threads and decoded samples kept ready; neither changes the result.

    Returns:
        A `Loader`: iterator of dicts of stacked arrays, with `get_state()` and `set_state()`.
    """
    if not len(indices):
        raise UserError("no records to load: the list of indices is empty")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    samples = grain.MapDataset.source(_Subset(source, np.asarray(indices))).seed(seed).shuffle().repeat()
    samples = samples.random_map(transform)[process_index::process_count]
    batches = samples.batch(batch_size // process_count, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return Loader(batches, options, start_step)


class Loader(Iterator):
    """Iterator of batches whose whole state is the number of the next one."""

    def __init__(self, batches: grain.MapDataset, options: grain.ReadOptions, step: int):
        self._batches, self._options = batches, options
        self.set_state({"step": step})

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """What `set_state` needs to go on with the same next batch."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue at batch `state["step"]`, exactly as an uninterrupted run would."""
        self._step = int(state["step"])
        self._iterator = iter(self._batches[self._step :].to_iter_dataset(self._options))


class _Subset:
    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]


def _plain(value: Any) -> Any:
    """TFDS' bytes and object arrays -> str, list[str] and Python scalars."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _over_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
