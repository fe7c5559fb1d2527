"""Strengths, several plug-ins at once, the way back; and files that must be refused."""

import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import write_json, write_safetensors
from bdm_jax.plugins.lora import apply, load_lora

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
NAME = "lora_unet_" + LINEAR.replace(".", "_")
CONV_NAME = "lora_unet_" + CONV.replace(".", "_")
TEXT_NAME = "lora_te_" + TEXT.replace(".", "_")


@pytest.fixture
def networks(rng):
    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    unet = {f"{LINEAR}.kernel": random(6, 8), f"{CONV}.kernel": random(3, 3, 4, 5), f"{CONV}.bias": random(5)}
    unet["down_blocks.0.resnets.0.norm1.scale"] = random(4)
    return {"unet": unet, "text_encoder": {f"{TEXT}.kernel": random(8, 8), f"{TEXT}.bias": random(8)}}


@pytest.fixture
def pair(rng):
    """Factors of the linear layer, the convolution and the text tower, in kohya's layout."""

    def make():
        def draw(*shape):
            return rng.standard_normal(shape, np.float32)

        return {
            f"{NAME}.lora_up.weight": draw(8, 2),
            f"{NAME}.lora_down.weight": draw(2, 6),
            f"{CONV_NAME}.lora_up.weight": draw(5, 3, 1, 1),
            f"{CONV_NAME}.lora_down.weight": draw(3, 4, 3, 3),
            f"{TEXT_NAME}.lora_up.weight": draw(8, 2),
            f"{TEXT_NAME}.lora_down.weight": draw(2, 8),
        }

    return make


@pytest.fixture
def load(tmp_path, networks):
    """A function from tensors (and a header) to the plug-in that a file of them is."""

    def from_tensors(tensors, metadata=None, name="a", **options):
        tensors = {key: np.asarray(array, np.float32) for key, array in tensors.items()}
        write_safetensors(tmp_path / f"{name}.safetensors", tensors, metadata or {})
        return load_lora(tmp_path / f"{name}.safetensors", networks, **options)

    return from_tensors


