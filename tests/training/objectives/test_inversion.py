"""Textual inversion: a step is PyTorch's, only the word's rows move, and the file says the same to diffusers and us."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from reference import System, assert_same_step, key_of, scaling, step
from safetensors.numpy import load_file

from bdm_jax.errors import UserError
from bdm_jax.paths import TOKENIZERS
from bdm_jax.plugins.install import with_embeddings
from bdm_jax.plugins.inversion import Embedding, load_embeddings
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import encode
from bdm_jax.training.config import DataConfig, TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.inversion import FILE, InversionTask

DATA = DataConfig(style="fluent")
FIELDS = {"only": ("1f408-200d-2b1b",), "token": "<mine>", "begin": "cat"}


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_step_is_pytorch_s(backbone_folder, tmp_path, rng, vectors):
    """The table grows by rows of which alone the gradient is taken, as diffusers' script has it."""
    task = InversionTask(model=backbone_folder, vectors=vectors, **FIELDS)
    job, batch = reference.start(task, tmp_path / "run", DATA)
    params = {"word": {"vectors.embedding": rng.standard_normal((vectors, 16), np.float32) * 0.2}}
    gradients, after = step(job, batch, params)
    system = System(backbone_folder)
    old = system.text.get_input_embeddings().weight.shape[0]
    ids = batch["texts"]["backbone"]
    assert (ids >= old).sum() == vectors * len(ids) and ids.max() == old + vectors - 1
    with torch.enable_grad():
        system.text.resize_token_embeddings(old + vectors, mean_resizing=False)
        table = system.text.get_input_embeddings().weight
        with torch.no_grad():
            table[old:] = torch.from_numpy(params["word"]["vectors.embedding"])
        table.requires_grad_(True)
        system.loss(batch["moments"], batch["texts"]["backbone"], scaling(job), key_of()).backward()
        rows = table.detach()[old:].clone().requires_grad_()
        rows.grad = table.grad[old:].clone()
    theirs = rows.grad.numpy().copy()
    reference.adamw([rows])
    found = [tree["word"]["vectors.embedding"] for tree in (gradients, after)]
    # A few vectors, behind all layers of both networks: 1e-6 to 1.6e-5 over a dozen seeds. In the worst one ours is
    # off by 1.8e-5 from torch in fp64, and torch in fp32 by 4e-6 (group norm's statistics in one pass).
    assert_same_step([("rows", found[0], theirs, found[1], rows.detach().numpy())], tolerance=3e-5)


def test_it_begins_as_its_word(backbone_folder, tmp_path):
    for begin, count in (("cat", 2), ("cat dog", 3)):
        task = InversionTask(model=backbone_folder, vectors=count, **{**FIELDS, "begin": begin})
        job, _ = reference.start(task, tmp_path / "run", DATA)
        plain = BridgePipeline.from_pretrained(backbone_folder, "float32")
        ours = with_embeddings(plain, [Embedding("<mine>", np.asarray(job.params["word"]["vectors.embedding"]))])
        words = " ".join((begin.split() * 3)[:count])
        one = encode(ours.tokenizer, *ours.text_encoder, ["a photo of <mine>, red"]).tokens
        other = encode(plain.tokenizer, *plain.text_encoder, [f"a photo of {words}, red"]).tokens
        np.testing.assert_array_equal(one, other)


class Diffusers(TextualInversionLoaderMixin):
    """diffusers' loader with a tokenizer and a tower of its own."""

    hf_device_map = None
    components: dict = {}

    def __init__(self, folder):
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZERS / "english")
        self.text_encoder = System(folder).text


@pytest.mark.parametrize(("target", "vectors"), [("backbone", 2)])
def test_only_the_word_is_another_and_diffusers_reads_it(backbone_folder, tmp_path, assert_parity, target, vectors):
    task = InversionTask(model=backbone_folder, vectors=vectors, target=target, **FIELDS)
    optimizer = replace(reference.OPTIMIZER, learning_rate=0.1)
    run = tmp_path / "run"
    assert train(TrainConfig(task=task, run=run, steps=2, batch_size=2, log_every=1, data=DATA, optimizer=optimizer))
    assert (run / "samples" / "0000002.png").is_file()
    file = run / "export" / FILE
    (embedding,) = load_embeddings(file)
    assert embedding.token == "<mine>" and embedding.vectors.shape == (vectors, 16)
    assert list(load_file(file)) == ["<mine>"]
    plain = BridgePipeline.from_pretrained(backbone_folder, "float32")
    ours = with_embeddings(plain, [embedding])
    prompts = ["a photo of <mine>, oil", "a dog"]
    states = np.asarray(encode(ours.tokenizer, *ours.text_encoder, prompts).tokens)
    begun = np.asarray(encode(plain.tokenizer, *plain.text_encoder, ["a photo of cat cat, oil", "a dog"]).tokens)
    np.testing.assert_array_equal(states[1], begun[1])
    assert np.abs(states[0] - begun[0]).max() > 1e-3, "it was trained"
    theirs = Diffusers(backbone_folder)
    theirs.load_textual_inversion(str(file))
    texts = theirs.maybe_convert_prompt(prompts, theirs.tokenizer)
    ids = theirs.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert_parity(states, theirs.text_encoder(ids).last_hidden_state.numpy(), 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token": "cat"}, "token 'cat': a word of the vocabulary already"),
        ({"token": "two\0words"}, "no text that can be written"),
        ({"vectors": 0}, "task.vectors=0"),
        ({"begin": ""}, "no word to begin from"),
        ({"prompts": ("a photo",)}, "lacks {}"),
        ({"target": "branch"}, "has no branch"),
        ({"only": ("1f408-200d-2b1c",)}, "did you mean"),
    ],
)
def test_bad_input_is_named(backbone_folder, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        reference.start(InversionTask(model=backbone_folder, **{**FIELDS, **fields}), tmp_path / "run", DATA)
