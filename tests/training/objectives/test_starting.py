"""Trainings that start from weights that exist: they are these weights, bit for bit, and anything else is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from bdm_jax.commands.train import main
from bdm_jax.errors import UserError
from bdm_jax.formats.files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, read_json, write_json
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.models.config import CLIPTextConfig, TinyVAEConfig, VAEConfig, branch_config
from bdm_jax.models.functional import bind, init
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import DEMO, TOKENIZERS
from bdm_jax.systems.components import Component, load_component, save_component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training import loop
from bdm_jax.training.config import DataConfig, TrainConfig, remember, settle
from bdm_jax.training.feed import Feed
from bdm_jax.training.objectives.autoencoder import VAETask
from bdm_jax.training.objectives.backbone import BackboneTask
from bdm_jax.training.objectives.branch import BranchTask
from bdm_jax.training.objectives.controlnet import ControlNetTask
from bdm_jax.training.objectives.inversion import FILE, InversionTask
from bdm_jax.training.objectives.lora import LoRATask
from bdm_jax.training.objectives.starting import settled
from bdm_jax.training.objectives.text_tower import TextTask
from bdm_jax.training.sets import Sets

WIDTHS = (4, 4, 6, 6, 8)


@pytest.fixture(scope="module")
def bridge(backbone_folder, tmp_path_factory):
    """The backbone with a random branch, none of whose zero convolutions is zero, and its text tower; fp16."""
    backbone = BridgePipeline.from_pretrained(backbone_folder, "float32")
    tower = load_component(backbone_folder.parent / "tower", "float32")
    config = branch_config(backbone.unet.config, 16)
    params = {path: value + 0.03 if "controlnet_" in path else value for path, value in init(config, 5).items()}
    folder = tmp_path_factory.mktemp("bridge") / "model"
    backbone.replace(
        branch=Component(config, params),
        branch_text_encoder=tower,
        branch_tokenizer=Tokenizer.from_pretrained(TOKENIZERS / "chinese", 16),
        guidance=1.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six small images with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("cat 红灯笼", encoding="utf-8")
    return DataConfig(folder)


@pytest.fixture(scope="module")
def task(bridge):
    """A branch of the bridge's backbone and tower, trained on from what is named."""

    def make(path):
        towers = {"text_encoder": bridge / "branch_text_encoder", "tokenizer": bridge / "branch_tokenizer"}
        return BranchTask(backbone=bridge, **towers, start_from=path, style_in_caption=True)

    return make


@pytest.fixture(scope="module")
def trained(bridge, task, data, tmp_path_factory):
    """A run of one step from a copy of the branch, which its config names, and its batch; nothing is drawn."""
    folder, batches = tmp_path_factory.mktemp("trained"), []
    own = shutil.copytree(bridge / "branch", folder / "own")
    original = Feed.take

    def take(feed, *arguments):
        batch, numbers = original(feed, *arguments)
        batches.append(jax.device_get(batch))
        return batch, numbers

    config = TrainConfig(task=task(own), run=folder / "run", steps=1, batch_size=4, log_every=1, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Session, "_show", lambda session: None)
        patch.setattr(Feed, "take", take)
        assert loop.train(config)
    return config, batches[0]


def start(task, run, data):
    run.mkdir(exist_ok=True)
    return task.start(Sets(data, task.language, getattr(task, "only", ())), run, 0, jnp.dtype("float32"))


def zero_steps(task, run, data, folder):
    """What comes out where nothing is trained."""
    job = start(task, run, data)
    job.export(job.params, folder, {})
    return job


