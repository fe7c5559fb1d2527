"""Files made to harm: pickles that run commands, and archives that lie. Thousands of damaged ones: test_damaged.py."""

import io
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from checkpoints import (
    EMPTY,
    GOOD,
    Part,
    archive,
    chain,
    checkpoint,
    in_chain,
    mapping,
    members,
    named,
    of,
    refused,
    storage,
    tensor,
)

import bdm_jax.formats.pickles
from bdm_jax.errors import FileError
from bdm_jax.formats.pickles import read_checkpoint


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


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_is_run_by_a_chain(attack, tmp_path):
    canary = tmp_path / "canary"
    code = in_chain(ATTACKS[attack](f"touch {canary}"))
    refused(tmp_path / "x.pt", chain(code))
    for at in (1, 2, 4):  # in the place of another of its pickles
        parts = [of(value) for value in (1001, {"little_endian": True})] + [GOOD, of(["0"])]
        parts.insert(0, of(0x1950A86A20F9469CFC6C))
        parts[at] = code
        refused(tmp_path / "x.pt", b"".join(b"\x80\2" + part + b"." for part in parts))
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
        (legacy, "would run os.system: not a plain checkpoint, refused"),
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
    "no folder": (archive([Part(part.name[2:], part.data) for part in members(GOOD)]), "not in one folder"),
    "two folders": (archive([*members(GOOD), Part("y/a")]), "not in one folder"),
    "a folder in place of a member": (archive(changed(0, attributes=0x10)), "x/data.pkl lies on another disk, or is a"),
    "a member on another disk": (archive(changed(2, disk=1)), "x/data/0 lies on another disk"),
    "several disks": (archive(members(GOOD), disks=(1, 0, 4)), "speaks of several disks"),
    "a directory on another disk": (archive(members(GOOD), disks=(0, 1, 4)), "speaks of several disks"),
    "fewer members on this disk": (archive(members(GOOD), disks=(0, 0, 3)), "speaks of several disks"),
    "several disks in 64 bits": (archive(members(GOOD), wide={}, locator=(0, 2)), "speaks of several disks"),
    "another disk in 64 bits": (archive(members(GOOD), wide={}, locator=(1, 1)), "speaks of several disks"),
    "version 0": (archive(changed(3, data=b"0\n")), "x/version is 0, which PyTorch does not read either"),
    "version 11": (archive(changed(3, data=b"11\n")), "x/version is 11, which PyTorch"),
    "no number as version": (archive(changed(3, data=b"\x1b[31m")), "x/version is .*, which PyTorch"),
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


HEADS = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20}


@pytest.mark.parametrize("form", ["narrow", "wide"])
@pytest.mark.filterwarnings("ignore")
def test_what_pytorch_refuses_is_refused(form, tmp_path, rng):
    """Every byte of every header, changed: what is read here torch.load reads too, and as the same."""
    good = archive(members(GOOD), **({"wide": {}} if form == "wide" else {}))
    starts = [(found.start(), HEADS[sign]) for sign in HEADS for found in re.finditer(re.escape(sign), good)]
    path, read = tmp_path / "x.ckpt", 0
    for at in sorted({start + i for start, length in starts for i in range(length)}):
        for value in {0, 1, good[at] ^ 0x10, int(rng.integers(256))} - {good[at]}:
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                found = read_checkpoint(path)
            except FileError:
                continue
            theirs, read = torch.load(path, weights_only=True), read + 1
            assert found["a"].tobytes() == theirs["a"].numpy().tobytes() and found["n"] == theirs["n"], (at, value)
    assert read > 100  # dates and the like


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
    refused(tmp_path / "x.pt", chain(in_chain(code)))


def typed(kind="torch.float8_e4m3fn", held=None, size=(4,), offset=0):
    """A tensor of a type that has no storage of its own."""
    held = storage(kind="torch.storage.UntypedStorage") if held is None else held
    parts = held + of(offset) + of(size) + of((1,)) + b"\x89" + EMPTY + named(kind)
    return named("torch._utils._rebuild_tensor_v3") + b"(" + parts + b"tR"


TYPED = {
    "of another storage": (typed(held=storage()), "not a plain view of a storage of bytes"),
    "of a shape beyond": (typed(size=(5,)), "reaches beyond its storage of 4"),
    "of an offset beyond": (typed(offset=1), "reaches beyond"),
    "of bytes that do not fill it": (
        typed("torch.float32", storage(kind="torch.storage.UntypedStorage", count=3)),
        "not a plain view",
    ),
    "of another coding": (typed("torch.float8_e4m3fnuz"), "holds a torch.float8_e4m3fnuz"),
    "of blocks": (typed("torch.float4_e2m1fn_x2"), "holds a torch.float4_e2m1fn_x2"),
    "of a function": (typed("os.system"), "would run os.system"),
}


