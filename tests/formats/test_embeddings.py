"""Every format of a Textual Inversion embedding, written here as its trainer writes it, gives the same vectors."""

import base64
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from bdm_jax.errors import FileError
from bdm_jax.formats import embeddings
from bdm_jax.formats.embeddings import read_embeddings

SHARED = Path(__file__).parents[3] / "shared" / "data"
WIDTH = 12


@pytest.fixture
def vectors(rng):
    return torch.from_numpy(rng.standard_normal((3, WIDTH), np.float32))


def web_ui(vectors, **more):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, **more}


def named(vectors):
    return web_ui(vectors, name="birb", step=3, sd_checkpoint="abc", sd_checkpoint_name=None)


def modules(vectors):
    """The original trainer keeps its parameters in a torch module and saves that."""
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}


def as_json(value):
    return json.dumps(value, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}).encode()


def chunk(path, vectors):
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(as_json(named(vectors))))
    Image.new("RGB", (8, 8), (200, 10, 90)).save(path, pnginfo=info)


def pixels(path, vectors, height=16, image_format="PNG", **options):
    """The low four bits of what lies left of the preview and right of it, one number of the fixed sequence on each."""
    data = np.frombuffer(zlib.compress(as_json(named(vectors))), np.uint8)
    size = -(-len(data) // (3 * height)) * 3 * height
    data = np.concatenate([data, np.full(size - len(data), 77, np.uint8)])
    state, noise = 0, []
    for _ in range(size):
        state = (state * 1664525 + 1013904223) % 2**32
        noise.append(state % 255)
    assert noise[:6] == [253, 242, 127, 44, 157, 27]
    low, high = (part ^ (np.array(noise, np.uint8) & 15) | 0xA0 for part in (data & 15, data >> 4))
    low, high = low.reshape(height, -1, 3), high.reshape(height, -1, 3)
    black, preview = np.zeros((height, 1, 3), np.uint8), np.full((height, 9, 3), 133, np.uint8)
    picture = np.concatenate([low, black, preview, black, high], axis=1).astype(np.uint8)
    Image.fromarray(np.pad(picture, ((2, 1), (3, 2), (0, 0)))).save(path, image_format, **options)


FORMATS = {
    "diffusers.bin": ("<birb>", lambda path, v: torch.save({"<birb>": v}, path)),
    "diffusers.safetensors": ("<birb>", lambda path, v: save_file({"<birb>": v}, path)),
    "web-ui.pt": ("birb", lambda path, v: torch.save(named(torch.nn.Parameter(v)), path)),
    "chunk.png": ("birb", chunk),
    "pixels.png": ("birb", pixels),
    "pixels.webp": ("birb", lambda path, v: pixels(path, v, image_format="WEBP", lossless=True)),
    "ldm.pt": (None, lambda path, v: torch.save(web_ui(v) | {"string_to_token": {"*": torch.tensor(265)}}, path)),
    "ldm-modules.pt": (None, lambda path, v: torch.save(modules(v), path)),
    "kohya.safetensors": (None, lambda path, v: save_file({"emb_params": v}, path)),
    "kohya.pt": (None, lambda path, v: torch.save({"emb_params": v}, path)),
    "star.pt": (None, lambda path, v: torch.save({"*": v}, path)),
    "tensor.pt": (None, lambda path, v: torch.save(v, path)),
}


@pytest.mark.parametrize("file", FORMATS)
def test_every_format(file, vectors, tmp_path):
    name, write = FORMATS[file]
    write(tmp_path / file, vectors)
    (found,) = read_embeddings(tmp_path / file)
    assert found.name == name and list(found.vectors) == [""]
    assert found.vectors[""].dtype == np.float32
    np.testing.assert_array_equal(found.vectors[""], vectors.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_one_axis(dtype, vectors, tmp_path):
    torch.save({"<birb>": vectors[0].to(dtype)}, tmp_path / "birb.bin")
    save_file({"<birb>": vectors[0].to(dtype)}, tmp_path / "birb.safetensors")
    for file in ("birb.bin", "birb.safetensors"):
        (found,) = read_embeddings(tmp_path / file)
        np.testing.assert_array_equal(found.vectors[""], vectors[:1].to(dtype).float().numpy())


def test_sdxl(vectors, tmp_path):
    """kohya's one file has both towers' vectors; diffusers' second file is like its first, but wider."""
    save_file({"clip_l": vectors, "clip_g": torch.ones(3, 2 * WIDTH)}, tmp_path / "style.safetensors")
    save_file({"<birb>": torch.ones(3, 2 * WIDTH)}, tmp_path / "learned_embeds_2.safetensors")
    (both,) = read_embeddings(tmp_path / "style.safetensors", ("clip_l", "clip_g"))
    assert both.name is None
    assert {tower: rows.shape for tower, rows in both.vectors.items()} == {
        "clip_l": (3, WIDTH),
        "clip_g": (3, 2 * WIDTH),
    }
    (second,) = read_embeddings(tmp_path / "learned_embeds_2.safetensors")
    assert second.name == "<birb>" and second.vectors[""].shape == (3, 2 * WIDTH)


def test_several_tokens(vectors, tmp_path):
    save_file({"<a>": vectors, "<b>": vectors[1].clone(), "unet:0:up": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    found = read_embeddings(tmp_path / "lora.safetensors")
    assert {inversion.name: inversion.vectors[""].shape for inversion in found} == {
        "<a>": (3, WIDTH),
        "<b>": (1, WIDTH),
    }


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("textual-inversion/fastai-diffusion-nbs.learned_embeds.bin", ["<birb-style>"]),
        ("lora/cloneofsimo/lora_disney.safetensors", ["<s1>", "<s2>"]),
        ("lora/cloneofsimo/lora_disney_inpainting.safetensors", ["<s1>", "<s2>"]),
    ],
)
def test_real_files(file, names):
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is not here")
    found = read_embeddings(SHARED / file)
    assert sorted(inversion.name for inversion in found) == names
    assert all(inversion.vectors[""].shape == (1, 768) for inversion in found)
    if len(names) == 1:
        np.testing.assert_allclose(np.linalg.norm(found[0].vectors[""]), 3.01, atol=0.01)


NONE = torch.zeros(0, WIDTH)
BAD = {
    "no tensors": (lambda v: {}, "no embedding, but nothing"),
    "a list": (lambda v: [v], "no embedding, but a list"),
    "no vectors": (lambda v: {"<a>": NONE}, r"<a> is of shape \(0, 12\)"),
    "three axes": (lambda v: {"<a>": v[None]}, r"<a> is of shape \(1, 3, 12\); expected vectors"),
    "a text": (lambda v: {"<a>": "b"}, "<a> is a str"),
    "whole numbers": (lambda v: {"<a>": v.long()}, "of int64; expected floating-point"),
    "not finite": (lambda v: {"<a>": v * torch.nan}, "not finite"),
    "beyond float32": (lambda v: {"<a>": v.double() * 1e300}, "not finite"),
    "many": (lambda v: {"<a>": torch.ones(4097, 1)}, "has 4097 vectors; at most 4096"),
    "a network": (lambda v: {"conv.weight": v, "conv.bias": v[0]}, "conv.weight belongs to no embedding"),
    "more than a web UI's": (lambda v: {**web_ui(v), "other": v}, "other belongs to no embedding"),
    "two parameters": (lambda v: {"string_to_param": {"*": v, "+": v}}, "holds 2 parameters"),
    "no parameters": (lambda v: {"string_to_param": 3}, "holds no parameters"),
    "a strange name": (lambda v: web_ui(v, name=5), "its name is a int"),
    "a third tower": (lambda v: {"clip_l": v, "t5": v}, "t5 belongs to no embedding"),
    "a bare LoRA": (lambda v: {"unet:0:up": v}, "a LoRA file without tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_named(case, vectors, tmp_path):
    make, message = BAD[case]
    torch.save(make(vectors), tmp_path / "x.pt")
    with pytest.raises(FileError, match=message) as caught:
        read_embeddings(tmp_path / "x.pt", ("clip_l", "clip_g"))
    assert str(caught.value).startswith(f"{tmp_path / 'x.pt'}: ") and "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_hostile_files(vectors, tmp_path, monkeypatch, capsys):
    def refused(message, path=tmp_path / "x.pt"):
        with pytest.raises(FileError, match=message) as caught:
            read_embeddings(path)
        assert "\n" not in str(caught.value)

    refused("cannot be read", tmp_path / "nothing.pt")
    torch.save({"<a>": Evil()}, tmp_path / "x.pt")
    refused("would run")
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"<a>": Evil()}))
    refused("not a safetensors file")
    assert capsys.readouterr().out == ""
    (tmp_path / "x.pt").write_bytes(b"")
    refused("not a safetensors file")
    chunk(tmp_path / "whole.png", vectors)
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:60])
    refused("damaged picture")
    (tmp_path / "x.pt").write_bytes(whole[:16] + struct.pack(">2L", 2**16, 2**16) + whole[24:])
    refused("damaged picture")
    monkeypatch.setattr(embeddings, "_MAX_FILE", 100)
    torch.save({"<a>": vectors}, tmp_path / "x.pt")
    refused("too large for an embedding")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"not base64!", "damaged picture"),
        (base64.b64encode(b"{"), "not the JSON of one"),
        (base64.b64encode(b"[" * 100_000), "not the JSON of one"),
        (base64.b64encode(b"[1]"), "no embedding, but a list"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}}'), "not the JSON of one"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [["a"]]}}}'), "expected floating-point numbers"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[NaN]]}}}'), "not finite"),
    ],
)
def test_hostile_texts_in_pictures(text, message, tmp_path):
    info = PngInfo()
    info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(FileError, match=message) as caught:
        read_embeddings(tmp_path / "x.png")
    assert "\n" not in str(caught.value)


def test_pictures_without_an_embedding(rng, tmp_path, monkeypatch):
    noise = rng.integers(1, 256, (32, 32, 3), np.uint8)
    striped = noise.copy()
    striped[:, [10, 20]] = 0
    for picture in (np.zeros_like(noise), noise | 1, striped | (striped > 0)):
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "x.png")
        with pytest.raises(FileError, match="no embedding in this picture$"):
            read_embeddings(tmp_path / "x.png")
    monkeypatch.setattr(embeddings, "_MAX_PIXELS", 100)
    with pytest.raises(FileError, match="32x32 pixels are too many to look into"):
        read_embeddings(tmp_path / "x.png")


def test_what_unfolds_is_bounded(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "_MAX_JSON", 100)
    pixels(tmp_path / "x.png", vectors)
    with pytest.raises(FileError, match="unfolds into more than 100 bytes"):
        read_embeddings(tmp_path / "x.png")
