"""Files made to harm: pickles that run commands, archives that lie, and thousands of damaged ones.

The archives are put together by hand, since no honest writer makes them.
"""

import io
import os
import pickle
import re
import struct
import tarfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import bdm_jax.formats.pickles
from bdm_jax.errors import FileError
from bdm_jax.formats.files import read_safetensors, write_safetensors
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
    offset: int | None = None

    def header(self):
        size = len(self.data) if self.own_size is None else self.own_size
        name = (self.own_name or self.name).encode("utf-8", "surrogateescape")
        fields = (b"PK\3\4", 0, self.flags, self.method, 0, 0, 0, size, size, len(name), 0)
        return struct.pack("<4s5H3L2H", *fields) + name


def archive(parts, *, count=None, start=None, wide=None):
    """A zip file of parts; `wide` replaces fields of its zip64 directory, which is written if it is given."""
    body = directory = b""
    for part in parts:
        size = len(part.data) if part.size is None else part.size
        offset = len(body) if part.offset is None else part.offset
        name, extra = part.name.encode("utf-8", "surrogateescape"), b""
        if max(size, offset) >= 2**32:
            extra = struct.pack("<2H3Q", 1, 24, size, size, offset)
            size = offset = 2**32 - 1
        fields = (part.flags, part.method, 0, 0, 0, size, size, len(name), len(extra), 0, 0, 0, part.mode << 16, offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, *fields) + name + extra
        body += part.header() + part.data
    count, start = len(parts) if count is None else count, len(body) if start is None else start
    end = b""
    if wide is not None:
        fields = {"count": count, "length": len(directory), "start": start} | wide
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, fields["count"], *fields.values())
        end += struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
        count, start = min(fields["count"], 2**16 - 1), min(start, 2**32 - 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
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


def test_the_archive_made_by_hand_is_read(tmp_path):
    path = tmp_path / "x.ckpt"
    for options in ({}, {"wide": {}}):
        path.write_bytes(archive(members(GOOD), **options))
        found = read_checkpoint(path)
        assert found["a"].view(np.uint8).tolist() == list(range(16))
        assert found["b"]["c"].T.tobytes() == found["a"].tobytes() and found["n"] == 3


def test_a_checkpoint_beyond_4_gb_is_read(tmp_path):
    """A storage of 5 GiB, a hole in the file for the most part, and members that lie after it."""
    size = 5 * 2**30
    code = tensor((4,), (1,), size - 4, storage(kind="torch.ByteStorage", count=size))
    parts = [Part("x/data/0", size=size, own_size=2**32 - 1), Part("x/data.pkl", b"\x80\2" + code + b".")]
    parts[1].offset = size + len(parts[0].header())
    first = len(parts[0].header())
    dense = archive(parts, start=size + sum(len(part.header() + part.data) for part in parts), wide={})
    with (tmp_path / "x.ckpt").open("wb") as file:
        file.write(dense[:first])
        file.seek(size - 4, os.SEEK_CUR)
        file.write(b"\1\2\3\4" + dense[first:])
    assert read_checkpoint(tmp_path / "x.ckpt").tolist() == [1, 2, 3, 4]


# Commands. Each would make the file `canary` if anything of it ran.


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def run(name, argument):
    return named(name) + of(argument) + b"\x85R"


ATTACKS = {
    "os.system": lambda c: run("os.system", c),
    "as Python pickles it": lambda c: pickle.dumps(Command(c), 2)[2:-1],
    "by a name on the stack": lambda c: pickle.dumps(Command(c), 4)[2:-1],
    "among tensors": lambda c: mapping(a=tensor(), b=mapping(c=run("posix.system", c))),
    "as a key": lambda c: b"}" + run("os.system", c) + of(1) + b"s",
    "as a tensor's storage": lambda c: tensor(held=run("os.system", c)),
    "as a tensor's hooks": lambda c: tensor(rest=b"\x89" + run("os.system", c)),
    "as a tensor's shape": lambda c: tensor() + b"0" + run("os.system", c),
    "in a persistent id": lambda c: b"(" + of("storage") + run("os.system", c) + of("0") + of("cpu") + of(4) + b"tQ",
    "in a persistent id of text": lambda c: b"Pcos\nsystem\n",
    "in the state of BUILD": lambda c: EMPTY + run("os.system", c) + b"b",
    "by __setstate__": lambda c: named("os.system") + of(c) + b"b",
    "by attributes of a dict": lambda c: EMPTY + mapping(items=named("os.system")) + b"b",
    "by attributes of a function": lambda c: named("torch.Size") + mapping(__call__=named("os.system")) + b"b",
    "by attributes of a tensor": lambda c: tensor() + mapping(__class__=of(1)) + b"b",
    "by INST": lambda c: b"(" + of(c) + b"ios\nsystem\n",
    "by OBJ": lambda c: b"(" + named("os.system") + of(c) + b"o",
    "by NEWOBJ": lambda c: named("collections.OrderedDict") + of(c) + b"\x85\x81",
    "by NEWOBJ_EX": lambda c: named("collections.OrderedDict") + b")}\x92",
    "by EXT1": lambda c: b"\x82\1" + of(c) + b"\x85R",
    "by EXT4": lambda c: b"\x84\1\0\0\0" + of(c) + b"\x85R",
    "by calling what is only a name": lambda c: run("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", c),
    "by calling a text": lambda c: of("os.system") + of(c) + b"\x85R",
    "by calling a dtype": lambda c: run("torch.FloatStorage", c),
    "by a dotted name": lambda c: of("torch") + of("FloatStorage.__class__.mro") + b"\x93)R",
    "by a name with a line break": lambda c: of("os\n\x1b[31m") + of("system") + b"\x93)R",
} | {
    name: lambda c, name=name: run(name, f"__import__('os').system({c!r})")
    for name in (
        "builtins.eval builtins.exec builtins.getattr builtins.__import__ __builtin__.eval subprocess.Popen "
        "runpy.run_path torch.hub.load torch.hub._load_local torch.load torch.serialization.load torch.jit.load "
        "torch.storage._load_from_bytes torch.utils.model_zoo.load_url torch._utils.os.system numpy.load "
        "_pickle.loads operator.attrgetter"
    ).split()
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_is_run(attack, tmp_path):
    canary = tmp_path / "canary"
    refused(tmp_path / "x.ckpt", checkpoint(ATTACKS[attack](f"touch {canary}")))
    assert not canary.exists()


def test_what_would_run_is_named(tmp_path):
    refused(
        tmp_path / "x.ckpt", checkpoint(run("os.system", "x")), "would run os.system: not a plain checkpoint, refused"
    )


def test_the_canary_can_sing(tmp_path):
    pickle.loads(b"\x80\2" + ATTACKS["os.system"](f"touch {tmp_path / 'canary'}") + b".")
    assert (tmp_path / "canary").exists()


def tarred(code):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(code)
            tar.addfile(entry, io.BytesIO(code))
    return file.getvalue()


def legacy(code):
    file = io.BytesIO()
    torch.save({}, file, _use_new_zipfile_serialization=False)
    return file.getvalue().replace(b"}q\x00.", code) + code


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda code: code, "a bare pickle.*save it again"),
        (lambda code: code[2:], "not a PyTorch checkpoint.*save it again"),
        (tarred, "a tar file.*save it again"),
        (legacy, "the format of PyTorch before 1.6.*save it again"),
        (lambda code: b"", "not a PyTorch checkpoint"),
        (lambda code: b"PK\3\4", "truncated"),
    ],
    ids="bare without-protocol tar legacy empty four-bytes".split(),
)
def test_other_formats_run_nothing(wrap, message, tmp_path):
    canary = tmp_path / "canary"
    refused(tmp_path / "x.pt", wrap(b"\x80\2" + run("os.system", f"touch {canary}") + b"."), message)
    assert not canary.exists()


