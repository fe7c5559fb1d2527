"""What is computed once instead of for every step or guidance half changes nothing but the time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax.bench.cases import GuidedStep
from bdm_jax.models import functional
from bdm_jax.models.config import BDM_BRANCH, SD15_UNET, BranchConfig, UNetConfig
from bdm_jax.models.functional import bind
from bdm_jax.models.unet.branch import Residuals
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.runtime.costs import flops

TOLERANCE = 1e-5  # fp32: the same sums, in programs of other shapes

SMALL = dict(block_out_channels=(16, 32, 32), transformer_layers=(1, 1, 0), num_heads=4, norm_num_groups=8)
UNET = UNetConfig(**SMALL, cross_attention_dim=24)
BRANCH = BranchConfig(**SMALL, cross_attention_dim=20)
LATE = UNetConfig(**{**SMALL, "transformer_layers": (0, 1, 1)}, cross_attention_dim=24)  # text from level 1 on
TEXTS = 2


@pytest.fixture
def problem(rng, seed):
    """Networks, latents of two pictures, timesteps, and two texts for each, picture by picture."""

    def build(config):
        params = functional.init(config, seed)
        params = {k: v + 0.05 if k.startswith("controlnet_") else v for k, v in params.items()}
        latents = jnp.asarray(rng.standard_normal((2, 8, 12, 4), np.float32))
        tokens = rng.standard_normal((2 * TEXTS, 5, config.cross_attention_dim), np.float32)
        mask = jnp.asarray(rng.random((2 * TEXTS, 5)) < 0.7).at[:, 0].set(True)
        return params, latents, jnp.array([7.0, 640.0]), Conditioning(jnp.asarray(tokens), mask)

    return build


def run(config, params, function):
    return jax.jit(lambda params: function(bind(config, params)))(params)


def assert_equal(assert_parity, ours, expected):
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_parity(mine, theirs, TOLERANCE)


def twice(x):
    return jnp.repeat(x, TEXTS, axis=0)


@pytest.mark.parametrize("config", [UNET, LATE], ids=["first level", "second level"])
def test_what_comes_before_the_text_is_shared(problem, assert_parity, config):
    params, latents, t, cond = problem(config)
    ours = run(config, params, lambda net: net.encode(latents, t, cond))
    expected = run(config, params, lambda net: net.encode(twice(latents), twice(t), cond))
    assert_equal(assert_parity, ours, expected)


def test_a_branch_shares_too(problem, assert_parity):
    params, latents, t, cond = problem(BRANCH)
    ours = run(BRANCH, params, lambda net: net(latents, t, cond))
    assert_equal(assert_parity, ours, run(BRANCH, params, lambda net: net(twice(latents), twice(t), cond)))


def test_one_text_of_the_backbone_for_both_halves(problem, assert_parity, rng):
    """The backbone's encoder runs once; residuals for two texts are added to its rows, each for two."""
    params, latents, t, cond = problem(UNET)
    cond = Conditioning(cond.tokens[:2], cond.mask[:2])
    skips, mid = run(UNET, params, lambda net: net.encode(latents, t, cond))

    def noise(x):
        return jnp.asarray(rng.standard_normal((TEXTS * len(x), *x.shape[1:]), np.float32))

    residuals = Residuals(tuple(map(noise, skips)), noise(mid))
    ours = run(UNET, params, lambda net: net.decode(*residuals.add_to(skips, mid), t, cond))
    both = jax.tree.map(twice, (skips, mid))
    cond = jax.tree.map(twice, cond)
    assert_equal(
        assert_parity, ours, run(UNET, params, lambda net: net.decode(*residuals.add_to(*both), twice(t), cond))
    )


@pytest.mark.parametrize("config", [UNET, BRANCH], ids=["backbone", "branch"])
def test_keys_and_time_shifts_made_beforehand(problem, assert_parity, config):
    params, latents, t, cond = problem(config)
    step = jax.jit(lambda params, latents, t, cond: bind(config, params)(latents, t, cond))
    steps = jnp.array([999.0, 7.0, 640.0])
    shifts = run(config, params, lambda net: net.time_shifts(steps, cond, latents.dtype))
    known = run(config, params, lambda net: net.with_keys(cond))
    for index, t in enumerate(steps):
        row = {path: table[index][None] for path, table in shifts.items()}
        assert_equal(assert_parity, step(params, latents, row, known), step(params, latents, t[None], cond))


def test_counted_savings_at_full_size():
    """performance.md, part 3: 14.5% with one English prompt for both halves, 4.3% with two."""
    size, array = (64, 64), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = functional.abstract(SD15_UNET), functional.abstract(BDM_BRANCH)
    both, chinese = Conditioning(array(2, 77, 768)), Conditioning(array(2, 52, 1024))
    one = Conditioning(array(1, 77, 768))
    networks = GuidedStep(SD15_UNET, BDM_BRANCH)
    plain = flops(networks.step, params, array(2, *size, 4), (array(2), array(2)), both, chinese)
    shares = {}
    for name, english in {"two prompts": both, "one prompt": one}.items():
        known = jax.eval_shape(networks.beforehand, params, array(1), english, chinese)
        shares[name] = flops(networks.step, params, array(1, *size, 4), *known) / plain
    print(plain, shares)
    assert plain == pytest.approx(2.142e12, rel=0.01)
    assert shares["one prompt"] == pytest.approx(1 - 0.145, abs=0.003)
    assert shares["two prompts"] == pytest.approx(1 - 0.043, abs=0.003)
