"""LoRAs made here: a step is peft's, nothing else changes, and the file means the same to diffusers and to us."""

from dataclasses import replace

import diffusers
import jax
import numpy as np
import peft
import pytest
import reference
import torch
from reference import System, assert_same_step, key_of, scaling, step

from bdm_jax.app.spec import parse_spec
from bdm_jax.errors import UserError
from bdm_jax.models.config import CLIP_L_TEXT, SD15_UNET, branch_config
from bdm_jax.models.functional import abstract, bind, init
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import TOKENIZERS
from bdm_jax.plugins.install import with_loras
from bdm_jax.runtime.sharding import make_mesh
from bdm_jax.systems.components import load_component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.config import DataConfig, TrainConfig
from bdm_jax.training.digests import leaves
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.lora import LoRATask, merged, trained_shapes
from bdm_jax.training.state import abstract_state, make_optimizer, state_sharding

DATA = DataConfig(style="noto", concepts=40)
EVERYTHING = (
    r"attn[12]\.to_(q|k|v|out\.0)|conv[12]|conv_shortcut|proj_in|downsamplers\.0\.conv|time_emb_proj|ff\.net\.2"
)


@pytest.fixture
def made(backbone_folder, tmp_path, rng):
    """A job, a batch and parameters of which none is zero, by the task's fields."""

    def make(**fields):
        job, batch = reference.start(LoRATask(model=backbone_folder, rank=4, **fields), tmp_path / "run", DATA)
        params = {
            part: {path: value + 0.03 * rng.standard_normal(value.shape, np.float32) for path, value in tree.items()}
            for part, tree in job.params.items()
        }
        return job, batch, params

    return make


@pytest.fixture
def bridge_folder(backbone_folder, tmp_path):
    """The backbone with a random branch and its Chinese tower."""
    backbone = BridgePipeline.from_pretrained(backbone_folder, "float32")
    tower = load_component(backbone_folder.parent / "tower", "float32")
    unet = backbone.unet.config
    config = branch_config(unet, 16)
    branch = init(config, 5)
    branch = {path: value + 0.05 if "controlnet_" in path else value for path, value in branch.items()}
    folder = tmp_path / "bridge"
    backbone.replace(
        branch=type(tower)(config, branch),
        branch_text_encoder=tower,
        branch_tokenizer=Tokenizer.from_pretrained(TOKENIZERS / "chinese", 16),
    ).save_pretrained(folder)
    return folder


def torch_value(path, array):
    """In torch's layout: (r,in[,h,w]) and (out,r[,1,1])."""
    return np.asarray(array).transpose((1, 0) if array.ndim == 2 else (3, 2, 0, 1)).copy()


def with_peft(system, params, alpha, rank=4):
    """peft's layers in both networks, with our values; name here -> torch's parameter."""
    found = {}
    for part, network in (("unet", system.unet), ("text_encoder", system.text)):
        tree = params.get(f"{part}_lora", {})
        if not tree:
            continue
        prefix = "" if part == "unet" else "text_model."
        modules = sorted({path.rsplit(".", 2)[0] for path in tree})
        names = dict(network.named_modules())
        targets = [module if module in names else module.removeprefix(prefix) for module in modules]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
        network = peft.inject_adapter_in_model(config, network)
        names = dict(network.named_modules())
        for module, target in zip(modules, targets, strict=True):
            for half, name in (("down", "lora_A"), ("up", "lora_B")):
                weight = getattr(names[target], name)["default"].weight
                weight.data.copy_(torch.from_numpy(torch_value(half, tree[f"{module}.{half}.kernel"])))
                found[part, f"{module}.{half}.kernel"] = weight.requires_grad_()
    return found