# Archives.


def changed(index, *, code=GOOD, **fields):
    parts = members(code)
    for name, value in fields.items():
        setattr(parts[index], name, value)
    return parts


INNER = Part("x/data/1", b"1234")

ARCHIVES = {
    "a name twice": (archive([*members(GOOD), Part("x/data/0", b"x")]), "x/data/0 twice"),
    "encrypted": (archive(changed(2, flags=1)), "x/data/0 is encrypted"),
    "strongly encrypted": (archive(changed(0, flags=0x41)), "x/data.pkl is encrypted"),
    "compressed": (archive(changed(2, method=8)), "x/data/0 is compressed"),
    "overlapping": (
        archive(
            [Part("x/data/0", INNER.header() + INNER.data), Part("x/data/1", b"1234", offset=38), *members(GOOD)[:1]]
        ),
        "x/data/1 overlaps",
    ),
    "one header for two": (archive(changed(3, offset=0, name="x/data.pkl2")), "x/data.pkl2 does not lie where"),
    "outside the file": (archive(changed(2, offset=2**31)), "x/data/0 lies outside the file"),
    "far outside the file": (archive(changed(2, offset=2**63), wide={}), "x/data/0 lies outside the file"),
    "longer than the file": (archive(changed(2, size=2**20, own_size=2**20)), "reaches beyond|overlaps"),
    "far longer than the file": (archive(changed(3, size=2**63, own_size=2**32 - 1), wide={}), "reaches beyond"),
    "into the directory": (archive(changed(3, size=8, own_size=8)), "x/version reaches beyond"),
    "two sizes": (archive(changed(2, own_size=12)), "x/data/0 has two sizes"),
    "no size of its own": (archive(changed(2, own_size=0)), "x/data/0 has two sizes"),
    "two names": (archive(changed(2, own_name="x/data/7")), "x/data/0 does not lie where"),
    "a link": (archive(changed(2, mode=0o120777)), "x/data/0 is a link"),
    "a device": (archive(changed(2, mode=0o020777)), "x/data/0 is a link"),
    "several pickles": (archive([*members(GOOD), Part("y/data.pkl", b"\x80\2N.")]), "several data.pkl"),
    "no pickle": (archive(members(GOOD)[1:]), "without data.pkl"),
    "no members": (archive([]), "not a PyTorch checkpoint|truncated"),
    "a program": (archive([*members(GOOD), Part("x/code/__torch__.py")]), "a TorchScript program"),
    "constants": (archive([*members(GOOD), Part("x/constants.pkl")]), "a TorchScript program"),
    "big-endian": (archive(changed(1, data=b"big")), "big-endian"),
    "too many members": (archive(members(GOOD), wide={"count": 200_001}), "200001 members"),
    "no end of members": (archive(members(GOOD), wide={"count": 2**64 - 1}), "members"),
    "more members than there are": (archive(members(GOOD), count=5), "damaged"),
    "fewer members than there are": (archive(members(GOOD), count=3), "holds more than it says"),
    "directories that disagree": (archive(members(GOOD), wide={"start": 0}), "disagree"),
    "directory elsewhere": (archive(members(GOOD), start=0), "is damaged or too large"),
    "truncated": (checkpoint(GOOD)[:-1], "truncated"),
    "half": (checkpoint(GOOD)[:300], "truncated"),
    "followed by other bytes": (checkpoint(GOOD) + b"\0", "truncated or followed by other bytes"),
    "preceded by other bytes": (b"PK\3\4" + checkpoint(GOOD), "damaged"),
    "a name that is no text": (archive(changed(2, name="x/\udcff")), "damaged"),
    "a name of control characters": (archive([*members(GOOD), *[Part("\x1b[31m\n")] * 2]), "twice"),
}