def assert_same_file(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert array.dtype == other[key].dtype and array.tobytes() == other[key].tobytes(), key


def as_published(bridge, path, dtype=torch.float16):
    """360's layout of a branch: one pickled file, a ControlNet's names and no config, here as a trainer wraps them."""
    tensors = load_file(bridge / "branch" / DIFFUSERS_WEIGHTS)
    torch.save({f"module.{key}": torch.from_numpy(array).to(dtype) for key, array in tensors.items()}, path)
    return path


@pytest.mark.parametrize("layout", ["pipeline", "folder", "heads by level", "file", "published"])
def test_a_branch_is_that_of_its_file_in_any_layout(bridge, task, data, tmp_path, layout):
    """A file without a config does not tell heads and groups: they are the backbone's (2 and 4 here, 8 and 32 usually).

    After no step at all the export is the file that was read.
    """
    path = {
        "pipeline": lambda: bridge,
        "folder": lambda: bridge / "branch",
        "heads by level": lambda: changed(
            shutil.copytree(bridge / "branch", tmp_path / "own"), attention_head_dim=[2, 2]
        ),
        "file": lambda: bridge / "branch" / DIFFUSERS_WEIGHTS,
        "published": lambda: as_published(bridge, tmp_path / "BDM1.0.bin"),
    }[layout]()
    job = zero_steps(task(path), tmp_path / "run", data, tmp_path / "export")
    assert {leaf.dtype for leaf in job.params["branch"].values()} == {jnp.dtype("float32")}
    assert_same_file(bridge / "branch" / DIFFUSERS_WEIGHTS, tmp_path / "export" / "branch" / DIFFUSERS_WEIGHTS)
    assert job.objective.sizes["branch"].num_heads == 2 and job.objective.sizes["branch"].norm_num_groups == 4


def test_bfloat16_is_read_as_fp32(bridge, task, data, tmp_path):
    job = start(task(as_published(bridge, tmp_path / "branch.bin", torch.bfloat16)), tmp_path / "run", data)
    ours = tree_to_torch(job.params["branch"])
    for key, array in load_file(bridge / "branch" / DIFFUSERS_WEIGHTS).items():
        np.testing.assert_array_equal(ours[key], torch.from_numpy(array).bfloat16().float().numpy(), err_msg=key)


def test_the_first_loss_is_that_of_the_network_itself(bridge, trained, data):
    """Of the pipeline that the weights lie in, evaluated by hand on the run's own first batch: fp32 on both sides, the
    sums of a compiled program in another order, which 1e-6 of the loss allows for.
    """
    config, batch = trained
    logged = json.loads((config.run / "metrics.jsonl").read_text().splitlines()[0])
    system = BridgePipeline.from_pretrained(bridge, "float32")
    objective = start(config.task, config.run, data).objective
    x, t, target = objective.denoising.noised(batch, jax.random.fold_in(jax.random.key(0), 0))

    @jax.jit
    def predict(branch, ids):
        text = Conditioning(bind(*system.branch_text_encoder)(ids))
        empty = Conditioning(jnp.repeat(bind(*system.text_encoder)(system.tokenizer([""])), 4, 0))
        return bind(*system.unet)(x, t, empty, bind(system.branch.config, branch)(x, t, text))

    def mean_error(branch):
        predicted = np.asarray(predict(branch, batch["texts"]["branch"]), np.float64)
        return np.mean(np.square(predicted - target))

    expected = mean_error(system.branch.params)
    assert logged["loss"] == pytest.approx(expected, rel=1e-6)
    mute = {path: 0 * v if "controlnet_" in path else v for path, v in system.branch.params.items()}
    assert abs(mean_error(mute) / expected - 1) > 1e-3, "the branch makes a difference"


def test_a_run_remembers_the_weights_and_can_do_without_them(trained, task, tmp_path):
    """They may move; other weights are refused by name; once there is a checkpoint they may be gone, not before."""
    config, own = trained[0], trained[0].task.start_from
    told = read_json(config.run / "config.json")
    assert told["task"]["start_from"] == str(own) and len(told["inputs"]["start_from.branch"]) == 32
    moved = Path(shutil.move(own, tmp_path / "moved"))
    assert loop.train(replace(config, task=task(moved)))
    fresh = replace(config, task=task(None))
    assert fresh.digest() != config.digest() == replace(config, task=task(moved)).digest()
    with pytest.raises(UserError, match=r"other settings \(task.start_from\)"):
        loop.train(fresh)
    tensors = load_file(moved / DIFFUSERS_WEIGHTS)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, moved / DIFFUSERS_WEIGHTS)
    with pytest.raises(UserError, match=rf"start_from.branch \({moved}\) is not what the run in .* trained with"):
        loop.train(replace(config, task=task(moved)))
    shutil.rmtree(moved)
    assert loop.train(replace(config, task=task(moved)))
    assert read_json(config.run / "config.json")["inputs"] == told["inputs"]
    with pytest.raises(UserError, match="task.start_from=.*moved: no such file or folder"):
        loop.train(replace(config, task=task(moved), run=tmp_path / "another"))


