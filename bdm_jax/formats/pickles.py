"""Reader of PyTorch checkpoints (.bin, .ckpt, .pt, .pth) that needs no torch and runs nothing that a file names.

torch.save writes a zip archive (`formats.archives`): `ROOT/data.pkl`, a pickle that names every storage by a persistent
id, and `ROOT/data/KEY`, the bytes of one storage each. Before 1.6 it wrote a chain: pickles of a magic number, a
version, a description of the machine, the value, the storages' keys; then the storages in that order, each a count of 8
bytes and its bytes. A pickle is a program, and a file from elsewhere may hold any. So none is unpickled: `pickletools`
splits it into opcodes, a small interpreter knows those that torch.save writes, and the few names in `_CALLS` stand for
functions of this file. All others are refused; none is imported.
"""

import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.formats.archives import Refused, members
from bdm_jax.formats.files import Tensors, shown

# Under these names trainers keep the weights: LDM and Lightning, plain loops, DeepSpeed, BasicSR (averaged ones first).
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")

_MAX_PICKLE = 64 * 2**20
_MAX_OPCODES = 2_000_000  # a tensor takes about 30: some 60,000 tensors, read in seconds
_MAX_MEMBERS = 200_000
_MAX_LEVELS = 100
_MAX_KEY = 2**24  # larger integers can be chosen so that a dict's keys all collide
_MAX_UNFOLDED = 16  # times the file's size: what a tree may take once all that it shares is copied

_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a chain's first pickle ends
_MAX_PREFIX = 4096  # bytes of the pickles before a chain's value

