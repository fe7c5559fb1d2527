"""Prompts that change from step to step and prompts of several parts, through to the latents: against the same thing
spelled out with diffusers' and transformers' own networks and schedulers.
"""

import numpy as np
import pytest

from bdm_jax.diffusion.samplers import SAMPLERS
from bdm_jax.errors import UserError
from bdm_jax.sampling.batching import batches, read_jobs
from bdm_jax.sampling.denoiser import ResidualNetwork
from bdm_jax.sampling.reading import RowTexts, SourceTexts, source_texts
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.sampling.steps import guidance_rows, step_table

TOLERANCE = 1e-4  # fp32 on both sides, of the largest latent


def test_prompts_that_change_on_the_way(latents, plain, assert_parity):
    """Six steps: the prompt changes after three, its negative takes turns, the English prompt changes after two."""
    edited = Request("[红灯笼:猫:0.5]", "［低质量｜模糊］", "a [film grain:night:2]", "blurry", seed=5)
    by_hand = Request("红灯笼", "低质量", "a film grain", "blurry", seed=5)

    def guide(i, predict):
        negative = predict(0, 3 * (i % 2))
        return negative + 3.0 * (predict(1 if i < 2 else 2, 1 if i < 3 else 2) - negative)

    theirs = plain(by_hand, guide=guide, more=(["a night"], ["猫", "模糊"]))
    assert_parity(latents([edited]), theirs, TOLERANCE)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_prompts_of_several_parts(latents, plain, assert_parity, guidance):
    composed = Request("红灯笼 AND 猫 :0.7", "低质量", "film grain", "blurry", seed=5)
    by_hand = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)

    def guide(i, predict):
        n = predict(0, 0)
        return n + guidance * ((predict(1, 1) - n) + 0.7 * (predict(1, 2) - n))

    theirs = plain(by_hand, guide=guide, more=([], ["猫"]))
    assert_parity(latents([composed], guidance=guidance), theirs, TOLERANCE)


def test_a_neighbour_without_such_signs_is_as_alone(latents):
    text = Request("红灯笼", english="film grain", seed=5)
    edited = Request("[红灯笼:猫:0.5] AND 狗", english="film grain", seed=6)
    np.testing.assert_array_equal(latents([text, edited])[0], latents([text])[0])


def never(*_):
    raise AssertionError("plain prompts need no steps")


@pytest.mark.parametrize("prompt", ["红灯笼", "(红:1.3) [灯] BREAK 笼: |", r"\[a:b:0.5\]", "a and b"])
def test_plain_prompts_are_two_texts(tiny, prompt):
    (job,) = read_jobs(tiny, Sampling(), (), [Request(prompt, "低")], never)
    assert job.sources["branch"] == SourceTexts(("低", prompt)) and job.texts["branch"][0].ids.shape[0] == 2


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "[a|b]", "a AND b", "<lora:ink:1>"])
def test_the_reference_knows_none_of_it(tiny, prompt):
    (job,) = read_jobs(tiny, Sampling(reference=True), (), [Request(prompt)], never)
    assert job.sources["branch"].texts == ("", prompt)


def test_each_pass_counts_its_own_rows():
    found = source_texts("低", "[红:蓝:0.5]", lambda: (4, 2))
    assert found.texts == ("低", "红", "蓝") and found.negatives == 1
    red, blue = RowTexts(0, (1,)), RowTexts(0, (2,))
    assert found.rows == {4: (red, red, blue, blue), 2: (red, blue)}


def test_batches_hold_what_changes_alike(tiny):
    prompts = ["[红:蓝:0.5]", "[猫:狗:0.5]", "[猫:狗:0.25]", "猫", "狗", "猫 AND 狗", "猫 AND 狗:2"]
    jobs = [read_jobs(tiny, Sampling(), (), [Request(prompt)], lambda *_: (4,))[0] for prompt in prompts]
    assert [len(batch) for batch in batches(jobs, 8)] == [2, 1, 2, 1, 1]


def test_parts_of_both_languages_go_together(tiny):
    request = Request("猫 AND 狗:2", english="cat AND dog:2")
    (job,) = read_jobs(tiny, Sampling(), (), [request], lambda *_: (2,))
    row = guidance_rows(Sampling(guidance=3.0), 2, False, True, job.sources)[0]
    assert dict(row.plan.texts) == {"backbone": (0, 1, 2), "branch": (0, 1, 2)} and row.weights == (-8, 3, 6)
    one_text = guidance_rows(Sampling(guidance=3.0), 2, True, True, job.sources)[0]
    assert dict(one_text.plan.texts) == {"backbone": (0, 0, 0), "branch": (0, 1, 2)}
    (job,) = read_jobs(tiny, Sampling(), (), [Request("猫:0.5 AND 狗:0.5")], lambda *_: (2,))
    row = guidance_rows(Sampling(guidance=1.0), 2, True, True, job.sources)[0]
    assert dict(row.plan.texts) == {"backbone": (0, 0), "branch": (1, 2)} and row.weights == (0.5, 0.5)


def test_guess_mode_silences_the_branch_for_every_negative_text(tiny):
    (job,) = read_jobs(tiny, Sampling(), (), [Request("猫 AND 狗", "[低:高:0.5]")], lambda *_: (2,))
    settings = Sampling(guidance=3.0, guess=True)
    rows = guidance_rows(settings, 2, True, True, job.sources)
    steps = SAMPLERS["ddim"](tiny.schedule, 2)
    network = ResidualNetwork("branch", tiny.branch.config, "branch")
    table = step_table(settings, steps, rows, rows[1].plan, [network], [], negatives=job.sources["branch"].negatives)
    assert rows[1].plan["branch"] == (1, 2, 3)
    assert (table.strengths["branch"][:, 0] == 0).all() and (table.strengths["branch"][:, 1:] > 0).all()


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (Request("a", "b AND c"), {}, "the negative prompt 'b AND c' has AND"),
        (Request("a AND b", english="c AND d:2"), {}, "the prompts of both languages have AND"),
        (Request("a AND b"), {"guidance_rescale": 0.5}, "guidance rescale does not go with prompts of several parts"),
        (Request("a AND b"), {"english_guidance": 2.0}, "english guidance does not go with prompts of several parts"),
        (Request("a AND b"), {"english_guidance": 0.0}, "english guidance does not go with prompts of several parts"),
        (Request("[a|b:0.5]"), {}, "is not understood"),
        (Request("a <lora:ink:0.8>"), {}, "the prompt names the LoRA 'ink': give its folder, with --lora-dir"),
        (Request("a", english="<hypernet:x:1>"), {}, "hypernetworks are not supported"),
    ],
)
def test_what_is_not_understood(tiny, request_, settings, message):
    with pytest.raises(UserError, match=message):
        read_jobs(tiny, Sampling(**settings), (), [request_], lambda *_: (2,))
