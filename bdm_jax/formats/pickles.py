"""Reader of PyTorch checkpoints (.bin, .ckpt, .pt, .pth) that needs no torch and runs nothing that a file names.

torch.save writes a zip archive of stored (uncompressed) members: `ROOT/data.pkl`, a pickle that names every storage by
a persistent id, and `ROOT/data/KEY`, the bytes of one storage each. A pickle is a program, and a file from elsewhere
may hold any. So none is unpickled: `pickletools` splits it into opcodes, a small interpreter knows those that
torch.save writes, and the few names in `_CALLS` stand for functions of this file. All others are refused; none is
imported.
"""

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.formats.files import Tensors, shown

# Under these names trainers keep the weights: LDM and Lightning, plain loops, DeepSpeed, BasicSR (averaged ones first).
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")

_MAX_PICKLE = 64 * 2**20
_MAX_OPCODES = 2_000_000  # a tensor takes about 30: some 60,000 tensors, read in seconds
_MAX_MEMBERS = 200_000
_MAX_LEVELS = 100
_MAX_KEY = 2**24  # larger integers can be chosen so that a dict's keys all collide
_MAX_UNFOLDED = 16  # times the file's size: what a tree may take once all that it shares is copied

_KINDS = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16}
_KINDS |= {"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_}
_DTYPES = {f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in _KINDS.items()}
_DTYPES |= {f"torch.{np.dtype(dtype).name}": np.dtype(dtype) for dtype in _KINDS.values()}
_DTYPES["torch.storage.UntypedStorage"] = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for something that a checkpoint may mention but that is never made, such as a NumPy scalar."""

    name: str


def is_checkpoint(path: str | Path) -> bool:
    """Whether the file begins as a zip archive, as all that torch.save writes does. Raises FileError if unreadable."""
    return _head(path).startswith(b"PK\3\4")


def read_checkpoint(path: str | Path) -> Any:
    """What a checkpoint holds: nested dicts, lists and tuples of plain values, NumPy arrays and `Opaque`s.

    Arrays are read-only views of the memory-mapped file, of any strides (bfloat16 through ml_dtypes); a bare storage is
    an array of one axis, a torch dtype a NumPy one. Raises FileError for a file of another format, a damaged one, and
    one that would run code.
    """
    head = _head(path)
    try:
        if not head.startswith(b"PK\3\4"):
            again = "save it again with torch.save of a recent PyTorch, or as safetensors"
            raise _Refused(f"{_other_format(head)}; {again}")
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        root, spans = _members(memoryview(data))
        begin, end = spans[f"{root}data.pkl"]
        if end - begin > _MAX_PICKLE:
            raise _Refused(f"its data.pkl has {end - begin} bytes; at most {_MAX_PICKLE} are read")
        value = _interpret(data[begin:end].tobytes(), lambda tag: _storage(data, root, spans, tag))
        _check_tree(value, data.size)
        return value
    except _Refused as error:
        raise FileError(f"{path}: {error}") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise FileError(f"{path}: a damaged checkpoint ({shown(str(error))})") from error


def state_dict(path: str | Path) -> Tensors:
    """The tensors of a checkpoint by name: its own dict, or the one that it keeps under `state_dict`, `model`, ...

    A leading `module.` on every name (DataParallel) is dropped; numbers, texts and None among the tensors are left out.
    Raises FileError as `read_checkpoint` does, when there are no tensors, and for any other value among them.
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
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): part for name, part in tensors.items()}


class _Refused(Exception):
    """What is wrong with a file; `read_checkpoint` adds which."""


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


