"""Every layout of a LoRA file leads to the same weights; diffusers' own loader says to which."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig as TorchCLIPConfig
from transformers import CLIPTextModel

from bdm_jax.formats.files import write_json, write_safetensors
from bdm_jax.formats.layouts import to_torch, tree_to_torch
from bdm_jax.formats.lora import module_names, numbered_modules, read_lora
from bdm_jax.formats.networks.unet import ldm_unet
from bdm_jax.models import functional
from bdm_jax.models.config import (
    BDM_BRANCH,
    CHINESE_CLIP_H_TEXT,
    CLIP_L_TEXT,
    SD15_UNET,
    BranchConfig,
    CLIPTextConfig,
    RobertaConfig,
    UNetConfig,
    to_json,
)
from bdm_jax.plugins.lora import apply, load_lora
from bdm_jax.systems.families import lora_prefixes

REAL = Path(__file__).parents[3] / "shared" / "data" / "lora" / "cloneofsimo"
TOLERANCE = 2e-6  # of a weight's largest value: the same product in fp32, measured at 1e-7 to 4e-7

ENCODER = dict(block_out_channels=(8, 16), transformer_layers=(1, 0), num_heads=2, norm_num_groups=4)
TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = {
    "unet": UNetConfig(**ENCODER, layers_per_block=1, cross_attention_dim=16),
    "text_encoder": CLIPTextConfig(**TEXT, vocab_size=40, max_position_embeddings=8),
    "branch": BranchConfig(**ENCODER, layers_per_block=1, cross_attention_dim=16),
    "branch_text_encoder": RobertaConfig(**TEXT, vocab_size=40, max_position_embeddings=8),
}
UNET = (
    r".*\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|conv1|conv_shortcut|time_emb_proj|\w+rs\.0\.conv)"
)
TARGETS = {
    "unet": UNET,
    "text_encoder": r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
    "branch": UNET,
    "branch_text_encoder": r".*\.(query|key|value|dense)",
}


@pytest.fixture(scope="module")
def networks(request):
    return {name: functional.init(config, request.config.option.seed) for name, config in CONFIGS.items()}


@pytest.fixture
def factors(networks, rng):
    """(network, module) -> (up, down, alpha), of random factors for the usual modules of every network."""
    found = {}
    for network, tree in networks.items():
        for module in modules_of(tree):
            if not re.fullmatch(TARGETS[network], module):
                continue
            out, inputs, *window = to_torch(f"{module}.kernel", tree[f"{module}.kernel"])[1].shape
            up = rng.standard_normal((out, 2, *(1 for _ in window)), np.float32)
            down = rng.standard_normal((2, inputs, *window), np.float32)
            found[network, module] = up, down, np.float32(rng.uniform(0.5, 4))
    return found


def modules_of(tree):
    return sorted(key.removesuffix(".kernel") for key in tree if key.endswith(".kernel"))


def expected(networks, factors, targets=("unet", "text_encoder"), alphas=True):
    """The trees with the factors' products added, by the definition of LoRA."""
    result = {name: {key: np.array(value) for key, value in tree.items()} for name, tree in networks.items()}
    for (network, module), (up, down, alpha) in factors.items():
        if network in targets:
            _, weight = to_torch(f"{module}.kernel", result[network][f"{module}.kernel"])  # a view
            scale = alpha / 2 if alphas else 1.0
            weight += scale * np.einsum("or,ri...->oi...", up.reshape(len(up), -1), down)
    return result


def assert_same(ours, theirs, names=CONFIGS):
    for name in names:
        assert ours[name].keys() == theirs[name].keys()
        for key, value in ours[name].items():
            assert_close(value, theirs[name][key], f"{name} {key}")


def assert_close(ours, theirs, name):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max(), err_msg=name)


def kohya(factors, prefixes, spell=lambda network, module: module):
    tensors = {}
    for (network, module), (up, down, alpha) in factors.items():
        if network in prefixes:
            name = prefixes[network] + spell(network, module).replace(".", "_")
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
    return {key: np.asarray(value) for key, value in tensors.items()}


def ldm(network, module):
    return ldm_unet((1, 0), 1).to_theirs(module) if network in ("unet", "branch") else module


def attention_only(factors):
    return {key: value for key, value in factors.items() if re.search(r"\.attn[12]\.|self_attn", key[1])}


