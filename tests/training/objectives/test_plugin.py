"""Where plug-ins get their pictures from: plain folders, a few records of a set; and the configs that make them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image

from bdm_jax import configs
from bdm_jax.data.captions import caption
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.config import DataConfig, check
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.controlnet import ControlNetTask
from bdm_jax.training.objectives.dreambooth import DreamBoothTask
from bdm_jax.training.objectives.finetune import FinetuneTask
from bdm_jax.training.objectives.inversion import InversionTask
from bdm_jax.training.objectives.lora import LoRATask
from bdm_jax.training.objectives.plugin import PluginTask
from bdm_jax.training.sets import select


@pytest.fixture
def photos(tmp_path, rng):
    """Three photographs of three sizes; two have captions, one of them two; a file that is none of it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("b.png", (150, 130)), ("a.JPG", (128, 300)), ("c.webp", (200, 200))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "a.txt").write_text("a dog on grass\n\na brown dog\n")
    (folder / "c.txt").write_text("一只狗")
    (folder / "notes.md").write_text("nothing")
    return folder


def test_a_folder_of_photographs(photos):
    source = open_source(photos)
    assert [source[i]["key"] for i in range(len(source))] == ["a.JPG", "b.png", "c.webp"]
    assert [source[i]["captions"] for i in range(3)] == [["a dog on grass", "a brown dog"], [], ["一只狗"]]
    rng = np.random.default_rng(0)
    assert {caption(source[0], "en", rng) for _ in range(20)} == {"a dog on grass", "a brown dog"}
    with pytest.raises(UserError, match="b.png"):
        caption(source[1], "en", rng)
    np.testing.assert_array_equal(select(source, DataConfig(folder=photos), "en"), [0, 1, 2])
    np.testing.assert_array_equal(select(source, DataConfig(folder=photos), "en", ("c.webp", "a.JPG")), [0, 2])
    with pytest.raises(UserError, match="have no styles and concepts"):
        select(source, DataConfig(folder=photos, style="noto"), "en")
    with pytest.raises(UserError, match=r"b\.pnk.*did you mean 'b\.png'"):
        select(source, DataConfig(folder=photos), "en", ("b.pnk",))


def test_pictures_become_as_large_as_the_model_s_and_prompts_need_no_captions(photos, backbone_folder, tmp_path):
    task = FinetuneTask(model=backbone_folder, prompts=("a photo of sks dog",), caption_dropout=0.0)
    job, batch = reference.start(task, tmp_path / "run", DataConfig(folder=photos))
    assert batch["moments"].shape == (4, 8, 8, 8) and len(job.parts[0].source) == 3
    ids = batch["texts"]["backbone"]
    assert (ids == ids[0]).all()
    tokenizer = Tokenizer.from_pretrained(backbone_folder / "tokenizer")
    assert ids[0].tolist() == tokenizer(["a photo of sks dog"])[0].tolist()


def test_another_picture_under_the_same_name_is_seen(photos, backbone_folder, tmp_path):
    task, data = FinetuneTask(model=backbone_folder, prompts=("dog",)), DataConfig(folder=photos)
    before, _ = reference.start(task, tmp_path / "run", data)
    Image.new("RGB", (140, 140), "red").save(photos / "b.png")
    after, _ = reference.start(task, tmp_path / "run", data)
    same = [np.array_equal(*(job.parts[0].source[i]["moments"] for job in (before, after))) for i in range(3)]
    assert same == [True, False, True]


def test_captions_go_into_prompts(photos, backbone_folder):
    texts = Captions(Tokenizer.from_pretrained(backbone_folder / "tokenizer"), "en", prompts=("{}, oil",))
    record = open_source(photos)[0]
    assert texts.name(record) == "a dog on grass, oil"
    expected = texts.tokenizer(["a dog on grass, oil", "a brown dog, oil"])
    assert np.array_equal(texts.all_ids([record])[0], expected)
    word = replace(texts, word="<mine>")
    assert word.name(record) == "<mine>, oil"
    assert np.array_equal(word.ids(record, np.random.default_rng(0)), texts.tokenizer(["<mine>, oil"])[0])


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (LoRATask, {"networks": "both", "remat": "blocks"}),
        (FinetuneTask, {"text_encoder": True}),
        (DreamBoothTask, {"class_images": "photos"}),
        (InversionTask, {"token": "<new>", "prompts": ("{}",)}),
        (ControlNetTask, {"hint_widths": (4, 4, 6, 6, 8), "offset_noise": 0.1, "min_snr": 5.0}),
    ],
)
def test_all_take_the_types_of_accelerators(photos, backbone_folder, tmp_path, task, fields):
    """Traced only: bf16 in, an fp32 loss and gradients of every trained array out; shapes are those foretold."""
    values = {"prompts": ("a dog",), **fields}
    values = {name: photos if value == "photos" else value for name, value in values.items()}
    made = task(model=backbone_folder, **values)
    job, batch = reference.start(made, tmp_path / "run", DataConfig(folder=photos), "bfloat16")
    foretold, others = made.objective(made.sizes()).shapes()

    def shapes(tree):
        return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)

    assert shapes(job.params) == shapes(foretold) and shapes(job.frozen) == shapes(others)
    assert {leaf.dtype for leaf in jax.tree.leaves(job.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(job.frozen)} <= {jnp.dtype("bfloat16")}
    working = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), job.params)
    loss = jax.value_and_grad(lambda p: job.objective.loss(p, job.frozen, batch, jax.random.key(0))[0])
    value, gradients = jax.eval_shape(loss, working)
    assert value.dtype == jnp.float32 and value.shape == () and shapes(gradients) == shapes(foretold)


PLUGINS = [name for name in configs.names() if isinstance(configs.load(name).task, PluginTask)]


def test_there_is_one_for_each_kind():
    kinds = {"lora", "dreambooth", "inversion", "controlnet"}
    expected = {f"sd15-{kind}" for kind in kinds | {"finetune"}} | {f"emoji-{kind}" for kind in kinds | {"style"}}
    expected |= {f"kolors-{kind}" for kind in ("concept", "quality", "base-v5p", "base-v5e", "lora")}
    assert set(PLUGINS) == expected


@pytest.mark.parametrize("name", PLUGINS)
def test_configs_pass_their_check(name, tmp_path):
    config = replace(configs.load(name), run=tmp_path / "run")
    check(config)
    text = configs.__path__[0] + f"/{name.replace('-', '_')}.py"
    assert f"python train.py {name}" in open(text).read()
    if name.startswith("emoji"):
        trained, frozen = config.task.objective(config.task.sizes()).shapes()
        assert trained and frozen and not set(trained) & set(frozen)
