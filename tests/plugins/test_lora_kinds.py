"""Every kind of change against the libraries that train it: theirs wrapped around a module, ours merged into it."""

import json

import jax
import numpy as np
import pytest
import torch
from lycoris import LycorisNetwork
from lycoris.functional.general import apply_dora_scale
from lycoris.functional.lokr import make_kron
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from bdm_jax.formats.files import read_header, write_safetensors
from bdm_jax.formats.layouts import to_jax, tree_to_torch
from bdm_jax.plugins.lora import apply, load_lora

# fp32 on both sides: what remains is the order of summation, measured at 1e-7 to 2e-6.
TOLERANCE = 1e-5


class Net(nn.Module):
    """One of each module that a UNet has; the square ones cannot tell inputs from outputs by shape."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.square = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, 12)
        self.point = nn.Conv2d(12, 16, 1)
        self.layer_norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 24)
        self.last = nn.Linear(24, 24, bias=False)

    def forward(self, x):
        x = self.point(self.norm(self.square(self.conv(x))))
        return self.last(self.linear(self.layer_norm(x.movedim(1, -1))))


@pytest.fixture
def net(randomised):
    return randomised(Net())


@pytest.fixture
def x(seed):
    return torch.randn((2, 8, 5, 5), generator=torch.Generator().manual_seed(seed + 1))


@pytest.fixture
def tree(net):
    return as_tree(net)


def as_tree(net):
    return {key: jax.numpy.asarray(array) for key, array in (to_jax(k, t.numpy()) for k, t in net.state_dict().items())}


def with_ours(path, tree, x, strength=1.0):
    """What a plain module with our merged weights makes of x."""
    merged = apply({"unet": tree}, [(load_lora(path, {"unet": tree}), strength, 0.0)])["unet"]
    return plain(merged)(x)


def plain(tree):
    module = Net().eval()
    module.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in tree_to_torch(tree).items()})
    return module


def lycoris(net, modules=("conv", "square", "point", "linear", "last"), **options):
    """LyCORIS' modules beside those of a net, not yet in its forward pass."""
    options = dict(lora_dim=3, alpha=3, conv_lora_dim=2, conv_alpha=2, network_module="lora") | options
    norms = ("norm", "layer_norm") if options.get("train_norm") else ()
    names = [*modules, *norms]
    LycorisNetwork.apply_preset({"target_name": names, "target_module": [], "lora_prefix": "lora_unet"})
    plugin = LycorisNetwork(net, **options)
    assert len(plugin.loras) == len(names)
    return plugin


