"""Plain array_record files of tf.train.Example protocol buffers, read and written without TensorFlow."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from bdm_jax.data.contents import digest_files
from bdm_jax.data.source import make_record
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import SUFFIXES

_IMAGES = ("image", *(suffix[1:] for suffix in SUFFIXES), "image/encoded", "image_bytes")
_MOMENTS, _SHAPE = "moments", "_shape"
_LISTS = ("captions", "zh_keywords", "en_keywords")  # lists even when they hold a single item


class ArrayRecordSource:
    """The records of array_record files, in the files' order.

    The image is the bytes feature `image` (or jpg, png and so on, image/encoded). A bytes feature X that comes with a
    feature X_shape is a float16 array; all other bytes are UTF-8 text. Write the files with group_size:1, so that one
    record can be read without its neighbours.

    Args:
        paths: the files.
        counts: number of records to use from the start of each file; with it, no file is opened to count them.
        fingerprint: identifies the records; by default a digest of their number and the files' names.

    Raises:
        UserError: a file is not an array_record file.
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
        except Exception as error:  # the reader raises RuntimeError for everything
            raise UserError(f"{', '.join(self._paths[:3])}: cannot be read as array_record ({error})") from error
        identity = "\n".join([f"{len(self)}", *(os.path.basename(path) for path in self._paths)])
        self.fingerprint = fingerprint or hashlib.sha256(identity.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self._name(index)
        try:
            example = tf_example_pb2.Example.FromString(self._data[index])
        except (RuntimeError, DecodeError) as error:  # array_record checks a hash of every chunk
            raise BadRecord(name, "damaged record", f"it cannot be read ({error})") from error
        return from_example(name, example)

    def contents(self) -> str:
        """See `Source`."""
        fs, _ = fsspec.core.url_to_fs(self._paths[0])
        return digest_files(fs, [fs._strip_protocol(path) for path in self._paths])

    def _name(self, index: int) -> str:
        if self._ends is None:
            return f"record {index}"
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{os.path.basename(self._paths[file])} record {index - (int(self._ends[file - 1]) if file else 0)}"

    def __repr__(self) -> str:
        return f"ArrayRecordSource({os.path.dirname(self._paths[0])}, {len(self._paths)} files, {len(self)} records)"


def from_example(name: str, example: tf_example_pb2.Example) -> dict[str, Any]:
    """A tf.train.Example -> a record; a feature `key` takes precedence over `name`. Raises BadRecord."""
    values: dict[str, Any] = {}
    for feature, content in example.features.feature.items():
        kind = content.WhichOneof("kind")
        items = list(getattr(content, kind).value) if kind else []
        if feature in _IMAGES and kind == "bytes_list" and len(items) == 1:
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
        raise BadRecord(name, "no image", f"no image among the features {', '.join(sorted(values))}")
    return make_record(str(values.get("key", name)), values)


def to_example(record: dict[str, Any]) -> bytes:
    """A record -> a serialised tf.train.Example, the same bytes for the same record.

    Values that are neither numbers nor text (nested metadata, null) are dropped.
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
            encoded = [item.encode() if isinstance(item, str) else item for item in items]
            feature[name].bytes_list.value.extend(encoded)
        elif all(isinstance(item, int) and abs(item) < 2**63 for item in items):
            feature[name].int64_list.value.extend(map(int, items))
        elif all(isinstance(item, int | float) for item in items):
            feature[name].float_list.value.extend(items)
    return example.SerializeToString(deterministic=True)


def _array(name: str, feature: str, items: list, shape: list[int]) -> np.ndarray:
    if len(items) != 1 or not isinstance(items[0], bytes) or len(items[0]) != 2 * math.prod(shape):
        raise BadRecord(name, "damaged record", f"{feature} does not have the shape {shape} given by {feature}{_SHAPE}")
    return np.frombuffer(items[0], "<f2").reshape(shape)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(name, "invalid metadata", f"text is not UTF-8 ({error})") from error