def changed(folder, tensors=None, **values):
    """A component folder with other tensors or values of its config, in place."""
    if tensors:
        save_file(tensors(load_file(folder / DIFFUSERS_WEIGHTS)), folder / DIFFUSERS_WEIGHTS)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **values})
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: changed(folder, cross_attention_dim=24),
            r"its branch does not fit: cross_attention_dim is 24, but 16 for the backbone and text_encoder here",
        ),
        (lambda folder: changed(folder, attention_head_dim=4), r"num_heads is 4, but 2 for"),
        (
            lambda folder: changed(folder, lambda own: {k: v for k, v in own.items() if k != "conv_in.bias"}),
            "missing.*conv_in.bias",
        ),
        (lambda folder: changed(folder, lambda own: {**own, "odd": own["conv_in.bias"]}), "odd"),
        (
            lambda folder: changed(folder, lambda own: {**own, "conv_in.bias": own["conv_in.bias"] * np.nan}),
            "conv_in.bias has values that are not finite",
        ),
        (lambda folder: folder.parent / "none", "task.start_from=.*none: no such file or folder"),
        (lambda folder: folder.parent / "model" / "unet", "holds unet, not branch"),
        (lambda folder: folder.parent, "has no folder branch, only copy"),
    ],
)
def test_a_branch_that_does_not_fit_is_one_line(bridge, backbone_folder, task, data, tmp_path, spoil, message):
    copy = shutil.copytree(bridge / "branch", tmp_path / "copy")
    shutil.copytree(bridge / "unet", tmp_path / "model" / "unet")
    with pytest.raises(UserError, match=message) as error:
        start(task(spoil(copy)), tmp_path / "run", data)
    assert "\n" not in str(error.value)


def test_a_branch_trained_with_hidden_padding_is_refused(bridge, task, data, tmp_path):
    copy = shutil.copytree(bridge, tmp_path / "copy")
    write_json(copy / "model_index.json", {**read_json(copy / "model_index.json"), "_bdm_masked": True})
    with pytest.raises(UserError, match="with the padding of prompts hidden"):
        start(task(copy), tmp_path / "run", data)


def test_an_autoencoder_keeps_its_sizes_and_its_scaling_factor(data, tmp_path):
    """The sizes of the task's own config make way, and stand in the run's; the export has the factor of before."""
    config = VAEConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=128, scaling_factor=0.7
    )
    save_component(tmp_path / "vae", config, init(config, 1))
    task = settled(VAETask(start_from=tmp_path / "vae"), tmp_path)
    assert task.vae == config
    job = zero_steps(task, tmp_path / "run", data, tmp_path / "export")
    assert_same_file(tmp_path / "vae" / DIFFUSERS_WEIGHTS, tmp_path / "export" / "vae" / DIFFUSERS_WEIGHTS)
    assert read_json(tmp_path / "export" / "vae" / "config.json") == read_json(tmp_path / "vae" / "config.json")
    assert {*job.inputs} == {"start_from.vae"}
    remember(TrainConfig(task=task, run=tmp_path / "run", steps=1, data=data))
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    shutil.rmtree(tmp_path / "vae")
    unsettled = VAETask(start_from=tmp_path / "vae")
    assert settled(unsettled, tmp_path / "run") == task, "the sizes stand in the run's config"
    tiny = TinyVAEConfig()
    save_component(tmp_path / "tiny", tiny, init(tiny, 0))
    with pytest.raises(UserError, match="its vae is a TinyVAEConfig, this trains a VAEConfig"):
        settled(VAETask(start_from=tmp_path / "tiny"), tmp_path)
    with pytest.raises(
        UserError, match=r"its vae does not fit: block_out_channels is \(4, 8\), but \(128, .* in task.vae"
    ):
        save_component(tmp_path / "vae", config, init(config, 1))
        start(VAETask(start_from=tmp_path / "vae"), tmp_path / "run", data)