_KINDS = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16}
_KINDS |= {"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_}
_DTYPES = {f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in _KINDS.items()}
_DTYPES |= {f"torch.{np.dtype(dtype).name}": np.dtype(dtype) for dtype in _KINDS.values()}
_DTYPES |= {f"torch.{dtype.name}": dtype for dtype in map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))}
_DTYPES["torch.storage.UntypedStorage"] = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for something that a checkpoint may mention but that is never made, such as a NumPy scalar."""

    name: str


def is_checkpoint(path: str | Path) -> bool:
    """Whether the file begins as what torch.save or pickle writes, of whatever age. Raises FileError if unreadable.

    A pickle's first byte may well be a safetensors file's too, whose ninth is always that of a JSON object.
    """
    head = _head(path)
    known = head.startswith(b"PK\3\4") or _begins_chain(head)
    return known or (_other_format(head) is not None and head[8:9] != b"{")


def read_checkpoint(path: str | Path) -> Any:
    """What a checkpoint holds: nested dicts, lists and tuples of plain values, NumPy arrays and `Opaque`s.

    Arrays are read-only views of the memory-mapped file, of any strides (bfloat16 through ml_dtypes); a bare storage is
    an array of one axis, a torch dtype a NumPy one. Raises FileError for a file of another format, a damaged one, and
    one that would run code.
    """
    head = _head(path)
    try:
        if not head.startswith(b"PK\3\4") and not _begins_chain(head):
            again = "save it again with torch.save of a recent PyTorch, or as safetensors"
            raise Refused(f"{_other_format(head) or 'not a PyTorch checkpoint'}; {again}")
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        value = _archive(data) if head.startswith(b"PK\3\4") else _chain(data, head.index(_MAGIC) + len(_MAGIC))
        _check_tree(value, data.size)
        return value
    except Refused as error:
        raise FileError(f"{path}: {error}") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise FileError(f"{path}: a damaged checkpoint ({shown(str(error))})") from error


def state_dict(path: str | Path) -> Tensors:
    """The tensors of a checkpoint by name: its own dict, or the one that it keeps under `state_dict`, `model`, ...

    Numbers, texts and None among the tensors are left out. Raises FileError as `read_checkpoint` does, when there are
    no tensors, and for any other value among them.
    """
    value = read_checkpoint(path)
    found = _weights(value)
    if found is None:
        kind = f"dict of {', '.join(map(str, value))}" if isinstance(value, dict) else type(value).__name__
        raise FileError(f"{path}: holds no tensors by name, but a {shown(kind)}")
    tensors = {}
    for name, part in found.items():
        if isinstance(part, np.ndarray) and isinstance(name, str):
            tensors[name] = part
        elif not (part is None or isinstance(part, int | float | str)):
            raise FileError(f"{path}: {shown(str(name))} is a {type(part).__name__} where a tensor by name is expected")
    return tensors


def _weights(value: Any) -> dict[Any, Any] | None:
    """The innermost dict that holds tensors: `value` or what it wraps."""
    if not isinstance(value, dict):
        return None
    inner = next(filter(None, (_weights(value.get(name)) for name in _WRAPPERS)), None)
    return inner or (value if any(isinstance(part, np.ndarray) for part in value.values()) else None)


def _head(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _begins_chain(head: bytes) -> bool:
    return head.startswith(b"\x80") and _MAGIC in head[:32]


def _other_format(head: bytes) -> str | None:
    if head[257:262] == b"ustar":
        return "not a safetensors file but a tar file, as PyTorch before 0.1.10 wrote, which is not read"
    bare = head[:1] == b"\x80" and head[1:2] in b"\1\2\3\4\5" and len(head) > 2
    return "not a safetensors file but a bare pickle, which is not read" if bare else None


def _archive(data: np.ndarray) -> Any:
    """The value of a zip archive."""
    root, spans = members(memoryview(data), _MAX_MEMBERS)
    begin, end = spans[f"{root}data.pkl"]
    if end - begin > _MAX_PICKLE:
        raise Refused(f"its data.pkl has {end - begin} bytes; at most {_MAX_PICKLE} are read")
    return _interpret(data[begin:end].tobytes(), lambda tag: _storage(data, root, spans, tag))[0]


def _chain(data: np.ndarray, at: int) -> Any:
    """The value of a file of PyTorch before 1.6, whose first pickle ends at `at`."""
    none: Callable[[Any], np.ndarray] = _no_storage
    version, at = _pickle_at(data, at, none, _MAX_PREFIX)
    machine, at = _pickle_at(data, at, none, _MAX_PREFIX)
    if version != 1001 or _expect(machine, dict).get("little_endian") is not True:
        raise Refused("of an unknown version, or written on a big-endian machine; neither is read")
    sizes: dict[str, int] = {}
    _, after = _pickle_at(data, at, lambda tag: _class_of(tag) or _measured(data, sizes, tag))
    keys, end = _pickle_at(data, after, none)
    spans: dict[str, tuple[int, int]] = {}
    for key in _expect(keys, list):
        begin, size = end + 8, sizes.get(_expect(key, str))
        if size is None or key in spans:
            raise Refused(f"lists the storage {shown(key)}, which is of no tensor or listed before")
        end = begin + size
        if end > data.size:
            raise Refused(f"truncated: its storages end at {end}, the file at {data.size}")
        spans[key] = begin, end
    if end != data.size:
        raise Refused(f"its storages end at {end}, the file at {data.size}: followed by other bytes")
    counted: set[str] = set()
    return _pickle_at(data, at, lambda tag: _class_of(tag) or _listed(data, spans, counted, tag))[0]


def _pickle_at(data: np.ndarray, at: int, storage: Callable[[Any], np.ndarray], most: int | None = None):
    """The value of the pickle that begins somewhere in a file, and where it ends."""
    value, length = _interpret(data[at : at + (_MAX_PICKLE if most is None else most)].tobytes(), storage)
    return value, at + length


def _no_storage(tag: Any) -> np.ndarray:
    raise Refused("its pickle uses BINPERSID where no tensor can be: refused")


def _measured(data: np.ndarray, sizes: dict[str, int], tag: Any) -> np.ndarray:
    """Remembers the bytes of a storage of a chain; what it holds is not known yet, and any bytes stand for it."""
    dtype, key, count, _ = _of_chain(tag)
    size = count * dtype.itemsize
    if size > data.size or sizes.setdefault(key, size) != size:
        raise Refused(f"the storage {shown(key)} has two sizes, or more bytes than the file")
    return data[:size].view(dtype)


def _listed(data: np.ndarray, spans: dict[str, tuple[int, int]], counted: set[str], tag: Any) -> np.ndarray:
    """A storage of a chain, as one axis."""
    dtype, key, count, view = _of_chain(tag)
    if key not in spans:
        raise Refused(f"lacks the storage {shown(key)}, the bytes of one of its tensors")
    begin, end = spans[key]
    if key not in counted and int.from_bytes(data[begin - 8 : begin].tobytes(), "little") != count:
        raise Refused(f"the storage {shown(key)} has two sizes")
    counted.add(key)
    array = data[begin:end].view(dtype)
    if view is None:
        return array
    _, offset, length = _expect(view, tuple)
    if _size(offset) + _size(length) > array.size:
        raise Refused(f"a view reaches beyond the storage {shown(key)}")
    return array[offset : offset + length]


def _class_of(tag: Any) -> Opaque | None:
    """The class that a persistent id ("module", class, file, source) of a chain names; None for a storage's."""
    is_class = len(_expect(tag, tuple)) == 4 and isinstance(tag[0], str) and tag[0] == "module"
    return _expect(tag[1], Opaque) if is_class else None