@pytest.mark.parametrize(
    ("fields", "alpha"), [({}, 4), ({"networks": "both", "modules": EVERYTHING, "alpha": 2.0}, 2.0)]
)
def test_a_step_is_peft_s(made, backbone_folder, fields, alpha):
    """Also with every kind of layer: 3x3, strided and 1x1 convolutions, linear layers, the text tower."""
    job, batch, params = made(**fields)
    gradients, after = step(job, batch, params)
    system = System(backbone_folder)
    with torch.enable_grad():
        weights = with_peft(system, params, alpha)
        system.loss(batch["moments"], batch["texts"]["backbone"], scaling(job), key_of()).backward()
    assert len(weights) == sum(map(len, params.values()))
    theirs = {name: weight.grad.numpy().copy() for name, weight in weights.items()}
    adamw_input = list(weights.values())
    reference.adamw(adamw_input)
    assert_same_step(
        (
            f"{part} {path}",
            torch_value(path, gradients[f"{part}_lora"][path]),
            theirs[part, path],
            torch_value(path, after[f"{part}_lora"][path]),
            weight.detach().numpy(),
        )
        for (part, path), weight in weights.items()
    )


def test_it_begins_without_effect(backbone_folder, tmp_path):
    job, batch = reference.start(LoRATask(model=backbone_folder), tmp_path / "run", DATA)
    x, t = np.ones((4, 8, 8, 4), np.float32), np.arange(4)
    sizes, ids = job.objective.sizes, batch["texts"]["backbone"]
    found = job.objective.predict(job.params, job.frozen, ids, x, t)
    text = bind(sizes["text_encoder"], job.frozen["text_encoder"])(ids)
    np.testing.assert_array_equal(found, bind(sizes["unet"], job.frozen["unet"])(x, t, Conditioning(text)))
    assert sum(path.endswith("down.kernel") for path in job.params["unet_lora"]) == 8 * attention_layers(job)


def attention_layers(job):
    return sum(path.endswith("attn1.to_q.kernel") for path in abstract(job.objective.sizes["unet"]))


def test_the_default_layers_of_sd15_are_kohya_s_attention_projections():
    """16 transformers of two attentions of four projections; the rank is where the state's size comes from."""
    task = LoRATask(networks="both", rank=8)
    trees = trained_shapes(task, {"unet": SD15_UNET, "text_encoder": CLIP_L_TEXT})
    assert len(trees["unet_lora"]) == 2 * 16 * 8 and len(trees["text_encoder_lora"]) == 2 * 12 * 4
    state = abstract_state(trees, make_optimizer(reference.OPTIMIZER, 10))
    assert leaves(state).keys() == leaves(state_sharding(make_mesh(), state)).keys(), "every leaf has one rule"


@pytest.fixture
def run_of(tmp_path):
    """Two steps of a task through the whole loop; the run's folder."""

    def run(task, data=DATA, **changes):
        values = {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2, "sample_every": 1000}
        optimizer = replace(reference.OPTIMIZER, learning_rate=0.05)
        config = TrainConfig(task=task, run=tmp_path / "mine", data=data, optimizer=optimizer, **{**values, **changes})
        assert train(config)
        return tmp_path / "mine"

    return run


def digest(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_file_means_the_same_to_diffusers_and_to_us(run_of, backbone_folder, rng, assert_parity):
    before = digest(backbone_folder)
    task = LoRATask(model=backbone_folder, rank=4, alpha=2.0, networks="both", modules=EVERYTHING)
    run = run_of(task)
    assert digest(backbone_folder) == before, "the model's folder was written to"
    assert (run / "samples" / "0000002.png").is_file()
    (file,) = (run / "export").iterdir()
    assert file.name == "mine.safetensors"
    plain = BridgePipeline.from_pretrained(backbone_folder, "float32")
    ours = with_loras(plain, [parse_spec(str(file))])
    changed = {k for k, v in ours.unet.params.items() if not np.array_equal(v, plain.unet.params[k])}
    assert changed == {
        path.replace(".down.kernel", ".kernel")
        for path in trained_shapes(task, {"unet": plain.unet.config, "text_encoder": plain.text_encoder.config})[
            "unet_lora"
        ]
        if path.endswith(".down.kernel")
    }
    system = System(backbone_folder)
    theirs = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(backbone_folder / "vae"),
        text_encoder=system.text,
        tokenizer=None,
        unet=system.unet,
        scheduler=system.schedule,
        safety_checker=None,
        feature_extractor=None,
    )
    theirs.load_lora_weights(file)
    x, t = rng.standard_normal((2, 8, 8, 4), np.float32), np.array([3, 700])
    ids = plain.tokenizer(["a dog", "red apple"])
    states = theirs.text_encoder(torch.from_numpy(ids).long()).last_hidden_state
    text = bind(*ours.text_encoder)(ids)
    assert_parity(text, states.numpy())
    expected = theirs.unet(reference.nchw(x), torch.from_numpy(t), encoder_hidden_states=states).sample
    found = bind(*ours.unet)(x, t, Conditioning(text))
    assert_parity(found, expected.permute(0, 2, 3, 1).numpy())
    unchanged = bind(*plain.unet)(x, t, Conditioning(bind(*plain.text_encoder)(ids)))
    assert np.abs(np.asarray(found) - np.asarray(unchanged)).max() > 1e-2, "the LoRA has an effect"


