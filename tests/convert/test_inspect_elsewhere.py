"""inspect of what lies on a hub or behind a link: the same report as of the file here, from its headers alone."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from bdm_jax.convert.__main__ import main
from bdm_jax.convert.inspection import describe
from huggingface_hub import constants

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats import outlines
from bdm_jax.formats.files import write_safetensors
from bdm_jax.paths import DEMO


def here(path, where):
    """The report of a file here, as that of one elsewhere must be."""
    report = describe(path)
    assert not report["not_finite"]
    return {**report, "path": where, "headers_only": True}


def test_a_pipeline(hub):
    """The bundled demo: 45 MB, of which headers, configs and tokenizers are read."""
    hub.add("art/demo", DEMO)
    assert describe("art/demo") == here(DEMO, "art/demo")
    assert hub.bytes_sent() < 3e6
    assert all(one.range for one in hub.log if one.sent and one.path.endswith(".safetensors"))
    assert not any(one.path.endswith(".safetensors") and one.sent > 300_000 for one in hub.log)
    sent = hub.bytes_sent()
    assert describe("art/demo:unet") == here(DEMO / "unet", "art/demo:unet")
    assert hub.bytes_sent() - sent < 300_000, "of one folder of it that alone"


@pytest.fixture(scope="module")
def lora():
    """A LoRA of 2 MB in kohya's names, with strengths, by which it is understood."""
    rng, tensors = np.random.default_rng(0), {}
    for block in range(4):
        name = f"lora_unet_down_blocks_0_attentions_{block % 2}_transformer_blocks_0_attn{1 + block // 2}_to_q"
        tensors[f"{name}.alpha"] = np.float32(4)
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((8, 8192)).astype(np.float16)
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((32768, 8)).astype(np.float16)
    return tensors


def test_a_single_file_and_a_link(hub, lora, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "ink.safetensors", lora, {"made": "by a test"})
    data = (tmp_path / "ink.safetensors").read_bytes()
    expected = here(tmp_path / "ink.safetensors", "art/ink")
    assert expected["contents"].startswith("LoRA (kohya)") and len(data) > 1 << 20
    hub.add("art/ink", {"ink.safetensors": data})
    assert describe("art/ink") == expected
    hub.plain["/ink.safetensors"] = data
    assert describe(f"{hub.url}/ink.safetensors") == {**expected, "path": f"{hub.url}/ink.safetensors"}
    assert hub.bytes_sent() < len(data)
    hub.ranges = False
    with pytest.raises(FileError, match="ink.safetensors: its server gives files only as a whole: fetch it"):
        describe("art/ink")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^art/ink: no such file or folder here, and HF_HUB_OFFLINE keeps the hub from"):
        describe("art/ink")


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint(hub, tmp_path, shared):
    """PyTorch's .bin, as BDM1.0 and Chinese-CLIP are: its members are small ones and large ones."""
    unet = {f"down_blocks.{i}.resnets.0.conv1.weight": torch.randn(128 * 4**i, 32, 3, 3) for i in range(3)}
    unet |= {f"down_blocks.{i}.resnets.0.conv1.bias": torch.randn(64) for i in range(3)}
    if shared:
        unet["mid_block.x.weight"] = unet["down_blocks.0.resnets.0.conv1.weight"][:10]
    torch.save({"state_dict": unet}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    hub.add("art/unet", {"x.bin": data})
    assert describe("art/unet") == here(tmp_path / "x.bin", "art/unet")
    assert hub.bytes_sent() < len(data) / 2


def test_a_directory_longer_than_what_is_read_first(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(outlines, "_TAIL", 4096)
    tensors = {f"x.{i}": torch.zeros(40) for i in range(200)}
    torch.save({**tensors, "large": torch.zeros(1 << 19)}, tmp_path / "x.bin")
    hub.add("art/many", {"x.bin": (tmp_path / "x.bin").read_bytes()})
    assert describe("art/many") == here(tmp_path / "x.bin", "art/many")


def test_scaled_weights(hub, tmp_path):
    """fp8 with scales, which are multiplied in: it is told apart by tensors of a single value."""
    tensors = {f"down_blocks.{i}.x.weight": np.ones((1024, 1024), ml_dtypes.float8_e4m3fn) for i in range(3)}
    tensors |= {f"down_blocks.{i}.x.scale_weight": np.float32(2) for i in range(3)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    hub.add("art/fp8", {"x.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    assert describe("art/fp8") == here(tmp_path / "x.safetensors", "art/fp8")


def bad(kind, data):
    length = int.from_bytes(data[:8], "little")
    if kind == "truncated":
        return data[:-100]
    if kind == "not JSON":
        return data[:8] + b"x" * length + data[8 + length :]
    if kind == "a page":
        return b"<html>" + bytes(2 << 20)
    if kind == "a long header":
        return (2**40).to_bytes(8, "little") + data[8:]
    if kind == "code":
        return pickle.dumps(print, 2) + bytes(2 << 20)
    assert kind == "a broken zip"
    return b"PK\3\4" + bytes(2 << 20)


@pytest.mark.parametrize("kind", ["truncated", "not JSON", "a page", "a long header", "code", "a broken zip"])
def test_what_is_refused_here_is_refused_there(hub, lora, tmp_path, kind):
    """By the same readers, in the same words."""
    write_safetensors(tmp_path / "x.safetensors", lora, {})
    (tmp_path / "y.safetensors").write_bytes(bad(kind, (tmp_path / "x.safetensors").read_bytes()))
    hub.add("art/bad", {"y.safetensors": (tmp_path / "y.safetensors").read_bytes()})
    with pytest.raises(FileError) as expected:
        describe(tmp_path / "y.safetensors")
    with pytest.raises(FileError) as found:
        describe("art/bad")
    assert str(found.value) == str(expected.value).replace(str(tmp_path / "y.safetensors"), "art/bad")


def test_what_the_cache_has_is_not_asked_for(hub, lora, tmp_path):
    from bdm_jax.systems.fetch import local

    write_safetensors(tmp_path / "ink.safetensors", lora, {})
    hub.add("art/ink", {"ink.safetensors": (tmp_path / "ink.safetensors").read_bytes()})
    local("art/ink")
    hub.log.clear()
    assert describe("art/ink")["tensors"] == len(lora) and not hub.fetched()


def test_the_command(hub, lora, tmp_path, capsys):
    write_safetensors(tmp_path / "ink.safetensors", lora, {})
    hub.add("art/ink", {"ink.safetensors": (tmp_path / "ink.safetensors").read_bytes()})
    assert main(["inspect", "art/ink", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "art/ink"
    assert main(["inspect", "art/nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: art/nothing: no such file or folder here, and no such model on ")
    assert main(["to-torch", "art/ink:ink.safetensors", str(tmp_path / "copy.safetensors")]) == 0
    assert (tmp_path / "copy.safetensors").is_file()