def _of_chain(tag: Any) -> tuple[np.dtype, str, int, Any]:
    """Parts of a chain's persistent id ("storage", dtype, key, device, number of elements, view of it)."""
    kind, dtype, key, _, count, view = _expect(tag, tuple)
    if _expect(kind, str) != "storage":
        raise Refused(f"its pickle names a {shown(kind)} where a storage is expected: refused")
    return _expect(dtype, np.dtype), _expect(key, str), _size(count), view


# The pickle. What it holds may be crafted: a value is looked into only once its type is known, and never printed whole.


def _interpret(code: bytes, storage: Callable[[Any], np.ndarray]) -> tuple[Any, int]:
    """The value that a pickle describes, and its bytes; `storage` gives the array of a persistent id."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int | None = None) -> list[Any]:
        """Removes the topmost values: `count` of them, or all since the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if not (marks[-1] if marks else 0) <= start <= len(stack):
            raise Refused("a damaged checkpoint: its pickle takes more values than it made")
        values = stack[start:]
        del stack[start:]
        return values

    for count, (opcode, value, position) in enumerate(pickletools.genops(code)):
        if count > _MAX_OPCODES:
            raise Refused(f"its data.pkl has more than {_MAX_OPCODES} opcodes")
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                index = len(memo) if value is None else value
                if index > count:
                    raise Refused(f"its pickle remembers a value {index} when it has made at most {count}")
                memo[index] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "BINUNICODE" | "SHORT_BINUNICODE":
                value.encode()  # raises ValueError for half a surrogate pair, which could not be written or printed
                stack.append(value)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append(_FRESH[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(take()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                values = take(1 if opcode.name == "APPEND" else None)
                _expect(stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = take(2 if opcode.name == "SETITEM" else None)
                _set_items(_expect(stack[-1], dict), values)
            case "GLOBAL":
                stack.append(_named(value.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(".".join(take(2))))
            case "BINPERSID":
                stack.append(storage(*take(1)))
            case "REDUCE":
                function, arguments = take(2)
                if _expect(function, Opaque).name not in _CALLS:
                    raise Refused(f"would run {function.name}: not a plain checkpoint, refused")
                stack.append(_CALLS[function.name](*_expect(arguments, tuple)))
            case "NEWOBJ":
                kind, _ = take(2)
                if _expect(kind, Opaque).name != _PARAMETERS:
                    raise Refused(f"would make a {kind.name}: not a plain checkpoint, refused")
                stack.append(_Parameters())
            case "BUILD":
                (state,) = take(1)  # attributes, such as a state dict's `_metadata`: only one class here has any
                if isinstance(_expect(stack[-1], dict, Opaque), _Parameters):
                    stack[-1].update(_expect(_expect(state, dict).get("_parameters"), dict))
            case "STOP":
                return stack.pop(), position + 1
            case "PROTO" if value <= 5:
                pass
            case "FRAME":
                pass
            case _:
                raise Refused(f"its pickle uses {opcode.name}, which torch.save does not write: refused")


class _Parameters(dict):
    """A torch.nn.ParameterDict, in which the original Textual Inversion keeps its vectors, as the dict that it is."""


_FRESH = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_FRESH |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise Refused(f"its pickle treats a {type(value).__name__} as a {kinds[0].__name__}: refused")
    return value


def _named(name: str) -> Any:
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _CALLS or name in _CLASSES:
        return Opaque(name)
    if (
        name.startswith("torch.")
        and name.endswith("Storage")
        or re.fullmatch(r"torch\.(u?int|float|complex|q)\w+", name)
    ):
        raise Refused(f"holds a {shown(name)}, which has no counterpart here")
    raise Refused(f"would run {shown(name)}: not a plain checkpoint, refused")


def _set_items(target: dict[Any, Any], values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        # Tuples are left out: to hash a crafted one can take for ever.
        if not (isinstance(key, str | Opaque) or (type(key) is int and 0 <= key < _MAX_KEY)):
            raise Refused(f"has a dict with a {type(key).__name__} as key; known are texts and small whole numbers")
        if key in target:
            raise Refused(f"holds {shown(str(key))} twice in one dict")
        target[key] = value


def _storage(data: np.ndarray, root: str, spans: dict[str, tuple[int, int]], tag: Any) -> np.ndarray:
    """The storage that a persistent id ("storage", dtype, key, device, number of elements) names, as one axis."""
    kind, dtype, key, _, count = _expect(tag, tuple)
    name = f"{root}data/{_expect(key, str)}"
    if _expect(kind, str) != "storage" or name not in spans:
        raise Refused(f"lacks {shown(name)}, the bytes of one of its tensors")
    begin, end = spans[name]
    length = _size(count) * _expect(dtype, np.dtype).itemsize
    if length > end - begin:
        raise Refused(f"{shown(name)} has {end - begin} bytes, too few for {count} of {dtype}")
    return data[begin : begin + length].view(dtype)


def _size(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**48:
        raise Refused(f"a tensor has an impossible size, stride or offset ({type(number).__name__})")
    return number


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> np.ndarray:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: a view of a storage; offset and strides count elements."""
    shape = tuple(map(_size, _expect(size, tuple)))
    steps = tuple(map(_size, _expect(stride, tuple)))
    if _expect(storage, np.ndarray).ndim != 1 or not storage.flags.c_contiguous or metadata:
        raise Refused("a tensor is not a plain view of a storage")
    if len(shape) != len(steps) or len(shape) > 8:
        raise Refused(f"a tensor has {len(shape)} sizes and {len(steps)} strides; at most 8 of each are read")
    count = math.prod(shape)
    if not count:
        return np.ndarray(shape, storage.dtype, storage.view(np.uint8))
    last = _size(offset) + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if count > storage.size or last >= storage.size:
        raise Refused(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} elements")
    strides = [step * storage.itemsize for step in steps]
    return np.ndarray(shape, storage.dtype, storage.view(np.uint8), offset * storage.itemsize, strides)


def _typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> np.ndarray:
    """torch._utils._rebuild_tensor_v3: a view of the bytes of a storage as a type that has no storage of its own."""
    wanted = _expect(dtype, np.dtype)
    data = _expect(storage, np.ndarray)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size % wanted.itemsize:
        raise Refused(f"a tensor of {wanted} is not a plain view of a storage of bytes")
    return _tensor(data.view(wanted), offset, size, stride, requires_grad, hooks, metadata)


def _empty_set(parts: Any) -> Opaque:
    """A module keeps one among its attributes."""
    if _expect(parts, list):
        raise Refused("would run builtins.set: not a plain checkpoint, refused")
    return Opaque("set")


# What a pickle may call, by the names that it uses; nothing under these names is imported. The class and the NumPy
# names occur in the training state of Stable Diffusion 1.x checkpoints (`callbacks`, `best_model_score`).
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
_CLASSES = {"pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", _PARAMETERS}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "__builtin__.set": _empty_set,
    "builtins.set": _empty_set,
    "torch.Size": lambda sizes: _expect(sizes, tuple),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: _expect(tensor, np.ndarray),
    "numpy.dtype": lambda *_: Opaque("numpy.dtype"),
    "numpy.core.multiarray.scalar": lambda *_: Opaque("NumPy scalar"),
    "numpy._core.multiarray.scalar": lambda *_: Opaque("NumPy scalar"),
    "_codecs.encode": lambda text, encoding: Opaque("bytes"),
}


def _check_tree(value: Any, size: int) -> None:
    """Refuses a tree that holds itself, is very deep, or unfolds into far more than the `size` of its file."""
    measured: dict[int, tuple[int, int] | None] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Levels of `value`, and its parts plus the bytes of its tensors, what is shared counted wherever it stands."""
        if not isinstance(value, (dict, list, tuple)):  # noqa: UP038  (a union would be made anew for each value)
            return 0, 1 + getattr(value, "nbytes", 0)
        if id(value) not in measured:
            if depth > _MAX_LEVELS:
                raise Refused(f"has more than {_MAX_LEVELS} levels")
            measured[id(value)] = None
            parts = [measure(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
            measured[id(value)] = 1 + max((a for a, _ in parts), default=0), 1 + sum(b for _, b in parts)
        if (result := measured[id(value)]) is None:
            raise Refused("has a part that holds itself")
        return result

    levels, unfolded = measure(value, 0)
    if levels > _MAX_LEVELS or unfolded > _MAX_UNFOLDED * size:
        raise Refused(f"shares its parts so often that {size} bytes would become {unfolded}, in {levels} levels")
