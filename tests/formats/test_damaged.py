"""Thousands of damaged checkpoints: each gives one line or the same values as PyTorch reads."""

import io

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import archive, chain, checkpoint, in_chain, mapping, members, of, tensor

from bdm_jax.errors import FileError
from bdm_jax.formats.files import read_safetensors, write_safetensors
from bdm_jax.formats.pickles import read_checkpoint, state_dict


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


def legacy_saved(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def saved(value, protocol=2):
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:invalid escape")  # pickletools decodes an opcode before it is refused
def test_damaged_checkpoints(tmp_path, rng):
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(5, dtype=torch.bfloat16)}
    eights = {"a": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 4).t()}
    files = [
        saved(eights),
        legacy_saved({"module": weights}),
        legacy_saved(eights),
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
    read = [0, 0, 0]
    for index in range(800):
        content = files[index % len(files)]
        read[0] += outcome(read_checkpoint, path, damaged(rng, content, files[index // 4 % len(files)]))
    wrapped = [in_chain(code) for code in codes]
    for index in range(800):  # the pickle alone, inside an archive that is in order: the damage gets further
        read[1] += outcome(state_dict, path, checkpoint(damaged(rng, codes[index % 2], codes[index // 2 % 2])))
        read[2] += outcome(state_dict, path, chain(damaged(rng, wrapped[index % 2], wrapped[index // 2 % 2])))
    print(f"of 800 checkpoints {read[0]} were read, of 800 whose pickle is damaged {read[1]}, of 800 chains {read[2]}")
    assert all(0 < count < 800 for count in read)  # else they were damaged too much or not at all


def test_damaged_safetensors(tmp_path, rng):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(5, np.float16)
    write_safetensors(tmp_path / "1", {"a": a, "b": b, "e": b[:0]}, {"format": "pt"})
    eight = np.arange(5, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    write_safetensors(tmp_path / "2", {"x.y": a[0], "s": np.array(True), "e": eight}, {})
    files = [(tmp_path / name).read_bytes() for name in "12"]
    path = tmp_path / "x.safetensors"
    assert all(outcome(read_safetensors, path, content) for content in files)
    read = 0
    for index in range(1200):
        read += outcome(read_safetensors, path, damaged(rng, files[index % 2], files[1 - index % 2]))
    print(f"of 1200 damaged safetensors files {read} were read")
    assert 0 < read < 1200
