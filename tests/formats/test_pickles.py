"""PyTorch checkpoints read without torch: bit for bit what torch.load(weights_only=True) gives, and no copy of it."""

import pickle
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bdm_jax.errors import FileError
from bdm_jax.formats.files import read_safetensors
from bdm_jax.formats.pickles import Opaque, is_checkpoint, read_checkpoint, state_dict
from bdm_jax.formats.weights import read_weights

EMBEDDING = Path(__file__).parents[3] / "shared/data/textual-inversion/fastai-diffusion-nbs.learned_embeds.bin"

DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


def traced(path):
    """What is read from a file, and the most bytes that Python held meanwhile."""
    tracemalloc.start()
    try:
        return state_dict(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def same(ours, theirs):
    """Values, types, shapes and strides are equal, bit for bit, all the way down."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach()
        assert ours.dtype == DTYPES[theirs.dtype] and ours.shape == tuple(theirs.shape) and not ours.flags.writeable
        if ours.size:
            assert tuple(stride // ours.itemsize for stride in ours.strides) == theirs.stride()
        assert ours.tobytes() == theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(theirs, dict):
        assert type(ours) is dict and list(ours) == list(theirs)
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list if isinstance(theirs, list) else tuple) and len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            same(our, their)
    else:
        assert type(ours) is type(theirs) and ours == theirs


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))


def trained():
    """A network, and its optimizer after one step (the suite turns gradients off)."""
    net = network()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    return net, optimizer


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 6, 5, generator=generator)
    net, optimizer = trained()
    return {
        "dtypes": {str(dtype): (base * 50).to(dtype) for dtype in DTYPES},
        "special floats": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "parameter": torch.nn.Parameter(base),
        "module": net.state_dict(),
        "shared storage": [base, base[1], base[:, 2:4], base.view(-1)],
        "views": [base.t() if base.ndim == 2 else base.permute(2, 0, 1), base[::2, 1::3], base[1:2, :, 3], base[0].t()],
        "expanded": {"within": base[0, 0].unfold(0, 2, 1)[:2]},
        "0-dim": torch.tensor(2.5),
        "0-dim view": base[1, 2, 3],
        "empty": [torch.zeros(0, 3), torch.zeros(2, 0, dtype=torch.bfloat16), base[4:]],
        "8 axes": torch.zeros(1, 1, 2, 1, 1, 1, 1, 3),
        "plain": [
            None,
            True,
            False,
            0,
            255,
            65535,
            -1,
            2**31,
            -(2**70),
            1.5,
            "",
            "编号 \U0001f3ee",
            (),
            (1,),
            (1, (2, 3)),
        ],
        "size": base.shape,
        "lightning": {"state_dict": net.state_dict(), "epoch": 3, "optimizer_states": [optimizer.state_dict()]},
        **{f"many.{i}": torch.full((1,), float(i)) for i in range(300)},  # more than 256: the long memo opcodes
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read(protocol, tmp_path, seed):
    path = tmp_path / "x.ckpt"
    torch.save(values(seed), path, pickle_protocol=protocol)
    assert is_checkpoint(path)
    # torch's own careful reader stops at protocol 3; this file was written a moment ago.
    same(read_checkpoint(path), torch.load(path, weights_only=protocol <= 3))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saved_before_zip_is_read(protocol, tmp_path, seed):
    path = tmp_path / "old.pt"
    saved = {**values(seed), "dtype": torch.float16}
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert is_checkpoint(path)
    found, theirs = read_checkpoint(path), torch.load(path, weights_only=protocol <= 3)
    assert found.pop("dtype") == np.float16 and theirs.pop("dtype")
    same(found, theirs)


def test_old_checkpoint_is_mapped(tmp_path):
    shared = torch.ones(1024, 1024)
    weights = {"a": shared, "b": shared.t(), "c": torch.ones(1024, 1024, dtype=torch.bfloat16)}
    torch.save({"state_dict": weights}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    read_checkpoint(tmp_path / "x.bin")
    found, peak = traced(tmp_path / "x.bin")
    assert peak < 2**23  # a pickle's bytes are not told beforehand: of the file's 6 MiB none twice at once
    assert np.shares_memory(found["a"], found["b"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_all_codes_of_8_bit_floats(kind, zipped, tmp_path):
    """Each of the 256 is the number that torch makes of it, in a checkpoint and in a safetensors file."""
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).view(16, 16)
    torch.save({"a": codes, "t": codes.t()}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    save_file({"a": codes}, tmp_path / "x.safetensors")
    found = state_dict(tmp_path / "x.pt")
    np.testing.assert_array_equal(found["t"].view(np.uint8), found["a"].view(np.uint8).T)
    for array in (found["a"], read_safetensors(tmp_path / "x.safetensors")["a"]):
        assert array.dtype.name == kind and not array.flags.writeable
        halves = (ml_dtypes.bfloat16, codes.bfloat16(), np.uint16)
        for ours, theirs, bits in ((np.float32, codes.float(), np.uint32), halves):
            nan = torch.isnan(theirs).numpy()
            made = np.array(array, ours)
            np.testing.assert_array_equal(np.isnan(made.astype(np.float32)), nan)
            expected = theirs.view(torch.uint8).numpy().view(bits)
            np.testing.assert_array_equal(made.view(bits)[~nan], expected[~nan])


@pytest.mark.parametrize("value", [torch.arange(5), [torch.ones(2)], network().state_dict(), {}, 3])
def test_whatever_is_saved_at_the_top(value, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    same(read_checkpoint(tmp_path / "x.pt"), value)


def test_a_dtype_and_a_bare_storage(tmp_path):
    torch.save({"dtype": torch.bfloat16, "storage": torch.arange(3).untyped_storage()}, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert found["dtype"] == ml_dtypes.bfloat16
    assert found["storage"].view(np.int64).tolist() == [0, 1, 2]


def test_reading_maps_the_file_and_copies_nothing(tmp_path):
    shared = torch.ones(1024, 1024)
    torch.save({"a": shared, "b": shared.t(), "c": torch.ones(1024, 1024, dtype=torch.bfloat16)}, tmp_path / "x.bin")
    read_checkpoint(tmp_path / "x.bin")
    found, peak = traced(tmp_path / "x.bin")
    assert peak < 2**18  # of a file of 6 MiB
    for array in found.values():
        while not isinstance(array, np.memmap):
            array = array.base
    assert np.shares_memory(found["a"], found["b"])


def test_training_state_of_stable_diffusion_is_never_made(tmp_path, monkeypatch):
    """SD 1.x checkpoints use Lightning's class as a key and keep NumPy scalars; none of them is needed for weights."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        score = {"monitor": "loss", "best_model_score": np.float64(0.5)}
        weights = {"model.diffusion_model.out.2.bias": torch.ones(4)}
        saved = {"epoch": 1, "state_dict": weights, "callbacks": {module.ModelCheckpoint: score}}
        torch.save(saved, tmp_path / "sd-v1-4-full-ema.ckpt")
    same(state_dict(tmp_path / "sd-v1-4-full-ema.ckpt"), weights)
    callbacks = read_checkpoint(tmp_path / "sd-v1-4-full-ema.ckpt")["callbacks"]
    key = Opaque("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    assert callbacks == {key: {"monitor": "loss", "best_model_score": Opaque("NumPy scalar")}}
    assert module.__name__ not in sys.modules


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "loss": torch.ones(1), "optimizer_states": [{}]},
        lambda weights: {"model": weights, "step": 10},
        lambda weights: {"model": {"state_dict": weights}, "args": {"lr": 0.1}},
        lambda weights: {"module": weights},
        lambda weights: {"params": {"x": torch.zeros(9)}, "params_ema": weights},
        lambda weights: weights | {"epoch": 3, "name": "branch", "best": None, "lr": 0.1},
    ],
    ids="plain lightning model nested deepspeed averaged numbers".split(),
)
def test_weights_are_found(wrap, tmp_path):
    weights = network().state_dict()
    torch.save(wrap(weights), tmp_path / "x.pth")
    same(state_dict(tmp_path / "x.pth"), dict(weights))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3, "name": "x"}, "no tensors by name, but a dict of epoch, name"),
        ({}, "no tensors by name"),
        ([torch.ones(1)], "no tensors by name, but a list"),
        (torch.ones(1), "no tensors by name, but a ndarray"),
        ({"a": torch.ones(1), "b": [1]}, "b is a list where a tensor by name is expected"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "b is a dict"),
        ({"a": torch.ones(1), 0: torch.ones(1)}, "0 is a ndarray where a tensor by name"),
    ],
)
def test_what_is_no_state_dict_is_named(value, message, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(FileError, match=f"x.pt: .*{message}"):
        state_dict(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_formats_that_are_not_read_say_what_to_do(tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}, 2))
    assert is_checkpoint(tmp_path / "old.pt")
    for read in (read_checkpoint, read_weights):
        with pytest.raises(FileError, match="old.pt: .*a bare pickle.* save it again with torch.save"):
            read(tmp_path / "old.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(FileError, match="program.pt: a TorchScript program.*save its state_dict"):
        read_checkpoint(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1, dtype=torch.complex64), "holds a torch.ComplexFloatStorage"),
        (network(), "would run torch.nn.modules.container.Sequential: not a plain checkpoint, refused"),
        ({1, 2}, "would run (__builtin__|builtins).set: not a plain checkpoint"),
        (torch.ones(3, dtype=torch.uint16), "holds a torch.uint16, which has no counterpart here"),
        (torch.ones(3).to(torch.float8_e4m3fnuz), "holds a torch.float8_e4m3fnuz, which has no counterpart"),
        (torch.ones(1).expand(1000), "reaches beyond its storage"),
    ],
)
def test_what_has_no_counterpart_is_named(value, message, tmp_path):
    torch.save({"a": value}, tmp_path / "x.pt")
    with pytest.raises(FileError, match=f"x.pt: .*{message}"):
        read_checkpoint(tmp_path / "x.pt")


def test_missing_file_is_named(tmp_path):
    for read in (is_checkpoint, read_checkpoint, state_dict):
        with pytest.raises(FileError, match="nowhere.pt: cannot be read .No such file"):
            read(tmp_path / "nowhere.pt")


def test_real_embedding():
    if not EMBEDDING.exists():
        pytest.skip(f"{EMBEDDING} is not here")
    same(state_dict(EMBEDDING), torch.load(EMBEDDING, weights_only=True))