def shaken(module, seed):
    """Every parameter of a plug-in moved from where it starts, which for most of it is 0."""
    generator = torch.Generator().manual_seed(seed + 2)
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# Options of LyCORIS, and the parts that its file must hold for the case to be what it says.
LYCORIS = {
    "lora": (dict(alpha=2.0), "lora_up.weight alpha"),
    "lora, alpha 0": (dict(alpha=0), "lora_up.weight"),
    "lora, rank-stabilised": (dict(alpha=2.0, rs_lora=True), "alpha"),
    "lora, scalar": (dict(use_scalar=True), "lora_up.weight"),
    "locon, tucker": (dict(use_tucker=True, conv_alpha=3.0), "lora_mid.weight"),
    "dora, per output": (dict(weight_decompose=True, wd_on_out=True, alpha=2.0), "dora_scale"),
    "dora, per input": (dict(weight_decompose=True, wd_on_out=False), "dora_scale"),
    "loha": (dict(network_module="loha", alpha=2.0), "hada_w1_a"),
    "loha, tucker": (dict(network_module="loha", use_tucker=True), "hada_t1 hada_t2"),
    "loha, dora": (dict(network_module="loha", weight_decompose=True), "hada_w2_b dora_scale"),
    "lokr": (dict(network_module="lokr", alpha=2.0, lora_dim=1, conv_lora_dim=1), "lokr_w1 lokr_w2_a"),
    "lokr, both in factors": (
        dict(network_module="lokr", lora_dim=1, conv_lora_dim=1, decompose_both=True, alpha=0.5),
        "lokr_w1_a lokr_w2_a",
    ),
    "lokr, factor 4": (dict(network_module="lokr", factor=4, lora_dim=2, conv_lora_dim=1), "lokr_w2_b"),
    "lokr, tucker": (
        dict(network_module="lokr", lora_dim=1, conv_lora_dim=1, use_tucker=True, conv_alpha=3.0),
        "lokr_t2",
    ),
    "lokr, whole": (dict(network_module="lokr", full_matrix=True, alpha=7.0), "lokr_w1 lokr_w2"),
    "lokr, dora": (
        dict(network_module="lokr", lora_dim=1, conv_lora_dim=1, weight_decompose=True),
        "lokr_w2_a dora_scale",
    ),
    "glora": (dict(network_module="glora", alpha=2.0), "a1.weight a2.weight b1.weight b2.weight alpha"),
    "oft": (dict(network_module="diag-oft", lora_dim=4, conv_lora_dim=4), "oft_blocks alpha"),
    "oft, constrained and rescaled": (
        dict(network_module="diag-oft", lora_dim=4, conv_lora_dim=4, constraint=0.05, rescaled=True),
        "oft_blocks rescale alpha",
    ),
    "boft": (dict(network_module="boft", lora_dim=6, conv_lora_dim=6), "oft_blocks"),
    "boft, constrained and rescaled": (
        dict(network_module="boft", lora_dim=12, conv_lora_dim=12, constraint=0.05, rescaled=True),
        "oft_blocks rescale alpha",
    ),
    "ia3, on outputs": (dict(network_module="ia3"), "weight on_input"),
    "ia3, on inputs": (dict(network_module="ia3", train_on_input=True), "weight on_input"),
    "full": (dict(network_module="full"), "diff diff_b"),
    "norms": (dict(train_norm=True), "w_norm b_norm"),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_what_lycoris_trained(name, net, tree, x, seed, tmp_path, assert_parity):
    """LyCORIS' own forward pass, saved by its own writer; at half strength too, where its multiplier means that."""
    options, parts = LYCORIS[name]
    plugin = lycoris(net, **options)
    plugin.apply_to()
    with torch.no_grad():
        shaken(plugin, seed)
        plugin.save_weights(tmp_path / "a.safetensors", torch.float32, {})
        written = {key.partition(".")[2] for key in read_header(tmp_path / "a.safetensors")[0]}
        assert written >= set(parts.split())
        base, theirs = plain(tree)(x), net(x)
        assert (theirs - base).abs().max() > 0.01 * base.abs().max()
        assert_parity(with_ours(tmp_path / "a.safetensors", tree, x), theirs, TOLERANCE)
        if "dora" not in name and "rescaled" not in name:
            plugin.set_multiplier(0.5)
            assert_parity(with_ours(tmp_path / "a.safetensors", tree, x, 0.5), net(x), TOLERANCE)


PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=5),
    "lora, rank-stabilised": LoraConfig(r=3, lora_alpha=5, use_rslora=True),
    "lora, bias": LoraConfig(r=2, lora_bias=True),
    "lora, patterns": LoraConfig(
        r=3, lora_alpha=5, rank_pattern={"conv": 2, "^linear": 4}, alpha_pattern={"conv": 7, "last": 1}
    ),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True),
    "loha": LoHaConfig(r=3, alpha=5),
    "loha, tucker": LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=1, alpha=3),
    "lokr, both in factors": LoKrConfig(r=1, alpha=3, decompose_both=True),
    "lokr, tucker": LoKrConfig(r=1, alpha=3, use_effective_conv2d=True),
    "lokr, whole": LoKrConfig(r=8, alpha=3),
    "ia3": IA3Config(feedforward_modules=["linear", "square"]),
    "ia3, the other way round": IA3Config(feedforward_modules="conv|point|last"),
}


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_trained(name, net, tree, x, seed, tmp_path, assert_parity):
    """peft's own forward pass, saved by its own writer as a folder."""
    config = PEFT[name]
    modules = ["conv", "square", "point", "linear", "last"]
    config.target_modules = ["linear", "conv", "point"] if "bias" in name else modules
    base = net(x)
    with torch.no_grad():
        model = get_peft_model(net, config).eval()
        shaken(nn.ParameterList([p for p in model.parameters() if p.requires_grad]), seed)
        model.save_pretrained(tmp_path)
        theirs = model(x)
    assert (theirs - base).abs().max() > 0.01 * base.abs().max()
    assert_parity(with_ours(tmp_path, tree, x), theirs, TOLERANCE)


NAMED_ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=3),
    "dora": LoraConfig(r=3, lora_alpha=3, use_dora=True),
    "loha": LoHaConfig(r=3, alpha=3),
    "lokr": LoKrConfig(r=1, alpha=1, decompose_both=True),
    "ia3": IA3Config(feedforward_modules=["linear"]),
}


@pytest.mark.parametrize("name", NAMED_ADAPTERS)
def test_the_state_of_a_peft_model_itself(name, net, tree, x, seed, tmp_path, assert_parity):
    """Not saved by peft's writer, which takes the adapter's name out of the keys, but by the user's own."""
    config = NAMED_ADAPTERS[name]
    config.target_modules = ["linear"] if name == "ia3" else ["conv", "linear", "last"]
    with torch.no_grad():
        model = get_peft_model(net, config, adapter_name="ink-2").eval()
        shaken(nn.ParameterList([p for p in model.parameters() if p.requires_grad]), seed)
        theirs, state = model(x), model.state_dict()
    tensors = {key: value.numpy() for key, value in state.items() if ".ink-2" in key}
    assert tensors
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert_parity(with_ours(tmp_path / "a.safetensors", tree, x), theirs, TOLERANCE)