def processors(factors):
    """diffusers before 0.18."""
    tensors = {}
    for (network, module), (up, down, _) in attention_only(factors).items():
        if network == "unet":
            name = f"unet.{re.sub(r'to_out.0$', 'to_out', module)}_lora"
            name = re.sub(r"(attn[12])\.", r"\1.processor.", name)
        elif network == "text_encoder":
            name = f"text_encoder.{module}.lora_linear_layer"
        else:
            continue
        tensors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
    return tensors


def oldest(factors):
    """The text tower of diffusers 0.16, and a UNet's file of that time, whose keys do not name the network."""
    old = {}
    for key, array in processors(factors).items():
        key = re.sub(r"\.(q|k|v|out)_proj\.lora_linear_layer", r".to_\1_lora", key)
        old[key.removeprefix("unet.")] = array
    return old


def dotted(factors, down, up, prefix="{network}."):
    tensors = {}
    for (network, module), (up_array, down_array, alpha) in factors.items():
        name = prefix.format(network=network) + module
        tensors |= {f"{name}.{up}.weight": up_array, f"{name}.{down}.weight": down_array, f"{name}.alpha": alpha}
    return {key: np.asarray(value) for key, value in tensors.items()}


def comfyui(factors, spell):
    prefixes = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}
    tensors = {}
    for (network, module), values in factors.items():
        if network in prefixes:
            one = {(network, spell(network, module)): values}
            tensors |= dotted(one, "lora_down", "lora_up", prefixes[network])
    return tensors


BACKBONE = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
BRIDGE = BACKBONE | {"branch": "lora_branch_", "branch_text_encoder": "lora_branch_te_"}
# By layout: the tensors, and the networks that they are for.
LAYOUTS = {
    "kohya": (lambda f: kohya(f, BRIDGE), CONFIGS),
    "kohya, CompVis' names": (lambda f: kohya(f, BRIDGE, ldm), CONFIGS),
    "kohya, SDXL's name of the first tower": (lambda f: kohya(f, BACKBONE | {"text_encoder": "lora_te1_"}), BACKBONE),
    "lycoris": (lambda f: kohya(f, dict.fromkeys(BACKBONE, "lycoris_")), BACKBONE),
    "diffusers": (lambda f: dotted(f, "lora_A", "lora_B"), CONFIGS),
    "diffusers 0.2x": (lambda f: dotted(f, "lora.down", "lora.up"), CONFIGS),
    "peft": (lambda f: dotted(f, "lora_A.default", "lora_B.default", "base_model.model.{network}."), CONFIGS),
    "an adapter's number": (lambda f: dotted(f, "lora_A.default_0", "lora_B.default_0"), CONFIGS),
    "an adapter's name": (lambda f: dotted(f, "lora_A.ink-wash_2", "lora_B.ink-wash_2"), CONFIGS),
    "DataParallel": (lambda f: dotted(f, "lora_A", "lora_B", "module.{network}."), CONFIGS),
    "ComfyUI": (lambda f: comfyui(f, ldm), BACKBONE),
    "ComfyUI, diffusers' names": (lambda f: comfyui(f, lambda _, module: module), BACKBONE),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, networks, factors, tmp_path):
    layout, targets = LAYOUTS[name]
    write_safetensors(tmp_path / "a.safetensors", layout(factors), {})
    lora = load_lora(tmp_path / "a.safetensors", networks)
    assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, factors, targets))
    assert lora.deltas.keys() == set(targets)


@pytest.mark.parametrize("layout", [processors, oldest])
def test_layouts_without_alpha(layout, networks, factors, tmp_path):
    write_safetensors(tmp_path / "a.safetensors", layout(factors), {})
    lora = load_lora(tmp_path / "a.safetensors", networks)
    assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, attention_only(factors), alphas=False))


def test_whose_modules_are_in_a_file(factors, tmp_path):
    """Also of files whose keys do not name the network."""
    count = {name: sum(key[0] == name for key in factors) for name in CONFIGS}
    attention = {name: sum(key[0] == name for key in attention_only(factors)) for name in ("unet", "text_encoder")}
    lycoris = {name: count[name] for name in BACKBONE}
    for layout, expected in ((processors, attention), (oldest, attention), (LAYOUTS["lycoris"][0], lycoris)):
        write_safetensors(tmp_path / "a.safetensors", layout(factors), {})
        file = read_lora(tmp_path / "a.safetensors", lora_prefixes())
        assert file.modules == dict(sorted(expected.items())) and not file.unknown