def _other_format(head: bytes) -> str:
    if head.startswith(b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        return "in the format of PyTorch before 1.6, a chain of pickles, which is not read"
    if head[257:262] == b"ustar":
        return "a tar file, which is not read"
    return "a bare pickle, which is not read" if head.startswith(b"\x80") else "not a PyTorch checkpoint"


# The zip archive (APPNOTE.TXT, PKWARE). Nothing is extracted: what counts is where the bytes of each member lie.


def _members(data: memoryview) -> tuple[str, dict[str, tuple[int, int]]]:
    """The folder in which data.pkl lies ("" or one that ends in "/"), and each member's (begin, end) by its name."""
    limit, members = _directory(data)
    roots = [name.removesuffix("data.pkl") for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise _Refused("holds several data.pkl" if roots else "a zip file without data.pkl: not a PyTorch checkpoint")
    root = roots[0]
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in members):
        raise _Refused("a TorchScript program, which is code; save its state_dict instead")
    spans, reach = {}, 0
    for name, fields in sorted(members.items(), key=lambda item: item[1]):
        if fields[0] < reach:
            raise _Refused(f"{shown(name)} overlaps the member before it")
        spans[name] = _, reach = _span(data, name, *fields)
        if reach > limit:
            raise _Refused(f"{shown(name)} reaches beyond the place of the members")
    begin, end = spans.get(f"{root}byteorder", (0, 0))
    if end > begin and data[begin:end] != b"little":
        raise _Refused("written on a big-endian machine, which is not read")
    return root, spans


def _directory(data: memoryview) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Where the archive's directory begins, and (offset, size, packed size, method, flags, mode) by member name."""
    end = len(data) - 22
    if end < 0 or data[end:][:4] != b"PK\5\6":
        raise _Refused("truncated or followed by other bytes: it does not end with a zip directory")
    count, length, start = narrow = struct.unpack_from("<H2L", data, end + 10)
    if end >= 76 and data[end - 20 :][:4] == b"PK\6\7":  # zip64, for what does not fit 16 or 32 bits
        end -= 76
        count, length, start = wide = struct.unpack_from("<3Q", data, end + 32)
        agree = all(a in (b, top) for a, b, top in zip(narrow, wide, (2**16 - 1, 2**32 - 1, 2**32 - 1), strict=True))
        if data[end:][:4] != b"PK\6\6" or not agree:
            raise _Refused("its two zip directories disagree")
    if start + length != end or count > _MAX_MEMBERS:
        raise _Refused(f"its zip directory ({count} members in {length} bytes at {start}) is damaged or too large")
    members, position = {}, start
    for _ in range(count):
        signature, flags, method, packed, size, names, extras, comments, mode, offset = struct.unpack_from(
            "<4s4x2H8x2L3H6xHL", data, position
        )
        name = str(data[position + 46 :][:names], "utf-8")
        extra = data[position + 46 + names :][:extras]
        position += 46 + names + extras + comments
        if signature != b"PK\1\2" or position > end:
            raise _Refused("its zip directory is damaged")
        if name in members:
            raise _Refused(f"holds {shown(name)} twice")
        size, packed, offset = _widened(extra, [size, packed, offset])
        members[name] = offset, size, packed, method, flags, mode
    if position != end:
        raise _Refused("its zip directory holds more than it says")
    return start, members


def _widened(extra: memoryview, values: list[int]) -> list[int]:
    """Sizes and offset of a member, those that do not fit 32 bits taken from its zip64 field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            return [next(wide, value) if value == 2**32 - 1 else value for value in values]
        extra = extra[4 + length :]
    return values


def _span(data: memoryview, name: str, offset: int, size: int, packed: int, method: int, flags: int, mode: int):
    """(begin, end) of a member's bytes, by its local header, which must say what the directory says."""
    if offset + 30 > len(data):
        raise _Refused(f"{shown(name)} lies outside the file")
    signature, own_flags, own_method, own_packed, own_size, names, extras = struct.unpack_from(
        "<4s2x2H8x2L2H", data, offset
    )
    if signature != b"PK\3\4" or data[offset + 30 :][:names] != name.encode():
        raise _Refused(f"{shown(name)} does not lie where the zip directory says")
    if (flags | own_flags) & 0x2041:
        raise _Refused(f"{shown(name)} is encrypted")
    if method or own_method:
        raise _Refused(f"{shown(name)} is compressed, which torch.save does not do")
    if mode & 0o170000 not in (0, 0o100000, 0o040000):
        raise _Refused(f"{shown(name)} is a link, not a file")
    # A local header leaves its sizes open where they follow the bytes (flag 8), and sets all their bits above 4 GB.
    allowed = {size, 2**32 - 1, 0 if own_flags & 8 else size}
    if packed != size or not {own_packed, own_size} <= allowed:
        raise _Refused(f"{shown(name)} has two sizes")
    begin = offset + 30 + names + extras
    return begin, begin + size


# The pickle. What it holds may be crafted: a value is looked into only once its type is known, and never printed whole.


def _interpret(code: bytes, storage: Callable[[Any], np.ndarray]) -> Any:
    """The value that a pickle describes; `storage` gives the array of a persistent id."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int | None = None) -> list[Any]:
        """Removes the topmost values: `count` of them, or all since the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if not (marks[-1] if marks else 0) <= start <= len(stack):
            raise _Refused("a damaged checkpoint: its pickle takes more values than it made")
        values = stack[start:]
        del stack[start:]
        return values

    for count, (opcode, value, _) in enumerate(pickletools.genops(code)):
        if count > _MAX_OPCODES:
            raise _Refused(f"its data.pkl has more than {_MAX_OPCODES} opcodes")
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                index = len(memo) if value is None else value
                if index > count:
                    raise _Refused(f"its pickle remembers a value {index} when it has made at most {count}")
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
                    raise _Refused(f"would run {function.name}: not a plain checkpoint, refused")
                stack.append(_CALLS[function.name](*_expect(arguments, tuple)))
            case "NEWOBJ":
                kind, _ = take(2)
                if _expect(kind, Opaque).name != _PARAMETERS:
                    raise _Refused(f"would make a {kind.name}: not a plain checkpoint, refused")
                stack.append(_Parameters())
            case "BUILD":
                (state,) = take(1)  # attributes, such as a state dict's `_metadata`: only one class here has any
                if isinstance(_expect(stack[-1], dict, Opaque), _Parameters):
                    stack[-1].update(_expect(_expect(state, dict).get("_parameters"), dict))
            case "STOP":
                return stack.pop()
            case "PROTO" if value <= 5:
                pass
            case "FRAME":
                pass
            case _:
                raise _Refused(f"its pickle uses {opcode.name}, which torch.save does not write: refused")


class _Parameters(dict):
    """A torch.nn.ParameterDict, in which the original Textual Inversion keeps its vectors, as the dict that it is."""


_FRESH = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_FRESH |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise _Refused(f"its pickle treats a {type(value).__name__} as a {kinds[0].__name__}: refused")
    return value


def _named(name: str) -> Any:
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _CALLS or name in _CLASSES:
        return Opaque(name)
    if name.startswith("torch.") and name.endswith("Storage"):
        raise _Refused(f"holds a {shown(name)}, which has no counterpart here")
    raise _Refused(f"would run {shown(name)}: not a plain checkpoint, refused")


def _set_items(target: dict[Any, Any], values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        # Tuples are left out: to hash a crafted one can take for ever.
        if not (isinstance(key, str | Opaque) or (type(key) is int and 0 <= key < _MAX_KEY)):
            raise _Refused(f"has a dict with a {type(key).__name__} as key; known are texts and small whole numbers")
        if key in target:
            raise _Refused(f"holds {shown(str(key))} twice in one dict")
        target[key] = value


def _storage(data: np.ndarray, root: str, spans: dict[str, tuple[int, int]], tag: Any) -> np.ndarray:
    """The storage that a persistent id ("storage", dtype, key, device, number of elements) names, as one axis."""
    kind, dtype, key, _, count = _expect(tag, tuple)
    name = f"{root}data/{_expect(key, str)}"
    if _expect(kind, str) != "storage" or name not in spans:
        raise _Refused(f"lacks {shown(name)}, the bytes of one of its tensors")
    begin, end = spans[name]
    length = _size(count) * _expect(dtype, np.dtype).itemsize
    if length > end - begin:
        raise _Refused(f"{shown(name)} has {end - begin} bytes, too few for {count} of {dtype}")
    return data[begin : begin + length].view(dtype)


def _size(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**48:
        raise _Refused(f"a tensor has an impossible size, stride or offset ({type(number).__name__})")
    return number


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> np.ndarray:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: a view of a storage; offset and strides count elements."""
    shape = tuple(map(_size, _expect(size, tuple)))
    steps = tuple(map(_size, _expect(stride, tuple)))
    if _expect(storage, np.ndarray).ndim != 1 or not storage.flags.c_contiguous or metadata:
        raise _Refused("a tensor is not a plain view of a storage")
    if len(shape) != len(steps) or len(shape) > 8:
        raise _Refused(f"a tensor has {len(shape)} sizes and {len(steps)} strides; at most 8 of each are read")
    count = math.prod(shape)
    if not count:
        return np.ndarray(shape, storage.dtype, storage.view(np.uint8))
    last = _size(offset) + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if count > storage.size or last >= storage.size:
        raise _Refused(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} elements")
    strides = [step * storage.itemsize for step in steps]
    return np.ndarray(shape, storage.dtype, storage.view(np.uint8), offset * storage.itemsize, strides)


def _empty_set(parts: Any) -> Opaque:
    """A module keeps one among its attributes."""
    if _expect(parts, list):
        raise _Refused("would run builtins.set: not a plain checkpoint, refused")
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
                raise _Refused(f"has more than {_MAX_LEVELS} levels")
            measured[id(value)] = None
            parts = [measure(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
            measured[id(value)] = 1 + max((a for a, _ in parts), default=0), 1 + sum(b for _, b in parts)
        if (result := measured[id(value)]) is None:
            raise _Refused("has a part that holds itself")
        return result

    levels, unfolded = measure(value, 0)
    if levels > _MAX_LEVELS or unfolded > _MAX_UNFOLDED * size:
        raise _Refused(f"shares its parts so often that {size} bytes would become {unfolded}, in {levels} levels")