@pytest.mark.parametrize("defect", ARCHIVES)
def test_archive_that_lies(defect, tmp_path):
    refused(tmp_path / "x.ckpt", *ARCHIVES[defect])


# Pickles without a command.


def laughs(levels):
    """Lists of two of the one before: 2 ** levels parts in few bytes; the last is number `levels` of the memo."""
    return b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(levels))


PICKLES = {
    "protocol 6": (b"\x80\6N", "PROTO"),
    "memo of gigabytes": (b"Nr\xff\xff\xff\x7f", "remembers a value 2147483647"),
    "memo not made": (b"h\7", "damaged"),
    "memo of nothing": (b"q\0", "damaged"),
    "text of gigabytes": (b"X\xff\xff\xff\xff", "damaged"),
    "text that is no text": (b"X\3\0\0\0\xed\xa0\x80", "damaged"),
    "integer of many digits": (b"L" + b"9" * 10_000 + b"L\n", "damaged"),
    "integer of protocol 0": (b"I1\n", "uses INT"),
    "end of nothing": (b"", "damaged"),
    "mark missing": (b"t", "damaged"),
    "taking below the mark": (b"NN(\x87", "takes more values than it made"),
    "no such opcode": (b"\xff", "damaged"),
    "a set": (b"\x8f", "uses EMPTY_SET"),
    "a list that holds itself": (b"]q\0h\0a", "holds itself"),
    "a dict that holds itself": (b"}q\0" + of("a") + b"h\0s", "holds itself"),
    "a tuple that holds itself": (b"]q\0h\0\x85q\1a", "holds itself"),
    "deep lists": (b"]" * 200 + b"a" * 199, "more than 100 levels"),
    "very deep tuples": (b")" + b"\x85" * 30_000, "more than 100 levels"),
    "deep by sharing": (b"](]q\0" + b"](h\0eq\0" * 150 + b"e", "in 152 levels"),
    "a billion laughs": (laughs(90), "shares its parts"),
    "laughs that go deep": (laughs(200), "more than 100 levels"),
    "laughs as a key": (laughs(60) + b"}h\x3cNs", "list as key"),
    "laughs as a shape": (laughs(60) + tensor(b"h\x3c"), "treats a list as a tuple"),
    "laughs in a shape": (laughs(60) + tensor(b"h\x3c\x85"), "impossible size"),
    "laughs in a persistent id": (laughs(60) + b"(h\x3ch\x3ch\x3ch\x3ch\x3ctQ", "treats a list as a str"),
    "laughs that are called": (laughs(60) + b")R", "treats a list as a Opaque"),
    "a key twice": (b"}(" + (of("a") + b"N") * 2 + b"u", "a twice"),
    "a key without a value": (b"}(" + of("a") + b"u", "damaged"),
    "a key that is a number too large": (b"}" + of(2**61 - 1) + b"Ns", "int as key"),
    "a key that is negative": (b"}" + of(-1) + b"Ns", "int as key"),
    "items of a list": (b"]NNs", "treats a list as a dict"),
    "appending to a tensor": (tensor() + b"Na", "treats a ndarray as a list"),
    "a storage that is missing": (tensor(held=storage("7")), "lacks x/data/7"),
    "a storage elsewhere": (tensor(held=storage("../data.pkl")), "lacks"),
    "a storage too small": (tensor(held=storage(count=5)), "x/data/0 has 16 bytes, too few for 5 of float32"),
    "a storage far too small": (tensor(held=storage(count=2**47)), "too few"),
    "a storage of wider elements": (tensor(held=storage(kind="torch.DoubleStorage")), "too few"),
    "a storage of impossible size": (tensor(held=storage(count=-4)), "impossible size"),
    "a storage of enormous size": (tensor(held=storage(count=2**200)), "impossible size"),
    "a storage of truth": (tensor(held=storage(count=True)), "impossible size"),
    "a storage of no dtype": (b"(" + of("storage") + of("f") + of("0") + of("cpu") + of(4) + b"tQ", "refused"),
    "a persistent id of text": (of("0") + b"Q", "refused"),
    "a persistent id that is short": (b"NN\x86Q", "damaged"),
    "a storage that is a list": (tensor(held=b"]"), "treats a list as a ndarray"),
    "a storage that is a tensor": (tensor(held=tensor((2, 2), (2, 1))), "not a plain view"),
    "a storage with gaps": (tensor((2,), (1,), held=tensor((2,), (2,))), "not a plain view"),
    "an offset beyond": (tensor(offset=1), "reaches beyond its storage of 4"),
    "an offset below": (tensor(offset=-1), "impossible"),
    "a shape beyond": (tensor((5,)), "reaches beyond"),
    "a shape far beyond": (tensor((2**47,) * 8, (1,) * 8), "reaches beyond"),
    "a shape that is negative": (tensor((-4,)), "impossible"),
    "a shape of fractions": (tensor((4.0,)), "impossible"),
    "a shape of truths": (tensor((True,)), "impossible"),
    "a shape that is a list": (tensor([4]), "treats a list as a tuple"),
    "strides beyond": (tensor((2,), (4,)), "reaches beyond"),
    "strides that are negative": (tensor((2,), (-1,)), "impossible"),
    "strides that multiply": (tensor((5, 4), (0, 1)), "reaches beyond"),
    "strides that multiply enormously": (tensor((2**47,), (0,)), "reaches beyond"),
    "nothing, enormously": (tensor((0, 2**47, 2**47), (1, 1, 1)), "damaged"),
    "more strides than sizes": (tensor((4,), (1, 1)), "1 sizes and 2 strides"),
    "nine axes": (tensor((1,) * 9, (1,) * 9), "9 sizes"),
    "a tensor with a sign bit set aside": (tensor(rest=b"\x89}" + mapping(neg=b"\x88")), "not a plain view"),
    "a tensor of too few arguments": (named("torch._utils._rebuild_tensor") + b")R", "damaged"),
    "a dict of arguments": (named("collections.OrderedDict") + b"]\x85R", "damaged"),
    "a size that is a tensor": (named("torch.Size") + tensor() + b"\x85R", "treats a ndarray as a tuple"),
    "a parameter of text": (named("torch._utils._rebuild_parameter") + of("x") + b"NN\x87R", "a str as a ndarray"),
    "complex numbers": (tensor(held=storage(kind="torch.ComplexFloatStorage")), "holds a torch.ComplexFloatStorage"),
}  # fmt: skip


