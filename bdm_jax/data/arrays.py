"""Bare array_record files whose records are tf.train.Example protocol buffers, read without TensorFlow."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from bdm_jax.data.source import make_record
from bdm_jax.errors import BadRecord, UserError

_PICTURES = ("image", "jpg", "jpeg", "png", "webp", "image/encoded", "image_bytes")
_MOMENTS, _SHAPE = "moments", "_shape"
_LISTS = ("captions", "zh_keywords", "en_keywords")  # also where there is one


class ArrayRecordSource:
    """The records of array_record files, in the files' order.

    The picture is the bytes feature `image` (or jpg, png, webp, image/encoded); bytes X for which there is X_shape are
    an array of float16; other bytes are text. Files written with group_size:1 are read record by record.

    Args:
        paths: the files.
        counts: how many of each file's first records count, where that is known: no file is opened then.
        fingerprint: what the records are told apart by; made of the files' names by default.

    Raises:
        UserError: a file that is no array_record file.
    """

    def __init__(self, paths: Sequence[str], counts: Iterable[int] | None = None, fingerprint: str | None = None):
        self._paths, self._ends = list(paths), None
        ranges = self._paths
        if counts is not None:
            counts = list(counts)
            self._ends = np.cumsum(counts)
            ranges = [f"{path}[0:{count}]" for path, count in zip(self._paths, counts, strict=True)]
        try:
            self._data = ArrayRecordDataSource(ranges)
        except Exception as error:  # the reader tells everything by RuntimeError
            raise UserError(f"{', '.join(self._paths[:3])}: cannot be read as array_record ({error})") from error
        told = "\n".join([f"{len(self)}", *(os.path.basename(path) for path in self._paths)])
        self.fingerprint = fingerprint or hashlib.sha256(told.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self._name(index)
        try:
            example = tf_example_pb2.Example.FromString(self._data[index])
        except (RuntimeError, DecodeError) as error:  # array_record keeps a hash of every chunk
            raise BadRecord(name, "damaged record", f"it cannot be read ({error})") from error
        return from_example(name, example)

    def _name(self, index: int) -> str:
        if self._ends is None:
            return f"record {index}"
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{os.path.basename(self._paths[file])} record {index - (int(self._ends[file - 1]) if file else 0)}"

    def __repr__(self) -> str:
        return f"ArrayRecordSource({os.path.dirname(self._paths[0])}, {len(self._paths)} files, {len(self)} records)"


def from_example(name: str, example: tf_example_pb2.Example) -> dict[str, Any]:
    """A tf.train.Example -> a record; its own `key` goes before `name`. Raises BadRecord."""
    values: dict[str, Any] = {}
    for feature, content in example.features.feature.items():
        kind = content.WhichOneof("kind")
        items = list(getattr(content, kind).value) if kind else []
        if feature in _PICTURES and kind == "bytes_list" and len(items) == 1:
            values["image"] = items[0]
        elif f"{feature}{_SHAPE}" in example.features.feature:
            shape = example.features.feature[f"{feature}{_SHAPE}"].int64_list.value
            values[feature] = _array(name, feature, items, list(shape))
        elif feature.endswith(_SHAPE):
            continue
        else:
            plain = [_text(name, item) if isinstance(item, bytes) else item for item in items]
            values[feature] = plain if len(plain) != 1 or feature in _LISTS else plain[0]
    if _MOMENTS not in values and not isinstance(values.get("image"), bytes):
        raise BadRecord(name, "no picture", f"no picture among {', '.join(sorted(values))}")
    return make_record(str(values.get("key", name)), values)


def to_example(record: dict[str, Any]) -> bytes:
    """A record -> a serialised tf.train.Example, the same bytes for the same record. What is no number and no text
    (nested metadata, null) is left out.
    """
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name, value in record.items():
        if isinstance(value, np.ndarray):
            feature[name].bytes_list.value.append(value.astype("<f2").tobytes())
            feature[f"{name}_shape"].int64_list.value.extend(value.shape)
            continue
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str | bytes) for item in items):
            coded = [item.encode() if isinstance(item, str) else item for item in items]
            feature[name].bytes_list.value.extend(coded)
        elif all(isinstance(item, int) and abs(item) < 2**63 for item in items):
            feature[name].int64_list.value.extend(map(int, items))
        elif all(isinstance(item, int | float) for item in items):
            feature[name].float_list.value.extend(items)
    return example.SerializeToString(deterministic=True)


def _array(name: str, feature: str, items: list, shape: list[int]) -> np.ndarray:
    if len(items) != 1 or not isinstance(items[0], bytes) or len(items[0]) != 2 * math.prod(shape):
        raise BadRecord(name, "damaged record", f"{feature} is not of the shape that is noted")
    return np.frombuffer(items[0], "<f2").reshape(shape)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(name, "broken metadata", f"a text is not UTF-8 ({error})") from error