def test_torch_file(networks, factors, tmp_path):
    tensors = {key: torch.from_numpy(array) for key, array in kohya(factors, BACKBONE).items()}
    torch.save(tensors, tmp_path / "a.pt")
    lora = load_lora(tmp_path / "a.pt", networks)
    assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, factors))


# ------------------------------------------------------------------------------------------------- against diffusers


@pytest.fixture
def torch_networks(networks):
    """diffusers' and transformers' modules with our weights."""
    unet = UNet2DConditionModel.from_config(to_json(CONFIGS["unet"]))
    unet.load_state_dict(as_torch(networks["unet"]))
    text = CLIPTextModel(TorchCLIPConfig.from_dict(to_json(CONFIGS["text_encoder"])))
    state = {key.removeprefix("text_model."): value for key, value in as_torch(networks["text_encoder"]).items()}
    text.load_state_dict(state, strict=False)
    return unet.eval(), text.eval()


def as_torch(tree):
    return {key: torch.from_numpy(np.array(array)) for key, array in tree_to_torch(tree).items()}


def fused(path, unet, text):
    """The weights once diffusers has loaded and merged a file, by our names in torch's layouts."""
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        path, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, network_alphas=alphas, text_encoder=text, metadata=metadata, prefix="text_encoder"
    )
    return {"unet": merged(unet), "text_encoder": merged(text)}


def merged(module):
    """A module's weights with peft's layers in it merged, as if they had not been there."""
    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    assert layers
    for layer in layers:
        layer.merge()
    state = {key.replace(".base_layer", ""): value for key, value in module.state_dict().items()}
    return {key: value.numpy() for key, value in state.items() if "lora_" not in key}


def assert_as_torch(networks, theirs):
    for name, tree in theirs.items():
        ours = tree_to_torch(networks[name])
        for key, array in tree.items():
            key = key if key in ours else f"text_model.{key}"
            assert_close(ours[key], array, key)


@pytest.mark.parametrize("layout", ["kohya", "processors", "diffusers"])
def test_diffusers_merges_the_same(layout, networks, factors, torch_networks, tmp_path):
    """With alpha = rank: diffusers 0.42 loses the alphas of these layouts (with a warning) where networks are newer."""
    backbone = {key: (up, down, np.float32(2)) for key, (up, down, _) in factors.items() if key[0] in BACKBONE}
    tensors = {
        "kohya": kohya(backbone, BACKBONE),
        "processors": processors(backbone),
        "diffusers": {key: array for key, array in dotted(backbone, "lora_A", "lora_B").items() if array.ndim},
    }
    write_safetensors(tmp_path / "a.safetensors", tensors[layout], {"format": "pt"})
    lora = load_lora(tmp_path / "a.safetensors", networks)
    assert_as_torch(apply(networks, [(lora, 1, 1)]), fused(tmp_path / "a.safetensors", *torch_networks))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"to_k": 3}}])
