"""Weighted prompts and the reference's reading of them, through to the picture."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

from bdm_jax.plugins.install import with_embeddings
from bdm_jax.plugins.inversion import Embedding
from bdm_jax.sampling.batching import read_jobs
from bdm_jax.sampling.denoiser import denoise
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling


def pictures(pipeline, requests, *, batch_size=8, **settings):
    settings = Sampling(**{"steps": 2, "guidance": 5.0, **settings})
    return list(generate(pipeline, requests, settings, batch_size=batch_size))


@pytest.mark.parametrize(
    ("weighted", "text"),
    [
        (Request("(红:1.5)灯笼"), Request("红灯笼")),
        (Request("红", "低（质量）"), Request("红", "低质量")),
        (Request("红", english="a (cat)"), Request("红", english="a cat")),
        (
            Request("红", english="cat", english_negative="(cat:1.5)"),
            Request("红", english="cat", english_negative="cat"),
        ),
    ],
)
def test_weights_count_and_change_no_neighbour(tiny, weighted, text):
    alone = pictures(tiny, [text, text])
    one, other = pictures(tiny, [weighted, text])
    assert not np.array_equal(one, other)
    assert np.abs(other.astype(int) - alone[1]).max() <= 1  # one English prompt for both halves is another program


@pytest.fixture
def taught(tiny, rng):
    """The tiny bridge with two English words and a Chinese one."""
    english = [Embedding(word, rng.standard_normal((2, 16), np.float32)) for word in ("<lamp>", "inkstyle")]
    return with_embeddings(with_embeddings(tiny, english), [Embedding("某物", english[0].vectors)], "branch")


@pytest.mark.parametrize(
    ("requests", "notes"),
    [
        ([Request("某物", english="a <lamp>", english_negative="INKSTYLE")], []),
        ([Request("猫", english="a <lamp>"), Request("某物", english="inkstyle")], []),
        ([Request("inkstyle某物", english="<lamp>")], ["no English prompt has the added word 'inkstyle'"]),
        ([Request("猫")], ["no English prompt has the added words 'inkstyle', '<lamp>'", "no prompt has .* '某物'"]),
    ],
)
def test_words_that_no_prompt_has_are_noted(taught, requests, notes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(taught, requests, Sampling(2))  # nothing is drawn yet
    said = sorted(str(w.message) for w in caught if "the added word" in str(w.message))
    assert len(said) == len(notes) and all(map(re.search, notes, said)), said


def test_weights_compile_nothing_anew(tiny):
    pictures(tiny, [Request("红灯笼", english="cat")])
    programs = denoise.count()
    pictures(tiny, [Request("(红:1.2)灯[笼]", "（雪）", english="a (cat)")])
    assert denoise.count() == programs


def test_reference_pads_a_batch_to_its_longest_prompt_and_drops_the_branchs_weights(tiny):
    long = Request("猫" * 20, "(低:1.5)质量", english="a (cat)")
    short = replace(long, prompt="猫")

    def read(requests, **how):
        return read_jobs(tiny, Sampling(**how), (), requests)

    assert [read([request])[0].kind[0] for request in (long, short)] == [(1, 2), (1, 1)]
    jobs = read([long, short], reference=True)
    assert [job.kind[0] for job in jobs] == [(1, 2)] * 2
    for job in jobs:
        (chinese,), (english,) = job.texts["branch"], job.texts["backbone"]
        assert (chinese.weights == 1).all() and (english.weights[1] != 1).any()
    with_weight, without = (
        pictures(tiny, [Request(prompt), long], reference=True) for prompt in ("(红:1.5)灯笼", "红灯笼")
    )
    np.testing.assert_array_equal(with_weight[0], without[0])
    assert len(pictures(tiny, [long, short, short], reference=True, batch_size=2)) == 3
