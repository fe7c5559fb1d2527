"""Safe reading and atomic writing of safetensors, against the reference implementation and against damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bdm_jax.errors import FileError
from bdm_jax.formats.files import read_header, read_json, read_safetensors, write_json, write_safetensors
from bdm_jax.paths import atomic_file


@pytest.fixture
def tensors(rng):
    values = rng.standard_normal((3, 4, 5)).astype(np.float32)
    return {
        "a.weight": values,
        "b.weight": values.astype(np.float16),
        "c.weight": values.astype(ml_dtypes.bfloat16),
        "编号": np.arange(7, dtype=np.int64),
        "flag": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": values.transpose(2, 0, 1),
    }


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.shape == theirs[name].shape
        assert array.tobytes() == theirs[name].tobytes(), name


def test_what_is_written_is_what_safetensors_reads(tensors, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    same(safetensors.numpy.load_file(tmp_path / "x.safetensors"), tensors)
    assert read_header(tmp_path / "x.safetensors")[1] == {"format": "pt"}


def test_what_safetensors_writes_is_read(tensors, tmp_path):
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"step": "3"})
    same(read_safetensors(tmp_path / "x.safetensors"), tensors)
    assert read_header(tmp_path / "x.safetensors")[1] == {"step": "3"}


def test_same_tensors_same_bytes(tensors, tmp_path):
    write_safetensors(tmp_path / "x", tensors, {"a": "1", "b": "2"})
    write_safetensors(tmp_path / "y", dict(reversed(tensors.items())), {"b": "2", "a": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_file_of_no_tensors(tmp_path):
    write_safetensors(tmp_path / "x", {}, {})
    assert read_safetensors(tmp_path / "x") == {}


def raw(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "empty": b"",
    "shorter than its length field": b"\1\0\0",
    "header beyond the end": raw({"a": entry()}, length=10**6),
    "header bomb": raw({"a": entry()}, length=2**62),
    "not JSON": raw(b"{]"),
    "not UTF-8": raw(b"\xff\xfe\xfd\xfc"),
    "deep nesting": raw(b"[" * 100_000),
    "not an object": raw([1, 2]),
    "duplicate name": raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)),
    "truncated data": raw({"a": entry()}, data=b"\0" * 7),
    "trailing bytes": raw({"a": entry()}, data=b"\0" * 9),
    "overlap": raw({"a": entry(), "b": entry(begin=4, end=12)}, data=b"\0" * 12),
    "gap": raw({"a": entry(begin=4, end=12)}, data=b"\0" * 12),
    "lying shape": raw({"a": entry(shape=(3,))}),
    "shape whose size overflows": raw({"a": entry(shape=(2**40, 2**40))}),
    "negative shape": raw({"a": entry(shape=(-1, -2))}),
    "fractional shape": raw({"a": entry(shape=(2.0,))}),
    "boolean offsets": raw({"a": entry(begin=False, end=8)}),
    "unknown dtype": raw({"a": entry(dtype="F8_E4M3")}),
    "dtype that is a list": raw({"a": entry(dtype=["F32"])}),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}),
    "entry that is a number": raw({"a": 3}),
    "metadata that is a list": raw({"__metadata__": ["x"], "a": entry()}),
    "metadata of numbers": raw({"__metadata__": {"x": 3}, "a": entry()}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(FileError, match="x.safetensors") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_named_alone(tmp_path):
    """What its first bytes would be as a header's length says nothing; where the kind is unknown it does."""
    path = tmp_path / "a.safetensors"
    for head, said in (
        (b"\x89PNG\r\n\x1a\n", "not a safetensors file but a picture (PNG)"),
        (b"\xff" * 8, f"not a safetensors file, or a truncated one (header of {2**64 - 1} bytes)"),
    ):
        path.write_bytes(head + bytes(32))
        with pytest.raises(FileError) as error:
            read_safetensors(path)
        assert str(error.value) == f"{path}: {said}"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match="nowhere.safetensors.*No such file"):
        read_safetensors(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileError, match="config.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}', "\xff"])
def test_json_that_is_not_one_object(text, tmp_path):
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(FileError, match="config.json"):
        read_json(tmp_path / "config.json")


def test_nothing_half_written(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert read_json(path) == {"old": 1}
    assert list(path.parent.iterdir()) == [path]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file/x.json: cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(FileError, match="w has dtype complex64"):
        write_safetensors(tmp_path / "x", {"w": np.zeros(1, np.complex64)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\nb\x1b[31m", "x" * 10**5, "a\ud800"])
def test_names_of_a_file_cannot_write_to_the_terminal(name, tmp_path):
    header = json.dumps({name: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(FileError) as error:
        read_header(tmp_path / "x.safetensors")
    text = str(error.value)
    assert text.isprintable() and len(text) < 600


def test_a_large_header_with_a_name_twice_is_refused_at_once(tmp_path):
    """Linear in the names: quadratic, these 200,000 take minutes."""
    pairs = [f'"{i}":{{}}' for i in range(200_000)] + ['"7":{}']
    header = ("{" + ",".join(pairs) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="names 7 twice"):
        read_header(tmp_path / "x.safetensors")
