"""Models by name, against a hub on a local port with the real client library: what is fetched and what is said."""

import json
import os
import socket

import numpy as np
import pytest
from hub import TOKEN
from huggingface_hub import constants

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats import hub as names
from bdm_jax.formats.files import write_safetensors
from bdm_jax.formats.hub import HubName, is_remote, parse_name
from bdm_jax.paths import DEMO
from bdm_jax.systems.fetch import local, recorded
from bdm_jax.systems.folder import find_system

VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A safetensors file of some size, as bytes."""
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    values = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    write_safetensors(path, {"down.weight": values, "up.weight": values}, {})
    return path.read_bytes()


@pytest.fixture
def component(weights):
    """A component folder in every format and precision that people upload."""
    others = ("diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack", "model.onnx", "preview.png", "README.md")
    stem = "diffusion_pytorch_model"
    found = {name: b"not to be fetched" for name in (*others, f"{stem}.non_ema.safetensors")}
    found |= {f"{stem}.safetensors": weights, f"{stem}.fp16.safetensors": weights[:-4] + b"half"}
    return found | {"config.json": json.dumps(VAE).encode()}


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HubName("", "a/b")),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", HubName("", "stable-diffusion-v1-5/stable-diffusion-v1-5")),
        ("360Zhi_Nao/BDM1.0@v1.0", HubName("", "360Zhi_Nao/BDM1.0", "v1.0")),
        ("a/b@refs/pr/3:unet", HubName("", "a/b", "refs/pr/3", "unet")),
        ("a/b:models/image_encoder/", HubName("", "a/b", "main", "models/image_encoder")),
        ("a/b:水墨.safetensors", HubName("", "a/b", "main", "水墨.safetensors")),
        ("https://huggingface.co/a/b", HubName("", "a/b")),
        ("https://huggingface.co/a/b/blob/main/x%20y.pt?download=true", HubName("", "a/b", "main", "x y.pt")),
        ("https://huggingface.co/a/b/tree/v1/unet", HubName("", "a/b", "v1", "unet")),
        *(
            (text, None)
            for text in ("a", "/a/b", "./a/b", "a/b/c", "a/../b", "a/b:../c", "a--b/c", "a b/c", "C:/x", "")
        ),
        *(
            (text, None)
            for text in ("models/sd15.safetensors", "photos/cat.PNG", "https://example.org/a/b", "a/b@", "-a/b")
        ),
    ],
)
def test_what_a_text_is_by_its_form(text, expected):
    assert parse_name(text) == expected


def test_what_lies_here_wins(hub, tmp_path, monkeypatch):
    hub.add("a/b", {"x.safetensors": b"theirs"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_remote("a/b") and str(local("a/b")) == "a/b" and not hub.log


def test_of_a_pipeline_what_is_read(hub):
    """The bundled demo as a repository, with what others have beside it."""
    files = {path.relative_to(DEMO).as_posix(): path.read_bytes() for path in DEMO.rglob("*") if path.is_file()}
    junk = (
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "README.md",
        ".gitattributes",
    )
    junk += (
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "text_encoder/model.onnx",
    )
    junk += (
        "safety_checker/config.json",
        "feature_extractor/preprocessor_config.json",
        "text_encoder/flax_model.msgpack",
    )
    commit = hub.add("art/demo", {**files, **dict.fromkeys(junk, b"{}")})
    found = local("art/demo")
    assert below(found) == sorted(files)
    assert sorted(hub.fetched()) == sorted(files), "each once, and nothing else"
    for name, content in files.items():
        assert (found / name).read_bytes() == content
    assert find_system(found).networks.keys() == find_system(DEMO).networks.keys()
    assert recorded(found) == f"art/demo@{commit}"
    assert recorded(found / "unet") == f"art/demo@{commit}:unet"

    asked = len(hub.log)
    assert local("art/demo") == found and len(hub.log) == asked, "a process asks once"
    names_known = local.__globals__["_known"]
    names_known.clear()
    assert local("art/demo") == found
    assert [one.path for one in hub.log[asked:]] == ["/api/models/art/demo/revision/main"], (
        "another: for the commit only"
    )
    assert local(f"art/demo@{commit}") == found


def test_parts_that_are_replaced_are_not_fetched(hub, component):
    files = {f"{part}/{name}": data for part in ("unet", "vae") for name, data in component.items()}
    config = json.dumps({"_class_name": "UNet2DConditionModel"}).encode()
    hub.add("a/b", {**files, "unet/config.json": config, "model_index.json": b"{}"})
    assert below(local("a/b", without=("vae",))) == [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_one_format_and_one_precision(hub, component):
    hub.add("a/vae", component)
    assert below(local("a/vae", "vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    hub.log.clear()
    found = local("a/vae", "vae", variant="fp16")
    assert hub.fetched() == ["diffusion_pytorch_model.fp16.safetensors"]
    assert below(found)[1:] == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(
        FileError, match=r"^a/vae: no weights of the variant 'bf16' in it; there are the variants fp16, non_ema$"
    ):
        local("a/vae", variant="bf16")
    assert local("a/vae", "vae", variant="bf16") == found, "of a part by itself what it has"


def test_only_bin_where_there_is_no_other(hub, component):
    """As 360's branch and Chinese-CLIP were uploaded."""
    kept = {name: data for name, data in component.items() if not name.endswith(".safetensors")}
    hub.add("a/branch", kept)
    assert below(local("a/branch", "branch")) == ["config.json", "diffusion_pytorch_model.bin"]