def test_what_diffusers_saves(options, networks, torch_networks, seed, tmp_path):
    """Its current layout, with the peft configs in the header."""
    unet, text = torch_networks
    torch.manual_seed(seed)
    gaussian = dict(r=2, lora_alpha=5, init_lora_weights=False, **options)
    configs = {
        "unet": LoraConfig(target_modules=["to_q", "to_k", "to_out.0", "conv1", "proj_in"], **gaussian),
        "text": LoraConfig(target_modules=["q_proj", "out_proj"], **(gaussian | {"lora_alpha": 7})),
    }
    unet.add_adapter(configs["unet"])
    text.add_adapter(configs["text"])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text"].to_dict(),
    )
    lora = load_lora(tmp_path, networks)
    assert_as_torch(apply(networks, [(lora, 1, 1)]), {"unet": merged(unet), "text_encoder": merged(text)})
    assert len(lora.deltas["text_encoder"]) == 4


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_peft_folder_of_one_network(network, networks, torch_networks, seed, tmp_path):
    torch.manual_seed(seed)
    module = dict(zip(("unet", "text_encoder"), torch_networks, strict=True))[network]
    names = ["to_q", "to_v", "conv2"] if network == "unet" else ["k_proj", "fc1"]
    model = get_peft_model(module, LoraConfig(r=3, lora_alpha=4, target_modules=names, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    lora = load_lora(tmp_path, networks)
    state = model.merge_and_unload().state_dict()
    assert_as_torch(apply(networks, [(lora, 1, 1)]), {network: {key: value.numpy() for key, value in state.items()}})
    assert list(lora.deltas) == [network]


COMPVIS = {
    "input_blocks_1_1_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_2_0_in_layers_2": "down_blocks.0.resnets.1.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_7_1_proj_in": "down_blocks.2.attentions.0.proj_in",
    "middle_block_1_transformer_blocks_0_ff_net_2": "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_3_1_norm": "up_blocks.1.attentions.0.norm",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_11_0_skip_connection": "up_blocks.3.resnets.2.conv_shortcut",
    "time_embed_2": "time_embedding.linear_2",
    "out_2": "conv_out",
}


def test_compvis_names(full_size):
    """By the table in kohya's and diffusers' converters, for SD1.5's levels of three blocks."""
    names = module_names({key.rpartition(".")[0] for key in full_size["unet"]})
    assert {theirs: names[theirs] for theirs in COMPVIS} == COMPVIS


@pytest.mark.parametrize("compvis", [False, True])
def test_what_kohya_trains_by_default_at_full_size(compvis, full_size, tmp_path):
    """192 modules of SD1.5's UNet and 72 of its text tower, every key consumed; nothing of full size is allocated."""
    default = (
        r".*\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|attentions\.\d\.proj_(in|out))|.*(_proj|mlp\.fc[12])"
    )
    table, tensors = ldm_unet((True, True, True, False), 2), {}
    for network in BACKBONE:
        for module in modules_of(full_size[network]):
            if re.fullmatch(default, module) and not module.endswith("time_emb_proj"):
                shape = to_torch(f"{module}.kernel", np.broadcast_to(0, full_size[network][f"{module}.kernel"].shape))[
                    1
                ].shape
                name = table.to_theirs(module) if compvis and network == "unet" else module
                name = BACKBONE[network] + name.replace(".", "_")
                tensors[f"{name}.lora_up.weight"] = np.zeros((shape[0], 1, *shape[2:]), np.float16)
                tensors[f"{name}.lora_down.weight"] = np.zeros((1, *shape[1:]), np.float16)
                tensors[f"{name}.alpha"] = np.ones((), np.float16)
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    lora = load_lora(tmp_path / "a.safetensors", full_size)
    assert {network: len(deltas) for network, deltas in lora.deltas.items()} == {"unet": 192, "text_encoder": 72}


# ---------------------------------------------------------------------------------------------- numbers for names


def test_numbers_follow_the_order_of_declaration(torch_networks):
    """As cloneofsimo's trainer meets a text tower's modules: what transformers declares first comes first."""
    _, text = torch_networks
    theirs = [name for name, part in text.named_modules() if re.fullmatch(r".*self_attn\.\w+_proj", name)]
    tree = functional.abstract(CONFIGS["text_encoder"])
    assert numbered_modules(modules_of(tree)) == [f"text_model.{name}" for name in theirs]


def test_numbers_of_a_unet(torch_networks):
    """Blocks in diffusers' order of declaration; within one, ff lay between the attentions when the trainer was
    written."""
    unet, _ = torch_networks
    blocks = [name for name, _ in unet.named_modules() if re.fullmatch(r".*transformer_blocks\.\d+", name)]
    inner = [f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj"]
    inner += [f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")]
    ours = numbered_modules(modules_of(functional.abstract(CONFIGS["unet"])))
    assert ours == [f"{block}.{name}" for block in blocks for name in inner]


def test_numbered_file(networks, factors, tmp_path):
    known = {name: numbered_modules(modules_of(networks[name])) for name in ("unet", "text_encoder")}
    tensors, chosen = {"<s1>": np.ones(16, np.float32)}, {}
    for network, modules in known.items():
        for i, module in enumerate(modules):
            chosen[network, module] = up, down, _ = factors[network, module]
            tensors |= {f"{network}:{i}:up": up, f"{network}:{i}:down": down}
    metadata = {"<s1>": "<embed>", "unet": json.dumps(["GEGLU", "CrossAttention"]), "unet:0:rank": "2"}
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    lora = load_lora(tmp_path / "a.safetensors", networks)
    assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, chosen, alphas=False))
    np.testing.assert_array_equal(lora.tokens["<s1>"], np.ones(16))


def test_lists_of_pairs(networks, factors, tmp_path):
    """cloneofsimo's first format: a list (up, down, up, down, ...) by torch.save, one file per network."""
    for network, name in (("unet", "a.pt"), ("text_encoder", "a.text_encoder.pt")):
        known = numbered_modules(modules_of(networks[network]))
        chosen = {(network, module): factors[network, module] for module in known}
        pairs = [torch.from_numpy(array) for up, down, _ in chosen.values() for array in (up, down)]
        torch.save(pairs, tmp_path / name)
        lora = load_lora(tmp_path / name, networks)
        assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, chosen, alphas=False))


