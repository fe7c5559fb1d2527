"""PyTorch checkpoints put together by hand: archives and chains of pickles that no honest writer makes."""

import io
import pickle
import re
import struct
from dataclasses import dataclass

import pytest

from bdm_jax.errors import FileError
from bdm_jax.formats.pickles import read_checkpoint, state_dict


@dataclass
class Part:
    """One member of an archive, and how what is said of it differs from what it is."""

    name: str
    data: bytes = b""
    flags: int = 0
    method: int = 0
    mode: int = 0
    size: int | None = None  # in the directory
    own_size: int | None = None  # in its own header
    own_name: str | None = None
    disk: int = 0
    attributes: int = 0
    offset: int | None = None

    def header(self):
        size = len(self.data) if self.own_size is None else self.own_size
        name = (self.own_name or self.name).encode("utf-8", "surrogateescape")
        fields = (b"PK\3\4", 0, self.flags, self.method, 0, 0, 0, size, size, len(name), 0)
        return struct.pack("<4s5H3L2H", *fields) + name


def archive(parts, *, count=None, start=None, wide=None, disks=None, locator=(0, 1)):
    """A zip file of parts; `wide` replaces fields of its zip64 directory, which is written if it is given.

    `disks`: this one, that of the directory, members on it; `locator`: that of the zip64 directory, how many there are.
    """
    body = directory = b""
    for part in parts:
        size = len(part.data) if part.size is None else part.size
        offset = len(body) if part.offset is None else part.offset
        name, extra = part.name.encode("utf-8", "surrogateescape"), b""
        if max(size, offset) >= 2**32:
            extra = struct.pack("<2H3Q", 1, 24, size, size, offset)
            size = offset = 2**32 - 1
        fields = (part.flags, part.method, 0, 0, 0, size, size, len(name), len(extra), 0)
        fields += (part.disk, 0, part.mode << 16 | part.attributes, offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, *fields) + name + extra
        body += part.header() + part.data
    count, start = len(parts) if count is None else count, len(body) if start is None else start
    end = b""
    if wide is not None:
        fields = {"count": count, "length": len(directory), "start": start} | wide
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, fields["count"], *fields.values())
        end += struct.pack("<4sLQL", b"PK\6\7", locator[0], start + len(directory), locator[1])
        count, start = min(fields["count"], 2**16 - 1), min(start, 2**32 - 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", *(disks or (0, 0, count)), count, len(directory), start, 0)
    return body + directory + end


def of(value):
    """The opcodes of a plain value; nothing goes into the memo."""
    pickler = pickle.Pickler(file := io.BytesIO(), 2)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()[2:-1]


def named(name):
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def storage(key="0", kind="torch.FloatStorage", count=4):
    return b"(" + of("storage") + named(kind) + of(key) + of("cpu") + of(count) + b"tQ"


EMPTY = named("collections.OrderedDict") + b")R"


def tensor(size=(4,), stride=(1,), offset=0, held=None, rest=b"\x89" + EMPTY):
    size = size if isinstance(size, bytes) else of(size)
    parts = (storage() if held is None else held) + of(offset) + size + of(stride) + rest
    return named("torch._utils._rebuild_tensor_v2") + b"(" + parts + b"tR"


def chain(code, data=bytes(range(16)), *, count=4, keys=("0",), version=1001, little=True, rest=b""):
    """A file of PyTorch before 1.6, made by hand."""
    pickled = [0x1950A86A20F9469CFC6C, version, {"little_endian": little, "type_sizes": {}}]
    parts = [b"\x80\2" + of(value) + b"." for value in pickled]
    parts += [b"\x80\2" + code + b".", b"\x80\2" + of(list(keys)) + b"."]
    return b"".join(parts) + count.to_bytes(8, "little") + data + rest


def in_chain(code):
    """The opcodes of an archive's pickle as a chain has them: persistent ids have a sixth part."""
    return code.replace(b"tQ", b"NtQ")


def mapping(**values):
    return b"}(" + b"".join(of(name) + value for name, value in values.items()) + b"u"


def members(code, data=bytes(range(16)), protocol=2):
    pickled = bytes([0x80, protocol]) + code + b"."
    return [
        Part("x/data.pkl", pickled),
        Part("x/byteorder", b"little"),
        Part("x/data/0", data),
        Part("x/version", b"3\n"),
    ]


def checkpoint(code, **options):
    return archive(members(code, **options))


GOOD = mapping(a=tensor(), b=mapping(c=tensor((2, 2), (1, 2))), n=of(3))


def refused(path, content, message=""):
    path.write_bytes(content)
    for read in (read_checkpoint, state_dict):
        with pytest.raises(FileError, match=re.escape(f"{path}: ") + f".*{message}") as error:
            read(path)
        text = str(error.value)
        assert text.isprintable() and len(text) < len(str(path)) + 450  # one line, without control characters