@pytest.mark.parametrize("defect", TYPED)
def test_8_bit_tensor_that_harms(defect, tmp_path):
    code, message = TYPED[defect]
    refused(tmp_path / "x.ckpt", checkpoint(code), message)
    refused(tmp_path / "x.pt", chain(in_chain(code)))


CHAINS = {
    "truncated": (chain(in_chain(GOOD))[:-1], "truncated: its storages end at"),
    "half": (chain(in_chain(GOOD))[:150], "damaged|more values"),
    "after the magic number": (chain(in_chain(GOOD))[:16], "damaged"),
    "followed by other bytes": (chain(in_chain(GOOD), rest=b"x"), "followed by other bytes"),
    "two files in one": (chain(in_chain(GOOD)) * 2, "followed by other bytes"),
    "two sizes": (chain(in_chain(GOOD), count=3), "the storage 0 has two sizes"),
    "an enormous size": (chain(in_chain(GOOD), count=2**63), "the storage 0 has two sizes"),
    "sizes that differ": (
        chain(in_chain(mapping(a=tensor(), b=tensor((2,), held=storage(count=2))))),
        "the storage 0 has two sizes",
    ),
    "more bytes than the file": (chain(in_chain(tensor(held=storage(count=2**40)))), "more bytes than the file"),
    "no storages": (chain(in_chain(GOOD), keys=()), "followed by other bytes|truncated"),
    "a storage twice": (chain(in_chain(GOOD), keys=("0", "0")), "or listed before"),
    "a storage of no tensor": (chain(in_chain(GOOD), keys=("0", "1")), "lists the storage 1"),
    "a storage that is not listed": (chain(in_chain(tensor(held=storage("7"))), b"", keys=(), rest=b""), "followed"),
    "keys that are none": (chain(in_chain(GOOD), keys=(0,)), "treats a int as a str"),
    "big-endian": (chain(in_chain(GOOD), little=False), "big-endian"),
    "another version": (chain(in_chain(GOOD), version=1000), "of an unknown version"),
    "a module": (chain(in_chain(b"(" + of("module") + of("x") + b"NNNtQ")), "names a module where a storage"),
    "a class of text": (chain(b"(" + of("module") + of("os.system") + b"NNtQ"), "treats a str as a Opaque"),
    "a class that is called": (
        chain(b"(" + of("module") + named("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") + b"NNtQ)R"),
        "would run pytorch_lightning",
    ),
    "a class that is not known": (chain(b"(" + of("module") + named("os.system") + b"NNtQ"), "would run os.system"),
    "a view beyond": (
        chain(tensor(held=storage()[:-2] + of(("v", 2, 3)) + b"tQ")),
        "a view reaches beyond the storage 0",
    ),
    "a view that is negative": (chain(tensor(held=storage()[:-2] + of(("v", -1, 3)) + b"tQ")), "impossible size"),
    "a view that is a list": (chain(tensor(held=storage()[:-2] + of(["v", 0, 3]) + b"tQ")), "treats a list as a tuple"),
}


@pytest.mark.parametrize("defect", CHAINS)
def test_chain_that_lies(defect, tmp_path):
    refused(tmp_path / "x.pt", *CHAINS[defect])


def test_the_chain_made_by_hand_is_read(tmp_path):
    """By torch too; and a view of a storage, as PyTorch 0.1 wrote them, gives the part."""
    path = tmp_path / "x.pt"
    path.write_bytes(chain(in_chain(GOOD)))
    found, theirs = read_checkpoint(path), torch.load(path, weights_only=True)
    assert found["a"].tobytes() == theirs["a"].numpy().tobytes() == bytes(range(16))
    assert found["b"]["c"].tobytes() == theirs["b"]["c"].contiguous().numpy().tobytes() and found["n"] == 3
    path.write_bytes(chain(tensor((3,), held=storage()[:-2] + of(("v", 1, 3)) + b"tQ")))
    assert read_checkpoint(path).tobytes() == torch.load(path, weights_only=True).numpy().tobytes()


def test_one_tensor_a_thousand_times(tmp_path):
    """A file of 10 kB that would be written out again as 4 MB; at full size, 4 GB as terabytes."""
    shared = tensor((1024,), held=storage(count=1024)) + b"q\0"
    code = shared + b"}(" + b"".join(of(str(i)) + b"h\0" for i in range(1000)) + b"u"
    refused(tmp_path / "x.ckpt", checkpoint(code, data=bytes(4096)), "shares its parts so often")


@pytest.mark.parametrize("limit", ["_MAX_PICKLE", "_MAX_OPCODES", "_MAX_MEMBERS"])
def test_limits(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(bdm_jax.formats.pickles, limit, 3)
    refused(tmp_path / "x.ckpt", checkpoint(GOOD), "at most 3|more than 3|4 members")
