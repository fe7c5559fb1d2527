"""Open any source of records by its path: prepared TFDS sets, array_record files, tar shards, image folders."""

import itertools
import os
import posixpath
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import tensorflow_datasets as tfds
from fsspec import AbstractFileSystem

from bdm_jax.data.arrays import ArrayRecordSource
from bdm_jax.data.contents import digest_files
from bdm_jax.data.folders import METADATA, FolderSource
from bdm_jax.data.graded import GRADES, SUMMARY, GradedSource
from bdm_jax.data.lettering import RULES, SyntheticText, read_rules
from bdm_jax.data.photos import PhotoSource
from bdm_jax.data.source import Source, make_record, parse_json
from bdm_jax.data.tars import TarSource
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import SUFFIXES
from bdm_jax.paths import EMOJI, no_such

_TFDS = "dataset_info.json"
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


class RecordSource:
    """A TFDS split whose images stay encoded: images are bytes, text is `str`, sequences of text are `list[str]`.

    If the set has captions, its records are those of `Source`; without (as in the bundled set) features are kept as is.
    """

    def __init__(self, folder: str, split: str, data: Sequence, image_keys: tuple[str, ...], fingerprint: str):
        self.folder, self.split, self.fingerprint = folder, split, fingerprint
        self._data, self._image_keys = data, image_keys

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        name = f"{self.split}/{index}"
        try:
            values = self._data[index]
        except RuntimeError as error:  # array_record raises it if the hash of a chunk is wrong
            raise BadRecord(name, "damaged record", f"it cannot be read ({error})") from error
        record = {key: value if key in self._image_keys else _plain(value) for key, value in values.items()}
        if len(self._image_keys) == 1 and "image" not in record:
            record["image"] = record.pop(self._image_keys[0])
        name = record.get("key", name)
        result = make_record(name, record)
        return result if result["captions"] else {**record, "key": name}

    def contents(self) -> str:
        """See `Source`."""
        fs, root = _file_system(self.folder)
        names = [name for name in fs.ls(root, detail=False) if f"-{self.split}." in posixpath.basename(name)]
        return digest_files(fs, sorted(names))

    def __repr__(self) -> str:
        return f"RecordSource({self.folder}, {self.split}, {len(self)} records)"


def open_source(path: str | Path, split: str = "train", cache: Path | None = None) -> Source:
    """Open a source of records, of any supported format and size.

    Args:
        path: a prepared TFDS folder (with `dataset_info.json`); a folder, a file or a pattern (`*`, `{0000..0127}`) of
            .tar or .array_record files; a folder with `metadata.jsonl` or `metadata.csv`, with rules for pictures of
            text (`lettering.py`) or with grades of another set's records (`graded.py`); a folder of images, or of
            folders of images (`photos.py`). On a disk or in a bucket: `gs://` needs the package gcsfs, `s3://` needs
            s3fs. array_record files, including TFDS's, are read by their own library, from disks and `gs://`.
        split: split of a TFDS set, or subfolder to try if the folder itself holds none of these.
        cache: folder for the index of tar shards; see `TarSource`.

    Raises:
        UserError: the path does not exist, its format is not known, or there is no such split.
    """
    fs, root = _file_system(os.fspath(path))
    if (names := _files(fs, root)) is not None:
        return _open_files(fs, root, names, cache)
    if not fs.isdir(root):
        if root == os.fspath(EMOJI):
            raise no_such(EMOJI, "data set")
        _check_asked(fs, root, path)
        raise UserError(f"{path}: no such file or folder (for a prepared set, give the folder that contains {_TFDS})")
    if fs.isfile(posixpath.join(root, _TFDS)):
        return _open_prepared(os.fspath(path), split)
    if fs.isfile(rules := posixpath.join(root, RULES)):
        return SyntheticText(read_rules(fs.cat_file(rules), rules))
    if fs.isfile(summary := posixpath.join(root, SUMMARY)):
        told = parse_json(summary, fs.cat_file(summary))
        if not isinstance(told.get("source"), str):
            raise UserError(f"{summary}: names no source, whose grades these are")
        graded = open_source(told["source"], split, cache)
        return GradedSource(graded, told, fs.cat_file(posixpath.join(root, GRADES)), root)
    if metadata := [name for name in METADATA if fs.isfile(posixpath.join(root, name))]:
        if len(metadata) > 1:
            warnings.warn(f"{path} holds {' and '.join(metadata)}: the first is read", stacklevel=2)
        return FolderSource(fs, root, metadata[0])
    if split and fs.isdir(inner := posixpath.join(root, split)):
        return open_source(fs.unstrip_protocol(inner), "", cache)
    photos = PhotoSource(fs, root)
    if len(photos):
        return photos
    kinds = f"{_TFDS} (a prepared set), {' or '.join(METADATA)}, .tar or .array_record files, or images"
    raise UserError(f"{path} holds no records: expected {kinds} ({', '.join(SUFFIXES)}); found {photos.found}")