def test_shards(hub, component, weights):
    index = {"weight_map": {"down.weight": "part-1.safetensors", "up.weight": "part-2.safetensors"}}
    shards = {"part-1.safetensors": weights, "part-2.safetensors": weights + b" ", "part-3.safetensors": b"no part"}
    files = {"config.json": component["config.json"], **shards}
    files["diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add("a/large", files)
    assert below(local("a/large", "vae")) == sorted(files.keys() - {"part-3.safetensors"})
    del files["part-2.safetensors"]
    hub.add("a/lost", files)
    with pytest.raises(FileError, match="^a/lost: .*index.json names part-2.safetensors, which it does not have$"):
        local("a/lost", "vae")
    index["weight_map"]["up.weight"] = "../../../etc/passwd"
    hub.add("a/bad", {**files, "diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(FileError, match="etc/passwd, which is no weight file in its folder"):
        local("a/bad", "vae")


def test_a_file_or_folder_of_a_repository(hub, component, weights):
    encoder = {"config.json": b'{"model_type": "clip_text_model"}', "model.safetensors": weights}
    files = {f"vae/{name}": data for name, data in component.items()} | {"ink.safetensors": weights}
    files |= {f"text_encoder/{name}": data for name, data in encoder.items()} | {"tokenizer/vocab.txt": b"a"}
    commit = hub.add("a/b", files)
    assert local("a/b:ink.safetensors").read_bytes() == weights
    assert hub.fetched() == ["ink.safetensors"]
    assert recorded(local("a/b:ink.safetensors")) == f"a/b@{commit}:ink.safetensors"
    assert local(f"{hub.url}/a/b/resolve/main/ink.safetensors") == local("a/b:ink.safetensors")
    assert below(local("a/b:vae", "vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    tower = local("a/b:text_encoder", "text_encoder")
    assert below(tower) == ["config.json", "model.safetensors"] and (tower.parent / "tokenizer" / "vocab.txt").is_file()
    with pytest.raises(UserError, match="^a/b:unet: no file or folder unet in it; it has ink.safetensors"):
        local("a/b:unet")
    with pytest.raises(UserError, match="^a/b: a whole system; for one part of it name its folder, as in a/b:vae$"):
        local("a/b", "vae")


def test_a_tokenizer_brings_no_weights(hub, component, weights):
    hub.add(
        "a/tower",
        {"vocab.txt": b"[CLS]", "config.json": b'{"model_type": "chinese_clip"}', "pytorch_model.bin": weights},
    )
    assert below(local("a/tower", "branch_tokenizer")) == ["vocab.txt"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "ink.png"),
            "pytorch_lora_weights.safetensors",
        ),
        (("learned_embeds.bin", "concept_images/1.jpeg", "token_identifier.txt"), "learned_embeds.bin"),
        (("ink.safetensors", "ink.fp16.safetensors"), "ink.safetensors"),
        (("a.safetensors", "pytorch_lora_weights.safetensors"), "pytorch_lora_weights.safetensors"),
        (("sub/deep.safetensors", "README.md"), "sub/deep.safetensors"),
    ],
)
def test_the_only_file(hub, weights, files, expected):
    hub.add("a/lora", dict.fromkeys(files, weights))
    assert local("a/lora").read_bytes() == weights and hub.fetched() == [expected]


def test_which_of_several_files(hub, weights):
    hub.add("a/many", {"a.safetensors": weights, "b.safetensors": weights})
    with pytest.raises(UserError, match=r"several files: name one, as in a/many:a.safetensors \(a.safetensors, b.safe"):
        local("a/many")
    hub.add("a/none", {"README.md": b""})
    with pytest.raises(UserError, match="^a/none: no weights that are read here; it holds README.md$"):
        local("a/none")


def test_what_is_refused_by_its_config_is_not_fetched(hub, weights):
    hub.add("a/flux", {"config.json": b'{"_class_name": "FluxTransformer2DModel"}', "model.safetensors": weights})
    with pytest.raises(
        UserError, match="^a/flux: config.json: 'FluxTransformer2DModel' is not a network this library has$"
    ):
        local("a/flux")
    hub.add(
        "a/sd3",
        {
            "model_index.json": b'{"_class_name": "StableDiffusion3Pipeline"}',
            "vae/config.json": b"{}",
            "vae/diffusion_pytorch_model.safetensors": weights,
        },
    )
    with pytest.raises(UserError, match="StableDiffusion3Pipeline, which this library does not have"):
        local("a/sd3")
    assert not [name for name in hub.fetched() if name.endswith("safetensors")]


def test_revisions(hub, weights):
    first = hub.add("a/b", {"x.safetensors": weights}, "v1.0")
    second = hub.add("a/b", {"x.safetensors": weights[:-1] + b"!"})
    assert first != second
    assert local("a/b@v1.0").read_bytes() == weights != local("a/b").read_bytes()
    assert local(f"a/b@{first}") == local("a/b@v1.0")
    with pytest.raises(UserError, match=f"^a/b@v2: {hub.url}/a/b has no revision v2$"):
        local("a/b@v2")


def test_the_same_content_is_not_fetched_for_another_commit(hub, weights):
    hub.add("a/b", {"x.safetensors": weights})
    local("a/b")
    hub.add("a/b", {"x.safetensors": weights, "README.md": b"new"})
    hub.log.clear()
    local.__globals__["_known"].clear()
    assert local("a/b").read_bytes() == weights and not hub.fetched()


def test_a_broken_transfer_goes_on(hub, weights):
    """Within a run, and in the next one: no byte is sent twice."""
    hub.add("a/b", {"x.safetensors": weights})
    hub.breaks["x.safetensors"] = [1000, 5000]
    assert local("a/b").read_bytes() == weights
    assert hub.bytes_sent() == len(weights)
    hub.add("a/c", {"y.safetensors": weights[:-1] + b"!"})
    hub.breaks["y.safetensors"] = [100_000] + [0] * 20
    with pytest.raises(
        FileError, match=r"^a/c: y.safetensors: .*cannot be reached \(.*\); what has come is kept, the same"
    ):
        local("a/c")
    hub.breaks.clear()
    hub.log.clear()
    assert local("a/c").read_bytes() == weights[:-1] + b"!"
    assert hub.bytes_sent() == len(weights) - 100_000


def test_a_server_without_ranges(hub, weights):
    hub.ranges = False
    hub.add("a/b", {"x.safetensors": weights})
    hub.breaks["x.safetensors"] = [1000]
    assert local("a/b").read_bytes() == weights


def test_a_wrong_digest(hub, weights, tmp_path):
    hub.add("a/b", {"x.safetensors": weights, "config.json": b"{}"})
    hub.wrong |= {"x.safetensors"}
    with pytest.raises(
        FileError, match=r"^a/b:x.safetensors: x.safetensors: what came has the digest \w{16}..., the hub gives"
    ):
        local("a/b:x.safetensors")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 200]
    hub.wrong = {"config.json"}
    with pytest.raises(FileError, match="config.json: what came has the digest"):
        local("a/b:config.json")
    hub.wrong.clear()
    assert local("a/b:x.safetensors").read_bytes() == weights


def test_a_damaged_rest_of_an_earlier_run(hub, weights):
    hub.add("a/b", {"x.safetensors": weights})
    hub.breaks["x.safetensors"] = [1000] + [0] * 20
    with pytest.raises(FileError):
        local("a/b")
    hub.breaks.clear()
    (part,) = names._storage("a/b").rglob("*.part")
    part.write_bytes(bytes(1000))
    assert local("a/b").read_bytes() == weights


def test_no_permission(hub, weights, monkeypatch):
    hub.add("a/gated", {"x.safetensors": weights})
    hub.add("a/private", {"x.safetensors": weights})
    hub.gated, hub.private = {"a/gated"}, {"a/private"}
    with pytest.raises(
        UserError,
        match=f"^a/gated: asks for consent to its terms: agree on {hub.url}/a/gated, then log in with "
        "`hf auth login`, or set HF_TOKEN$",
    ):
        local("a/gated")
    with pytest.raises(
        UserError, match=r"no such model on http.* \(for a private one log in with `hf auth login`, or set HF_TOKEN\)$"
    ):
        local("a/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert local("a/gated").read_bytes() == local("a/private").read_bytes() == weights
    elsewhere = [one for one in hub.log if one.path.startswith("/cdn/")]
    assert elsewhere and not any(one.token for one in elsewhere), "the token is for the hub alone"


@pytest.mark.parametrize("status", [403, 500, 429])
def test_other_answers(hub, status):
    hub.status = status
    said = "refuses it \\(status 403\\): log in" if status == 403 else f"is out of order \\(status {status}\\)"
    with pytest.raises(UserError, match=f"^a/b: .*{said}"):
        local("a/b")


def test_neither_here_nor_there(hub):
    with pytest.raises(UserError, match=f"^a/b: no such file or folder here, and no such model on {hub.url} "):
        local("a/b")


def test_no_network(hub, weights, monkeypatch):
    hub.add("a/b", {"x.safetensors": weights})
    found = local("a/b")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    local.__globals__["_known"].clear()
    with pytest.warns(
        UserWarning, match=f"^a/b: http://127.0.0.1:{port} cannot be reached .*; what the cache has is taken$"
    ):
        assert local("a/b") == found
    with pytest.raises(
        UserError, match=r"^a/c: no such file or folder here, and http://127.* cannot be reached \(.*\)$"
    ):
        local("a/c")


def test_offline(hub, component, monkeypatch):
    """HF_HUB_OFFLINE=1: the cache, or what it lacks; no request."""
    hub.add("a/vae", component)
    found = local("a/vae", "vae")
    hub.log.clear()
    local.__globals__["_known"].clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local("a/vae", "vae") == found
    with pytest.raises(
        UserError, match="^a/other: no such file or folder here, and HF_HUB_OFFLINE keeps the hub from being asked$"
    ):
        local("a/other")
    with pytest.raises(UserError, match=r"and the cache lacks \*.fp16.safetensors: fetch it once with a network$"):
        local("a/vae", variant="fp16")
    assert not hub.log


def test_offline_says_what_of_a_pipeline_is_missing(hub, component, monkeypatch):
    files = {f"{part}/{name}": data for part in ("unet", "vae") for name, data in component.items()}
    files["vae/diffusion_pytorch_model.safetensors"] += b"of the vae"
    files["unet/config.json"] = json.dumps({"_class_name": "UNet2DConditionModel"}).encode()
    index = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    hub.add("a/b", {**files, "model_index.json": json.dumps(index).encode()})
    hub.breaks["vae/diffusion_pytorch_model.safetensors"] = [1000] + [0] * 20
    with pytest.raises(FileError):
        local("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match="^a/b: HF_HUB_OFFLINE keeps the hub from being asked, and the cache lacks "
        r"vae/\*.safetensors: fetch it once with a network$",
    ):
        local("a/b")


def test_a_disk_that_is_too_small(hub, weights, monkeypatch):
    hub.add("a/b", {"x.safetensors": weights})
    monkeypatch.setattr(
        names.shutil, "disk_usage", lambda _: os.terminal_size((0, 1000)) and type("U", (), {"free": 1000})
    )
    with pytest.raises(
        FileError, match=r"^a/b: 0.0 GB are needed, 0.0 GB are free in .*: set HF_HOME to a folder on another disk$"
    ):
        local("a/b")


def test_names_that_would_leave_the_cache(hub, weights):
    hub.add("a/b", {"../../evil.safetensors": weights, "/etc/evil.safetensors": weights, "x.safetensors": weights})
    assert local("a/b").name == "x.safetensors"


def test_a_link(hub, weights, monkeypatch):
    hub.plain["/files/ink.safetensors"] = weights
    url = f"{hub.url}/files/ink.safetensors"
    found = local(f"{url}?token=secret")
    assert found.read_bytes() == weights and found.name == "ink.safetensors"
    assert recorded(found) == url, "without what may be a secret"
    local.__globals__["_known"].clear()
    hub.log.clear()
    assert local(f"{url}?token=secret") == found and hub.bytes_sent() == 1, "asked whether it has changed"
    hub.plain["/files/ink.safetensors"] = weights[:-1] + b"!"
    local.__globals__["_known"].clear()
    assert local(f"{url}?token=secret").read_bytes() != weights
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    local.__globals__["_known"].clear()
    assert local(f"{url}?token=secret").read_bytes() != weights
    with pytest.raises(
        UserError, match=f"^{url}: HF_HUB_OFFLINE keeps it from being asked for, and it was not fetched before$"
    ):
        local(url)


def test_a_link_that_breaks_or_leads_nowhere(hub, weights):
    hub.plain["/ink.safetensors"] = weights
    hub.breaks["ink.safetensors"] = [1000]
    assert local(f"{hub.url}/ink.safetensors").read_bytes() == weights
    hub.plain["/other.safetensors"] = weights
    hub.breaks["other.safetensors"] = [50_000] + [0] * 20
    with pytest.raises(FileError, match="what has come is kept, the same command goes on from there$"):
        local(f"{hub.url}/other.safetensors")
    hub.breaks.clear()
    hub.log.clear()
    assert local(f"{hub.url}/other.safetensors").read_bytes() == weights
    assert hub.bytes_sent() == len(weights) - 50_000 + 1
    with pytest.raises(UserError, match=rf"^{hub.url}/none.pt: no such file there \(status 404\)$"):
        local(f"{hub.url}/none.pt")
    with pytest.raises(
        UserError, match=r"^http://127.0.0.1:9/x.pt: its server cannot be reached \(.*\), and it was not"
    ):
        local("http://127.0.0.1:9/x.pt")