def test_a_tower_keeps_its_tensors_and_needs_its_tokenizer(bridge, data, tmp_path):
    """Out of a whole pipeline; a tokenizer of as many tokens that gives them other numbers is not its own."""
    fields = {"vae": bridge / "vae", "tokenizer": bridge / "branch_tokenizer"}
    task = settled(TextTask(start_from=bridge, **fields), tmp_path)
    zero_steps(task, tmp_path / "run", data, tmp_path / "export")
    tower = Path("branch_text_encoder") / TRANSFORMERS_WEIGHTS
    assert_same_file(bridge / tower, tmp_path / "export" / tower)
    other = shutil.copytree(bridge / "branch_tokenizer", tmp_path / "tokenizer")
    words = read_json(other / "tokenizer.json")
    vocab = words["model"]["vocab"]
    vocab["红"], vocab["灯"] = vocab["灯"], vocab["红"]
    write_json(other / "tokenizer.json", words)
    with pytest.raises(UserError, match="is not the tokenizer of the branch_text_encoder in .*branch_tokenizer"):
        start(replace(task, tokenizer=other), tmp_path / "run", data)
    alone = shutil.copytree(bridge / "branch_text_encoder", tmp_path / "alone")
    start(replace(task, start_from=alone), tmp_path / "run", data)
    with pytest.raises(UserError, match=r"\d+ tokens, the branch_text_encoder in .* has embeddings of 21128: give"):
        start(replace(task, start_from=alone, tokenizer=TOKENIZERS / "english"), tmp_path / "run", data)


def test_a_backbone_keeps_its_tensors_and_must_fit(bridge, backbone_folder, data, tmp_path):
    fields = {"vae": bridge / "vae", "tokenizer": bridge / "tokenizer"}
    task = settled(BackboneTask(start_from=backbone_folder, **fields), tmp_path)
    job = zero_steps(task, tmp_path / "run", data, tmp_path / "export")
    for file in (Path("unet") / DIFFUSERS_WEIGHTS, Path("text_encoder") / TRANSFORMERS_WEIGHTS):
        assert_same_file(backbone_folder / file, tmp_path / "export" / file)
    assert {*job.inputs} == {"start_from.unet", "start_from.text_encoder", "tokenizer", "vae"}
    with pytest.warns(UserWarning, match="was trained with prediction_type v_prediction, not epsilon: it has to learn"):
        start(replace(task, prediction_type="epsilon"), tmp_path / "run", data)
    wide = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=6)
    save_component(tmp_path / "wide", wide, init(wide, 0))
    with pytest.raises(UserError, match="unet and vae do not belong together: latent channels 4 and 6"):
        start(replace(task, vae=tmp_path / "wide"), tmp_path / "run", data)
    model = shutil.copytree(backbone_folder, tmp_path / "model")
    narrow = CLIPTextConfig(**{**vars(task.text_encoder), "hidden_size": 8})
    save_component(model / "text_encoder", narrow, init(narrow, 0))
    with pytest.raises(UserError, match="unet and text_encoder do not belong together: text width 16 and 8"):
        start(settled(replace(task, start_from=model), tmp_path), tmp_path / "run", data)


def disturbed(job, rng):
    """Parameters of which none is what a fresh start gives."""
    return {
        name: {path: value + 0.1 * rng.standard_normal(value.shape, np.float32) for path, value in tree.items()}
        for name, tree in job.params.items()
    }


def assert_same_trees(one, other):
    assert one.keys() == other.keys()
    for name, tree in one.items():
        assert tree.keys() == other[name].keys()
        for path, value in tree.items():
            np.testing.assert_array_equal(value, other[name][path], err_msg=path)


def test_a_lora_goes_on_from_its_file(bridge, data, tmp_path, rng):
    """Linear layers and convolutions, both networks, fp32: bit for bit. Rank, alpha and layers must be the task's."""
    layers = {"modules": r"attn1\.to_q|conv[12]|proj_in", "networks": "both"}
    task = LoRATask(model=bridge, rank=3, alpha=2.0, **layers)
    job = start(task, tmp_path / "run", data)
    params = disturbed(job, rng)
    job.export(params, tmp_path / "mine" / "export", {})
    on = replace(task, start_from=tmp_path / "mine" / "export" / "mine.safetensors")
    job = start(on, tmp_path / "run", data)
    assert_same_trees(params, job.params)
    assert {"start_from.unet_lora", "start_from.text_encoder_lora"} < {*job.inputs}
    for fields, message in (
        ({"rank": 4}, "of rank 3, task.rank=4: give --task.rank 3"),
        ({"alpha": None}, "its alpha is 2, the task's 3: --task.alpha 2"),
        ({"modules": r"attn1\.to_[qk]|conv[12]|proj_in"}, r"layers of the unet differ: task.modules trains .*to_k"),
        ({"modules": "proj_in"}, r"layers of the unet differ: task.modules does not train .*"),
        ({"networks": "unet"}, "changes a text_encoder, which is not here"),
    ):
        with pytest.raises(UserError, match=message):
            start(replace(on, **fields), tmp_path / "run", data)