@pytest.mark.parametrize("defect", PICKLES)
def test_pickle_that_harms(defect, tmp_path):
    code, message = PICKLES[defect]
    refused(tmp_path / "x.ckpt", checkpoint(code), message)


def test_one_tensor_a_thousand_times(tmp_path):
    """A file of 10 kB that would be written out again as 4 MB; at full size, 4 GB as terabytes."""
    shared = tensor((1024,), held=storage(count=1024)) + b"q\0"
    code = shared + b"}(" + b"".join(of(str(i)) + b"h\0" for i in range(1000)) + b"u"
    refused(tmp_path / "x.ckpt", checkpoint(code, data=bytes(4096)), "shares its parts so often")


@pytest.mark.parametrize("limit", ["_MAX_PICKLE", "_MAX_OPCODES", "_MAX_MEMBERS"])
def test_limits(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(bdm_jax.formats.pickles, limit, 3)
    refused(tmp_path / "x.ckpt", checkpoint(GOOD), "at most 3|more than 3|4 members")


# Damage.


def damaged(rng, content, other):
    """One of: flipped bytes, an end cut off, a range moved, dropped or taken from another file, a changed number."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(content)))
        length = int(rng.integers(1, 40))
        match rng.integers(7):
            case 0:
                content[at] = rng.integers(256)
            case 1:
                content[at] ^= 1 << int(rng.integers(8))
            case 2 if rng.random() < 0.3:
                del content[at + 1 :]
            case 3:
                begin = int(rng.integers(len(content)))
                content[at : at + length] = content[begin : begin + length]
            case 4:
                del content[at : at + length]
                content = content or bytearray(1)
            case 5:
                begin = int(rng.integers(len(other)))
                content[at:at] = other[begin : begin + length]
            case 6:
                width = int(rng.choice([1, 2, 4, 8]))
                number = int(rng.choice([0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1]))
                content[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(content)


def arrays_of(value):
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from arrays_of(part)
    elif isinstance(value, np.ndarray):
        yield value


def outcome(read, path, content):
    """Whether the file was read; every byte of what it gives is touched."""
    path.write_bytes(content)
    try:
        arrays = list(arrays_of(read(path)))
    except FileError as error:
        assert "\n" not in str(error)
        return False
    for array in arrays:
        assert not array.size or array.copy().nbytes <= len(content)
    ranges = {(array.__array_interface__["data"][0], array.nbytes) for array in arrays if array.size}
    assert sum(length for _, length in ranges) <= len(content)
    return True


def saved(value, protocol=2):
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:invalid escape")  # pickletools decodes an opcode before it is refused
def test_damaged_checkpoints(tmp_path, rng):
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(5, dtype=torch.bfloat16)}
    files = [
        checkpoint(mapping(a=tensor())),
        archive(members(mapping(a=tensor())), wide={}),
        saved(weights),
        saved({"state_dict": weights, "n": 1}, 4),
    ]
    codes = [
        mapping(a=tensor(), b=tensor((2, 2), (1, 2)), n=of(3)),
        mapping(state_dict=mapping(c=tensor()), n=of([1, ""])),
    ]
    path = tmp_path / "x.ckpt"
    assert all(outcome(state_dict, path, content) for content in [*files, *map(checkpoint, codes)])
    read = [0, 0]
    for index in range(800):
        content = files[index % len(files)]
        read[0] += outcome(read_checkpoint, path, damaged(rng, content, files[index // 4 % len(files)]))
    for index in range(800):  # the pickle alone, inside an archive that is in order: the damage gets further
        read[1] += outcome(state_dict, path, checkpoint(damaged(rng, codes[index % 2], codes[index // 2 % 2])))
    print(f"of 800 checkpoints {read[0]} were read, of 800 whose pickle is damaged {read[1]}")
    assert all(0 < count < 800 for count in read)  # else they were damaged too much or not at all


def test_damaged_safetensors(tmp_path, rng):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(5, np.float16)
    write_safetensors(tmp_path / "1", {"a": a, "b": b, "e": b[:0]}, {"format": "pt"})
    write_safetensors(tmp_path / "2", {"x.y": a[0], "s": np.array(True)}, {})
    files = [(tmp_path / name).read_bytes() for name in "12"]
    path = tmp_path / "x.safetensors"
    assert all(outcome(read_safetensors, path, content) for content in files)
    read = 0
    for index in range(1200):
        read += outcome(read_safetensors, path, damaged(rng, files[index % 2], files[1 - index % 2]))
    print(f"of 1200 damaged safetensors files {read} were read")
    assert 0 < read < 1200