def largest_difference(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---------------------------------------------------------------------------------------------------------- strengths


def test_each_strength_is_of_its_networks(networks, pair, load):
    lora = load(pair())
    changed = apply(networks, [(lora, 0.5, 0.0)])
    assert changed["text_encoder"] is networks["text_encoder"]
    full = apply(networks, [(lora, 1, 1)])
    key = f"{LINEAR}.kernel"
    half = networks["unet"][key] + 0.5 * (full["unet"][key] - networks["unet"][key])
    np.testing.assert_allclose(changed["unet"][key], half, atol=1e-5)
    text = apply(networks, [(lora, 0.0, -0.7)])
    assert text["unet"] is networks["unet"]
    assert not (text["text_encoder"][f"{TEXT}.kernel"] == networks["text_encoder"][f"{TEXT}.kernel"]).all()


def test_strength_0_is_the_very_same_arrays(networks, pair, load):
    before = jax.tree.map(np.array, networks)
    lora = load(pair())
    apply(networks, [(lora, 1.0, 1.0)])
    for uses in ([], [(lora, 0.0, 0.0)]):
        changed = apply(networks, uses)
        assert all(changed[name][key] is value for name, tree in networks.items() for key, value in tree.items())
    jax.tree.map(np.testing.assert_array_equal, before, networks)  # nor did the merge before touch them


def test_what_no_plugin_changes_is_the_same_array(networks, pair, load):
    changed = apply(networks, [(load(pair()), 1.0, 1.0)])["unet"]
    assert changed[f"{CONV}.bias"] is networks["unet"][f"{CONV}.bias"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_order_makes_no_difference(dtype, networks, pair, load, rng):
    networks = jax.tree.map(lambda value: value.astype(dtype), networks)
    loras = [load(pair(), name=str(i)) for i in range(4)]
    ia3 = {f"{NAME}.weight": rng.standard_normal(8), f"{NAME}.on_input": np.zeros(())}
    dora = pair() | {f"{NAME}.dora_scale": rng.uniform(1, 2, (8, 1))}
    loras += [load(ia3, name="ia3"), load(dora, name="dora")]
    uses = [(lora, *rng.uniform(-1, 1, 2)) for lora in loras]
    one = apply(networks, uses)
    for _ in range(5):
        again = apply(networks, [uses[i] for i in rng.permutation(len(uses))])
        jax.tree.map(np.testing.assert_array_equal, one, again)
    assert {value.dtype.name for value in jax.tree.leaves(one)} == {dtype}


def test_sum_of_changes_of_the_original(networks, pair, load, rng):
    """Also of kinds that depend on the weight: each sees the original, not what another left."""
    dora = {**pair(), f"{NAME}.dora_scale": rng.uniform(1, 2, (8, 1))}
    ia3 = {f"{NAME}.weight": rng.standard_normal(8), f"{NAME}.on_input": np.zeros(())}
    uses = [(load(dora, name="dora"), 0.6, 1), (load(ia3, name="ia3"), 0.9, 1), (load(pair(), name="plain"), 1.5, 0.2)]
    together = apply(networks, uses)
    singly = [apply(networks, [use]) for use in uses]
    total = jax.tree.map(lambda base, *changed: base + sum(value - base for value in changed), networks, *singly)
    assert largest_difference(together, total) < 1e-5  # of fp32 values up to 10


def test_new_strengths_from_the_originals(networks, pair, load):
    """A plug-in stays apart: another strength later is what it would have been at first, bit for bit."""
    lora, other = load(pair()), load(pair(), name="b")
    first = apply(networks, [(lora, 0.3, 0.3)])
    apply(networks, [(lora, 1.0, 1.0), (other, 0.7, 0.7)])
    jax.tree.map(np.testing.assert_array_equal, first, apply(networks, [(lora, 0.3, 0.3)]))


def test_inside_a_compiled_program(networks, pair, load, rng):
    """Strengths and factors as arguments: one program for all of them, the same weights as the merge on the host."""
    tucker = {f"{CONV_NAME}.lora_mid.weight": rng.standard_normal((3, 3, 3, 3))}
    tucker |= {f"{CONV_NAME}.lora_down.weight": rng.standard_normal((3, 4, 1, 1))}
    lokr = {f"{TEXT_NAME}.lokr_w1": rng.standard_normal((2, 4)), f"{TEXT_NAME}.lokr_w2": rng.standard_normal((4, 2))}
    dora = {**pair(), **tucker, f"{NAME}.dora_scale": rng.uniform(1, 2, (8, 1))}
    loras = [load(dora, name="dora"), load(lokr, name="lokr")]
    traces = []

    @jax.jit
    def merged(networks, loras, strengths):
        traces.append(1)
        return apply(networks, [(lora, a, b) for lora, (a, b) in zip(loras, strengths, strict=True)])

    for strengths in ([(0.5, 0.25), (1.0, 0.5)], [(-0.5, 1.0), (0.25, 2.0)]):
        ours = merged(networks, loras, strengths)
        uses = [(lora, a, b) for lora, (a, b) in zip(loras, strengths, strict=True)]
        assert largest_difference(ours, apply(networks, uses)) < 2e-5  # of fp32 values up to 10
    assert len(traces) == 1


def test_gradients_reach_the_factors(networks, pair, load):
    lora = load(pair())

    def loss(lora):
        return sum((value**2).sum() for value in jax.tree.leaves(apply(networks, [(lora, 1.0, 1.0)])))

    grads = jax.grad(loss)(jax.tree.map(jnp.asarray, lora))
    parts = grads.deltas["unet"][f"{LINEAR}.kernel"].parts
    assert parts["up"].shape == (8, 2) and float(jnp.abs(parts["up"]).max()) > 0


def test_difference_that_the_type_cannot_hold(networks, load):
    lora = load({f"{NAME}.diff": np.full((8, 6), 1e5)})
    half = jax.tree.map(lambda value: value.astype("float16"), networks)
    with pytest.raises(UserError, match="beyond float16's range"):
        apply(half, [(lora, 1, 1)])
    apply(half, [(lora, 0.1, 1)])


def test_strength_that_is_not_finite(networks, pair, load):
    with pytest.raises(UserError, match="not finite"):
        apply(networks, [(load(pair()), float("nan"), 1)])


def test_plugin_for_other_networks(networks, pair, load):
    with pytest.raises(UserError, match="has no .*to_k.kernel"):
        apply({"unet": {f"{CONV}.kernel": networks["unet"][f"{CONV}.kernel"]}}, [(load(pair()), 1, 1)])


# -------------------------------------------------------------------------------------------------- what does not fit


def up_down(name, up, down):
    return {f"{name}.lora_up.weight": np.zeros(up), f"{name}.lora_down.weight": np.zeros(down)}


REFUSED = {
    "a module that is not here": (
        up_down("lora_unet_mid_block_attentions_9", (8, 2), (2, 6)),
        "belong to nothing here",
    ),
    "a key of no kind": (
        {f"{NAME}.lora_sideways.weight": np.zeros((2, 2))},
        "1 keys belong to nothing here: .*sideways",
    ),
    "OFT of another width": ({f"{NAME}.oft_blocks": np.zeros((2, 2, 2))}, r"oft_blocks: has oft_blocks \(2, 2, 2\)"),
    "OFT of oblong blocks": ({f"{NAME}.oft_blocks": np.zeros((2, 4, 2))}, "do not make"),
    "BOFT of too many levels": ({f"{NAME}.oft_blocks": np.zeros((4, 4, 2, 2))}, "do not make"),
    "BOFT of endless levels": ({f"{NAME}.oft_blocks": np.zeros((2**16, 4, 2, 2))}, "do not make"),
    "a rescale alone": ({f"{NAME}.rescale": np.ones((8, 1))}, "lacks oft_blocks"),
    "DoRA of OFT": (
        {f"{NAME}.oft_blocks": np.zeros((2, 4, 4)), f"{NAME}.dora_scale": np.ones((8, 1))},
        "has dora_scale beside oft's parts",
    ),
    "GLoRA without a half": ({f"{NAME}.a1.weight": np.zeros((6, 2))}, r"to_k\.a1\.weight: lacks a2"),
    "GLoRA of two ranks": (
        {f"{NAME}.a1.weight": np.zeros((6, 2)), f"{NAME}.a2.weight": np.zeros((2, 6))}
        | {f"{NAME}.b1.weight": np.zeros((8, 3)), f"{NAME}.b2.weight": np.zeros((3, 6))},
        "do not make",
    ),
    "early OFT": ({f"{NAME}.oft_diag": np.zeros((2, 4, 4))}, r"to_k\.oft_diag is of OFT as LyCORIS 2.0 wrote it"),
    "peft's OFT": (
        {f"unet.{LINEAR}.oft_R.weight": np.zeros((2, 6))},
        "to_k.oft_R.weight is of peft's OFT, which cannot",
    ),
    "two adapters": (
        {f"unet.{LINEAR}.lora_A.{name}.weight": np.zeros((2, 6)) for name in ("ink", "wash")},
        r"holds 2 adapters \(ink, wash\); save one of them",
    ),
    "half of a pair": ({f"{NAME}.lora_up.weight": np.zeros((8, 2))}, "lacks down"),
    "alpha alone": ({f"{NAME}.alpha": np.zeros(())}, "has alpha, which make no change"),
    "two kinds": (up_down(NAME, (8, 2), (2, 6)) | {f"{NAME}.diff": np.zeros((8, 6))}, "which make no change"),
    "widths swapped": (up_down(NAME, (6, 2), (2, 8)), r"up \(6, 2\).*do not make \(8, 6\)"),
    "ranks that differ": (up_down(NAME, (8, 2), (3, 6)), "do not make"),
    "rank 0 on one side": (up_down(NAME, (8, 0), (2, 6)), r"up of shape \(8, 0\)"),
    "rank 0 with a magnitude": (
        up_down(NAME, (8, 0), (0, 6)) | {f"{NAME}.dora_scale": np.ones((8, 1))},
        r"up of shape \(8, 0\)",
    ),
    "one axis": (up_down(NAME, (8,), (2, 6)), r"up of shape \(8,\)"),
    "no axis": (up_down(NAME, (), ()), r"up of shape \(\)"),
    "many axes": (up_down(NAME, (8, 2, 1, 1, 1, 1), (2, 6, 2, 1, 1)), "do not make"),
    "another window": (up_down(CONV_NAME, (5, 2, 1, 1), (2, 4, 1, 1)), "do not make"),
    "linear factors of a norm": (up_down("lora_unet_down_blocks_0_resnets_0_norm1", (4, 2), (2, 4)), "do not make"),
    "a core for a linear layer": (
        up_down(NAME, (8, 2), (2, 6)) | {f"{NAME}.lora_mid.weight": np.zeros((2, 2, 3, 3))},
        "do not make",
    ),
    "a norm's difference on a convolution": ({f"{CONV_NAME}.w_norm": np.zeros(5)}, "do not make"),
    "a bias where there is none": ({f"{NAME}.diff_b": np.zeros(8)}, "has diff_b, where there is no bias"),
    "a bias of another width": ({f"{CONV_NAME}.diff_b": np.zeros(4)}, "do not make"),
    "a whole weight": ({f"{NAME}.weight": np.zeros((8, 6))}, "a whole weight, in place of a change"),
    "IA3 of another width": ({f"{NAME}.weight": np.zeros(6), f"{NAME}.on_input": np.zeros(())}, "6 IA3 values for 8"),
    "magnitude of another shape": (
        up_down(NAME, (8, 2), (2, 6)) | {f"{NAME}.dora_scale": np.ones((7, 1))},
        "dora_scale of shape",
    ),
    "alpha of two numbers": (up_down(NAME, (8, 2), (2, 6)) | {f"{NAME}.alpha": np.ones(2)}, "alpha that is not one"),
    "alpha that is not finite": (up_down(NAME, (8, 2), (2, 6)) | {f"{NAME}.alpha": np.full((), np.nan)}, "not finite"),
    "a factor that is not finite": (
        {f"{NAME}.lora_up.weight": np.full((8, 2), np.inf), f"{NAME}.lora_down.weight": np.zeros((2, 6))},
        "not finite",
    ),
    "LoHa, one core": (
        {f"{CONV_NAME}.hada_w{i}_{x}": np.zeros((2, n)) for i in (1, 2) for x, n in (("a", 5), ("b", 4))}
        | {f"{CONV_NAME}.hada_t1": np.zeros((2, 2, 3, 3))},
        "lacks hada_t2",
    ),
    "LoKr of a product beyond the weight": (
        {f"{NAME}.lokr_w1_a": np.zeros((2**12, 1)), f"{NAME}.lokr_w1_b": np.zeros((1, 2**12))}
        | {f"{NAME}.lokr_w2_a": np.zeros((2**12, 1)), f"{NAME}.lokr_w2_b": np.zeros((1, 2**12))},
        "do not make",
    ),
    "LoKr, both": (
        {
            f"{NAME}.lokr_w1": np.zeros((2, 2)),
            f"{NAME}.lokr_w1_a": np.zeros((2, 1)),
            f"{NAME}.lokr_w2": np.zeros((4, 3)),
        },
        "both whole and in factors",
    ),
    "no tensors": ({}, "no LoRA is in it"),
    "two names for one module": (
        up_down(NAME, (8, 2), (2, 6)) | {f"unet.{LINEAR}.lora_A.weight": np.zeros((2, 6))},
        "under two names",
    ),
    "a network that is not here": (
        up_down("lora_branch_conv_in", (8, 2), (2, 6)),
        "changes a branch, which is not here",
    ),
    "numbers that do not count to the end": (
        {"unet:0:up": np.zeros((8, 2)), "unet:0:down": np.zeros((2, 6))} | {"unet:7:up": np.zeros((8, 2))},
        "2 numbered modules for the 1 of this unet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, load):
    tensors, message = REFUSED[name]
    with pytest.raises(FileError, match=message) as error:
        load(tensors)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


VALID = [
    {"lora_up.weight": (5, 2, 1, 1), "lora_down.weight": (2, 4, 3, 3), "alpha": (), "dora_scale": (5, 1, 1, 1)},
    {"lora_up.weight": (5, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_down.weight": (2, 4, 1, 1)},
    {"hada_w1_a": (5, 2), "hada_w1_b": (2, 36), "hada_w2_a": (5, 2), "hada_w2_b": (2, 36), "scalar": (1,)},
    {f"hada_{name}": (2, 5) if name.endswith("a") else (2, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    | {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)},
    {"lokr_w1": (1, 2), "lokr_w2": (5, 2, 3, 3), "alpha": ()},
    {"lokr_w1_a": (5, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (1, 2), "lokr_w2_b": (2, 18)},
    {"lokr_w1": (5, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (2, 2), "lokr_t2": (2, 2, 3, 3), "dora_scale": (1, 4, 1, 1)},
    {"lokr_w1": (5, 2), "lokr_w2": (1, 18)},
    {"a1.weight": (4, 2, 1, 1), "a2.weight": (2, 4, 1, 1), "b1.weight": (5, 2, 1, 1), "b2.weight": (2, 4, 3, 3)},
    {"oft_blocks": (1, 5, 5), "rescale": (5, 1, 1, 1), "alpha": ()},
    {"diff": (5, 4, 3, 3), "diff_b": (5,)},
    {"weight": (1, 5, 1, 1), "on_input": ()},
    {"ia3_l": (1, 4, 1, 1)},
]


@pytest.mark.parametrize("parts", VALID, ids=lambda parts: " ".join(parts))
def test_damaged_shapes(parts, networks, load, rng):
    """Whatever is done to one tensor's shape: refused in one line, or a change of the right shape."""

    def value(name, shape):
        return np.zeros(shape) if name == "on_input" else rng.standard_normal(shape)

    outcomes = set()
    for trial in range(60):
        damaged = dict(parts)
        if trial:
            name = rng.choice(sorted(parts))
            shape = list(parts[name])
            match int(rng.integers(4)):
                case 0:
                    shape.insert(rng.integers(len(shape) + 1), int(rng.choice([0, 1, 2, 3, 2**12])))
                case 1 if shape:
                    del shape[rng.integers(len(shape))]
                case 2 if shape:
                    shape[rng.integers(len(shape))] = int(rng.choice([0, 1, 2, 4, 5, 2**12]))
                case _:
                    shape = [int(n) for n in rng.permutation(shape)]
            damaged[name] = tuple(shape)
        try:
            lora = load({f"{CONV_NAME}.{name}": value(name, shape) for name, shape in damaged.items()})
            apply(networks, [(lora, 1, 1)])
            outcomes.add("taken")
        except FileError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"taken", "refused"}


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.ink"])
def test_pefts_magnitude_beside_kohyas_names(name, networks, pair, load, rng):
    magnitude, factors = rng.uniform(1, 2, 8), pair()
    ours = apply(networks, [(load(factors | {f"{NAME}.dora_scale": magnitude[:, None]}), 0.7, 1)])
    theirs = apply(networks, [(load(factors | {f"{NAME}.{name}": magnitude}, name="b"), 0.7, 1)])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_rank_0_is_nothing_and_noted(networks, pair, load):
    with pytest.warns(UserWarning, match=rf"1 modules of rank 0 change nothing: {TEXT_NAME}.lora_"):
        lora = load(pair() | up_down(TEXT_NAME, (8, 0), (0, 8)))
    assert lora.deltas.keys() == {"unet"}
    with pytest.warns(UserWarning, match="rank 0"):
        nothing = load(up_down(TEXT_NAME, (8, 0), (0, 8)))
    assert apply(networks, [(nothing, 1, 1)])["text_encoder"] is networks["text_encoder"]


@pytest.mark.parametrize("blocks", [(2, 4, 4), (2, 4, 2, 2)])
def test_rotations_keep_lengths_and_are_traced(blocks, networks, load, rng):
    """What OFT is for: angles between outputs' inputs change, their Gram matrix over inputs does not."""
    lora = load({f"{NAME}.oft_blocks": rng.standard_normal(blocks), f"{NAME}.alpha": np.zeros(())})
    weight, turned = (tree["unet"][f"{LINEAR}.kernel"] for tree in (networks, apply(networks, [(lora, 1, 1)])))
    assert largest_difference(weight, turned) > 0.1
    np.testing.assert_allclose(turned @ turned.T, weight @ weight.T, atol=2e-5)
    for strength in (0.5, 1.0):
        traced = jax.jit(lambda networks, lora, m: apply(networks, [(lora, m, m)]))(networks, lora, strength)
        assert largest_difference(traced, apply(networks, [(lora, strength, strength)])) < 2e-5


def test_names_without_end_take_no_time(load):
    begins = (
        "module." * 20_000,
        "a.lora_A." * 10_000,
        "." * 100_000,
        ".to_q_lora" * 10_000,
        "x.lora_A." + "y" * 100_000,
    )
    start = time.monotonic()
    for key in begins:
        with pytest.raises(FileError, match="1 keys belong to nothing here") as error:
            load({f"{key}.down.weight": np.zeros((2, 6))})
        assert len(str(error.value)) < 600
    assert time.monotonic() - start < 10  # measured at 0.5 s; time in proportion to the square would be hours


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_eight_bits(dtype, networks, pair, tmp_path):
    eighth = {key: torch.from_numpy(array).to(dtype) for key, array in pair().items()}
    eighth |= {f"{NAME}.alpha": torch.tensor(3.0).to(dtype)}
    save_file(eighth, tmp_path / "a.safetensors")
    save_file({key: value.float() for key, value in eighth.items()}, tmp_path / "b.safetensors")
    ours, theirs = (load_lora(tmp_path / f"{name}.safetensors", networks) for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, *(apply(networks, [(lora, 0.5, 0.5)]) for lora in (ours, theirs)))


@pytest.mark.parametrize("wrap", ["module.", "model.", "_orig_mod."])
def test_keys_are_shown_as_they_stand_in_the_file(wrap, load, pair):
    tensors = {f"{wrap}unet.{LINEAR}.lora_{half}.ink.weight": np.zeros((2, 3)) for half in "AB"}
    with pytest.raises(FileError, match=rf"does not fit: {wrap}unet.{LINEAR}.lora_A.ink.weight: has"):
        load(tensors)
    with pytest.raises(FileError, match=f"1 keys belong to nothing here: {wrap}unet.nowhere.lora_A.ink.weight"):
        load({f"{wrap}unet.nowhere.lora_A.ink.weight": np.zeros((2, 3))})


def test_first_of_many_strangers(load):
    tensors = {f"lora_unet_nowhere_{i}.alpha": np.zeros(()) for i in range(9)}
    with pytest.raises(FileError, match="9 keys belong to nothing here: .*nowhere_0.alpha.* and 6 more"):
        load(tensors)


FAMILIES = {
    "second tower": ("lora_te2_text_model_encoder_layers_0_mlp_fc1", (8, 6), "SDXL"),
    "second tower, diffusers": ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", (8, 6), "SDXL"),
    "second block": ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", (8, 6), "SDXL"),
    "second block, diffusers": ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", (8, 6), "SDXL"),
    "size ids": ("lora_unet_label_emb_0_0", (8, 6), "SDXL"),
    "width of the text": (NAME, (8, 2048), "SDXL"),
    "width of SD2's text": (NAME, (8, 1024), "SD2.x"),
    "Flux": ("lora_unet_double_blocks_0_img_attn_qkv", (8, 6), "Flux"),
    "SD3": ("transformer.transformer_blocks.0.attn.add_q_proj", (8, 6), "Stable Diffusion 3 or Flux"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_made_for_another_model(name, load, pair):
    module, (out, inputs), family = FAMILIES[name]
    tensors = pair() | up_down(module, (out, 2), (2, inputs))
    with pytest.raises(FileError, match=f"a LoRA for {family}, which this system is not"):
        load(tensors)


def test_file_that_is_not_there(networks, tmp_path):
    with pytest.raises(UserError, match="no such LoRA file"):
        load_lora(tmp_path / "nothing.safetensors", networks)
    with pytest.raises(UserError, match="unknown LoRA target"):
        load_lora(tmp_path, networks, target="brunch")


def test_numbers_of_resnets(load):
    tensors = {"unet:0:up": np.zeros((8, 2)), "unet:0:down": np.zeros((2, 6))}
    with pytest.raises(FileError, match="ResnetBlock2D"):
        load(tensors, {"unet": json.dumps(["ResnetBlock2D", "GEGLU"])})


# ------------------------------------------------------------------------------------------------ configs from others


@pytest.fixture
def load_peft(tmp_path, networks, rng):
    """A function from an adapter_config.json to the plug-in of a folder with one module's factors."""

    def from_config(config):
        name = f"base_model.model.{LINEAR}"
        tensors = {f"{name}.lora_A.weight": np.ones((4, 6)), f"{name}.lora_B.weight": np.ones((8, 4))}
        tensors = {key: np.asarray(array, np.float32) for key, array in tensors.items()}
        write_safetensors(tmp_path / "adapter_model.safetensors", tensors, {})
        write_json(tmp_path / "adapter_config.json", config)
        return load_lora(tmp_path, networks)

    return from_config


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 2, "r": 9}, 0.5),  # the file's own rank, 4, not the config's
        ({"lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "alpha_pattern": {"to_k": 8}}, 2.0),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 8, r"^down_blocks\.\d+\..*\.to_(k|v)": 12}}, 3.0),
    ],
)
def test_scale(config, scale, load_peft):
    assert load_peft(config).deltas["unet"][f"{LINEAR}.kernel"].scale == scale


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights too"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out in its config is not supported"),
        ({"peft_type": "VERA"}, "peft_type VERA; supported are"),
        ({"lora_alpha": "8"}, "alpha 8 in its config is not a number"),
        ({"lora_alpha": float("nan")}, "alpha nan"),
        ({"lora_alpha": 1, "r": 0}, "r 0 in its config"),
        ({"lora_alpha": True}, "alpha True"),
        ({"alpha_pattern": ["to_k"]}, "not a table"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "not a plain module name"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "not a plain module name"),
        ({"alpha_pattern": {"(.*)?(.*)?(.*)?(.*)?x": 1}}, "not a plain module name"),
        ({"alpha_pattern": {"(": 1}}, re.escape("pattern ( in its config")),
    ],
)
def test_config_that_is_refused(config, message, load_peft):
    with pytest.raises(FileError, match=message):
        load_peft(config)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 10000])
def test_header_config_that_is_no_table(text, load, pair):
    with pytest.raises(FileError, match="lora_adapter_metadata in its header is not a JSON object"):
        load(pair(), {"lora_adapter_metadata": text})