def test_a_controlnet_goes_on_from_its_folder(bridge, data, tmp_path, rng):
    task = ControlNetTask(model=bridge, hint_widths=WIDTHS)
    job = start(task, tmp_path / "run", data)
    job.export(disturbed(job, rng), tmp_path / "first", {})
    on = replace(task, start_from=tmp_path / "first")
    zero_steps(on, tmp_path / "run", data, tmp_path / "second")
    file = Path("controlnet") / DIFFUSERS_WEIGHTS
    assert_same_file(tmp_path / "first" / file, tmp_path / "second" / file)
    message = (
        r"does not fit: conditioning_embedding_out_channels is \(4, 4, 6, 6, 8\), but \(4, .*\) for task.hint_widths"
    )
    with pytest.raises(UserError, match=message):
        start(replace(on, hint_widths=(4,) * 5), tmp_path / "run", data)


def test_a_word_goes_on_from_its_file(bridge, data, tmp_path, rng):
    task = InversionTask(model=bridge, vectors=2, token="<mine>", begin="cat")
    job = start(task, tmp_path / "run", data)
    params = disturbed(job, rng)
    job.export(params, tmp_path / "export", {})
    on = replace(task, start_from=tmp_path / "export" / FILE)
    assert_same_trees(params, start(on, tmp_path / "run", data).params)
    with pytest.raises(UserError, match=r"of shape \(2, 16\); one of 3 vectors \(task.vectors\) of width 16"):
        start(replace(on, vectors=3), tmp_path / "run", data)


def test_the_command_takes_what_lies_beside_the_weights(capsys, recwarn):
    """Where nothing but the demo is, its backbone, tower and tokenizer are the run's, which is said; what is named
    wins.
    """
    assert main(["emoji-branch", "--task.start-from", str(DEMO), "--explain", "--mesh.data", "1"]) == 0
    assert "params/branch/conv_in.kernel" in capsys.readouterr().out
    (said,) = [str(warning.message) for warning in recwarn.list if "taken from" in str(warning.message)]
    for field, path in {"backbone": DEMO, "text_encoder": DEMO / "branch_text_encoder"}.items():
        assert f"task.{field}={path}" in said
    assert main(["emoji-branch", "--task.start-from", str(DEMO), "--task.backbone", "none", "--explain"]) == 2
    assert "none/unet: no such component folder" in capsys.readouterr().err


def test_the_command_s_sizes_are_the_weights_or_an_error(bridge, tmp_path):
    """A size that somebody has chosen is not overruled in silence; nor are settings of the system."""
    default = TrainConfig(task=BackboneTask(vae=tmp_path / "elsewhere"), run=tmp_path / "run", steps=1)
    given = replace(default, task=replace(default.task, start_from=bridge))
    with pytest.warns(UserWarning, match=r"taken from .*task.vae=.*task.guidance=1.5"):
        task = settle(given, default).task
    assert (task.vae, task.tokenizer, task.guidance) == (bridge / "vae", bridge / "tokenizer", 1.5)
    assert task.unet.block_out_channels == (8, 16) and task.prediction_type == "v_prediction"
    chosen = replace(given, task=replace(given.task, unet=replace(given.task.unet, sample_size=99), guidance=9.0))
    with pytest.raises(UserError, match=r"task.unet.sample_size=99: the weights in .* have 8: leave it out"):
        settle(chosen, default)
    with pytest.warns(UserWarning, match="taken from"):
        assert settle(replace(given, task=replace(given.task, guidance=9.0)), default).task.guidance == 9.0