def test_the_merged_preview_is_what_was_trained(made, backbone_folder, rng, assert_parity):
    job, batch, params = made(networks="both", modules=EVERYTHING, alpha=3.0)
    system, ids = BridgePipeline.from_pretrained(backbone_folder, "float32"), batch["texts"]["backbone"]
    x, t = rng.standard_normal((4, 8, 8, 4), np.float32), np.array([0, 300, 600, 999])
    drawn_with = merged(system, ("unet", "text_encoder"), 3.0 / 4, params)
    text = Conditioning(bind(*drawn_with.text_encoder)(ids))
    assert_parity(bind(*drawn_with.unet)(x, t, text), job.objective.predict(params, job.frozen, ids, x, t), 1e-5)


@pytest.mark.parametrize("networks", ["unet", "both"])
def test_a_lora_of_the_branch(run_of, bridge_folder, networks):
    before = digest(bridge_folder)
    run = run_of(LoRATask(model=bridge_folder, rank=2, target="branch", networks=networks))
    assert digest(bridge_folder) == before
    plain = BridgePipeline.from_pretrained(bridge_folder, "float32")
    ours = with_loras(plain, [parse_spec(str(run / "export" / "mine.safetensors"))])
    changed = {"branch"} | ({"branch_text_encoder"} if networks == "both" else set())
    for part in ("unet", "text_encoder", "branch", "branch_text_encoder"):
        one, other = getattr(plain, part).params, getattr(ours, part).params
        assert (part in changed) == any(not np.array_equal(one[path], other[path]) for path in one), part


def test_frozen_trees_stay_byte_for_byte(made):
    """No frozen array is in the state; a step leaves those it was given as they were."""
    job, batch, params = made(networks="both")
    before = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), job.frozen)
    assert set(params) == {"unet_lora", "text_encoder_lora"}
    step(job, batch, params)
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), job.frozen) == before


def test_remat_computes_the_same(made):
    job, batch, params = made()
    plain = jax.grad(lambda p: job.objective.loss(p, job.frozen, batch, key_of())[0])(params)
    objective = replace(job.objective, remat="blocks")
    again = jax.grad(lambda p: objective.loss(p, job.frozen, batch, key_of())[0])(params)
    for path, gradient in plain["unet_lora"].items():
        np.testing.assert_allclose(again["unet_lora"][path], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "task.rank=0"),
        ({"alpha": -1.0}, "task.alpha=-1.0: both must be positive"),
        ({"modules": "attn9"}, "task.modules=attn9: fits no layer of the unet"),
        ({"modules": "attn("}, "no regular expression"),
        ({"target": "branch"}, "has no branch"),
        ({"prompts": ("",)}, "task.prompts"),
        ({"only": ("1f95a-nothing",)}, "unknown record"),
        ({"caption_dropout": 2.0}, "task.caption_dropout=2.0"),
    ],
)
def test_bad_input_is_named(backbone_folder, tmp_path, fields, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        reference.start(LoRATask(model=backbone_folder, **fields), tmp_path / "run", DATA)