def test_dora_between_its_ends_is_a_line(net, tree, seed, tmp_path, assert_parity):
    """As LyCORIS' apply_dora_scale (and ComfyUI and A1111) have it."""
    with torch.no_grad():
        plugin = lycoris(net, ["last"], weight_decompose=True, wd_on_out=False)
        plugin.apply_to()
        shaken(plugin, seed)
        plugin.save_weights(tmp_path / "a.safetensors", torch.float32, {})
        (module,) = plugin.loras
        weight = net.last.weight
        theirs = apply_dora_scale(weight, module.get_diff_weight()[0], module.dora_scale, 0.3)
    merged = apply({"unet": tree}, [(load_lora(tmp_path / "a.safetensors", {"unet": tree}), 0.3, 0)])
    assert_parity(merged["unet"]["last.kernel"].T, theirs, TOLERANCE)


def test_glora_of_the_first_releases(net, tree, tmp_path, rng):
    """Their parts 1 and 2 were the other way round (ComfyUI's old_glora): W a2 a1 + b2 b1."""
    a1, a2, b1, b2 = (rng.standard_normal(shape, np.float32) for shape in ((3, 16), (16, 3), (3, 16), (24, 3)))
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": np.float32(6).reshape(())}
    write_safetensors(tmp_path / "a.safetensors", {f"lora_unet_linear.{name}": v for name, v in parts.items()}, {})
    merged = apply({"unet": tree}, [(load_lora(tmp_path / "a.safetensors", {"unet": tree}), 0.5, 1)])["unet"]
    weight = net.linear.weight.detach().numpy()
    expected = weight + 0.5 * 6 / 3 * (weight @ a2 @ a1 + b2 @ b1)
    np.testing.assert_allclose(merged["linear.kernel"].T, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("small", "large"), [((3, 8), (4, 9)), ((4, 2), (3, 36)), ((2, 9), (6, 8))])
def test_lokr_of_a_flattened_convolution(small, large, net, tree, tmp_path, rng, assert_parity):
    """LyCORIS' early files: their product is of (out, in x height x width), and reshaped to the weight."""
    w1, w2 = (rng.standard_normal(shape, np.float32) for shape in (small, large))
    theirs = net.conv.weight + make_kron(torch.from_numpy(w1), torch.from_numpy(w2), 1.0).reshape(12, 8, 3, 3)
    up, down = w2[:, :1], rng.standard_normal((1, large[1]), np.float32)
    factors = {"lokr_w1": w1, "lokr_w2_a": up, "lokr_w2_b": down}
    second = net.conv.weight + make_kron(torch.from_numpy(w1), torch.from_numpy(up @ down), 1.0).reshape(12, 8, 3, 3)
    for parts, expected in (({"lokr_w1": w1, "lokr_w2": w2}, theirs), (factors, second)):
        write_safetensors(tmp_path / "a.safetensors", {f"lora_unet_conv.{name}": v for name, v in parts.items()}, {})
        merged = apply({"unet": tree}, [(load_lora(tmp_path / "a.safetensors", {"unet": tree}), 1, 1)])["unet"]
        assert_parity(np.transpose(merged["conv.kernel"], (3, 2, 0, 1)), expected.detach(), TOLERANCE)


def test_no_alpha_means_rank(net, tree, tmp_path, rng):
    up, down = rng.standard_normal((24, 2), np.float32), rng.standard_normal((2, 24), np.float32)
    parts = {"lora_unet_last.lora_up.weight": up, "lora_unet_last.lora_down.weight": down}
    write_safetensors(tmp_path / "a.safetensors", parts, {})
    merged = apply({"unet": tree}, [(load_lora(tmp_path / "a.safetensors", {"unet": tree}), 1, 1)])["unet"]
    np.testing.assert_allclose(merged["last.kernel"] - tree["last.kernel"], (up @ down).T, atol=1e-5)


def test_the_settings_that_peft_wrote_are_used(tmp_path):
    """The pattern test above is about something: peft's file holds what its config says."""
    with torch.no_grad():
        config = PEFT["lora, patterns"]
        config.target_modules = ["conv", "linear", "last"]
        get_peft_model(Net(), config).save_pretrained(tmp_path)
    entries, _ = read_header(tmp_path / "adapter_model.safetensors")
    assert entries["base_model.model.conv.lora_A.weight"].shape[0] == 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"] == {"conv": 7, "last": 1}