def list_files(path: str | Path) -> list[str]:
    """The .tar or .array_record files that a path refers to, each a path for `open_source`; empty for other formats."""
    fs, root = _file_system(os.fspath(path))
    return [fs.unstrip_protocol(name) for name in _files(fs, root) or ()]


def _files(fs: AbstractFileSystem, root: str) -> list[str] | None:
    """The files of a file name, a pattern or a plain folder of shards; None for any other format."""
    if re.search(r"[*?\[{]", root) or fs.isfile(root):
        return _expand(fs, root)
    if not fs.isdir(root) or any(fs.isfile(posixpath.join(root, name)) for name in (_TFDS, RULES, SUMMARY, *METADATA)):
        return None
    return sorted(name for name in fs.ls(root, detail=False) if _kind(name)) or None


def _open_files(fs: AbstractFileSystem, root: str, names: Sequence[str], cache: Path | None) -> Source:
    kinds = sorted({_kind(name) or "other" for name in names})
    if kinds == ["other"] and len(names) == 1 and names[0].lower().endswith((*SUFFIXES, *METADATA)):
        raise UserError(f"{root} is a file of a set: give its folder, {posixpath.dirname(root)}")
    if not names or len(kinds) > 1 or kinds == ["other"]:
        found = f"found {' and '.join(kinds)} files" if names else "no files match"
        raise UserError(f"{root}: {found}; give .tar or .array_record files, one kind at a time")
    if kinds == [".tar"]:
        return TarSource(fs, names, cache)
    local = "file" in np.atleast_1d(fs.protocol)
    return ArrayRecordSource([name if local else fs.unstrip_protocol(name) for name in names])


def _open_prepared(folder: str, split: str) -> RecordSource:
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
    fingerprint = f"{builder.info.full_name} {split} {len(data)} {builder.info.splits[split].num_bytes}"
    return RecordSource(folder, split, data, images, fingerprint)


def _file_system(path: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(f"{path}: {error} (install it with pip)") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return fs, root.rstrip("/") or "/"


def _check_asked(fs: AbstractFileSystem, root: str, path: str | Path) -> None:
    """Raises UserError where a store could not be asked for what it seems not to have: fsspec says no to both."""
    try:
        fs.info(root)
    except FileNotFoundError:
        return
    except Exception as error:  # what gcsfs, s3fs and others raise shares no class
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be asked for: {said}") from error


def _expand(fs: AbstractFileSystem, pattern: str) -> list[str]:
    """File names of a pattern, sorted; numbers in braces keep their width, as in WebDataset's shard names."""
    ranges = [(int(a), int(b), len(a)) for a, b in _NUMBERS.findall(pattern)]
    frame = _NUMBERS.sub("{}", pattern)
    choices = itertools.product(*([f"{n:0{width}d}" for n in range(a, b + 1)] for a, b, width in ranges))
    patterns = [frame.format(*choice) for choice in choices] if ranges else [pattern]
    if not any(re.search(r"[*?\[]", name) for name in patterns):
        if missing := [name for name in patterns if not fs.isfile(name)]:
            raise UserError(f"{len(missing)} of {len(patterns)} files are missing, the first one: {missing[0]}")
        return patterns
    return sorted({name for pattern in patterns for name in fs.glob(pattern)})


def _kind(name: str) -> str | None:
    file = posixpath.basename(name)
    return ".tar" if file.endswith(".tar") else ".array_record" if ".array_record" in file else None


def _plain(value: Any) -> Any:
    """TFDS's bytes and object arrays -> str, list[str] and Python scalars."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value