@pytest.fixture(scope="module")
def full_size():
    configs = dict(unet=SD15_UNET, text_encoder=CLIP_L_TEXT, branch=BDM_BRANCH, branch_text_encoder=CHINESE_CLIP_H_TEXT)
    return {name: functional.abstract(config) for name, config in configs.items()}


@pytest.mark.parametrize("name", ["analog_svd_rank4", "lora_disney", "lora_disney_inpainting"])
def test_real_file(name, full_size):
    path = REAL / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    lora = load_lora(path, full_size)
    assert {network: len(deltas) for network, deltas in lora.deltas.items()} == {"unet": 144, "text_encoder": 48}
    assert all(tree.keys() <= full_size[network].keys() for network, tree in lora.deltas.items())
    assert sorted(lora.tokens) == ([] if "analog" in name else ["<s1>", "<s2>"])


def test_the_real_file_itself_tells_the_order_of_its_text_tower(full_size):
    """q, k and v read one input, out another: the factors of the first three span nearly one space of inputs; and the
    softmax's two, like the values' two, change by nearly the same amount."""
    path = REAL / "analog_svd_rank4.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    deltas = load_lora(path, full_size).deltas["text_encoder"]
    spans, norms = {}, {}
    for key, delta in sorted(deltas.items()):
        up, down = (np.asarray(delta.parts[name], np.float32) for name in ("up", "down"))
        spans[key] = np.linalg.qr(down.T)[0]
        norms.setdefault(key.split(".")[-2], []).append(np.log(np.linalg.norm(up @ down)))

    def overlap(a, b):
        pairs = [(f"text_model.encoder.layers.{i}.self_attn.{name}_proj.kernel" for name in (a, b)) for i in range(12)]
        return np.mean([np.linalg.norm(spans[x].T @ spans[y]) ** 2 / 4 for x, y in pairs])

    assert overlap("q", "k") > 0.5 and overlap("q", "v") > 0.5 and overlap("q", "out") < 0.05
    correlation = np.corrcoef([norms[f"{name}_proj"] for name in ("q", "k", "v", "out")])
    assert min(correlation[0, 1], correlation[2, 3]) > 0.95 > 0.8 > correlation[:2, 2:].max()


def test_every_spelling_at_full_size_is_one_module(full_size):
    """No two modules of a network are spelled alike once dots are underscores."""
    for tree in full_size.values():
        modules = {key.rpartition(".")[0] for key in tree}
        names = module_names(modules)
        assert set(names.values()) == modules
        spelled = {}
        for name, module in names.items():
            assert spelled.setdefault(name.replace(".", "_"), module) == module


# ------------------------------------------------------------------------------------------------------ the branch


def test_what_was_made_for_a_unet_on_the_branch(networks, factors, tmp_path):
    write_safetensors(tmp_path / "a.safetensors", kohya(factors, BACKBONE), {})
    with pytest.warns(UserWarning, match=r"left out \d+ modules that the branch lacks"):
        lora = load_lora(tmp_path / "a.safetensors", networks, target="branch")
    chosen = {
        ("branch", module): value
        for (network, module), value in factors.items()
        if network == "unet" and not module.startswith("up_blocks")
    }
    assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, chosen, ("branch",)))
    left = {f"{network} {module}" for network, module in factors if network in BACKBONE} - {
        f"unet {module}" for _, module in chosen
    }
    assert len(lora.left_out) == len(left)


def test_abstract_shapes_are_enough(networks, factors, tmp_path):
    write_safetensors(tmp_path / "a.safetensors", kohya(factors, BACKBONE), {})
    shapes = {name: functional.abstract(config) for name, config in CONFIGS.items()}
    lora = load_lora(tmp_path / "a.safetensors", shapes)
    assert_same(apply(networks, [(lora, 1, 1)]), expected(networks, factors))
    assert isinstance(jax.tree.leaves(shapes)[0], jax.ShapeDtypeStruct)


def test_folder_without_a_lora(tmp_path, networks):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match="no LoRA in this folder; expected one of adapter_model.safetensors"):
        load_lora(tmp_path, networks)
