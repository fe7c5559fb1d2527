"""Token merging: which tokens go where, and what is exact about it (whole pictures: pipeline/test_approximations)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax.models import functional
from bdm_jax.models.attention import attention
from bdm_jax.models.unet.merging import match
from bdm_jax.runtime.costs import flops


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 4)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_the_most_alike_are_merged(rng, size, ratio):
    x = rng.standard_normal((3, size[0] * size[1], 8)).astype(np.float32)
    merging = jax.jit(lambda x: match(x, size, ratio).place)(x)
    tokens = match(jnp.asarray(x), size, ratio).count
    staying = [i for i in range(x.shape[1]) if i // size[1] % 2 == 0 and i % size[1] % 2 == 0]
    others = [i for i in range(x.shape[1]) if i not in staying]
    gone = min(int(ratio * x.shape[1]), len(others))
    assert tokens == x.shape[1] - gone
    for row, place in zip(x, np.asarray(merging), strict=True):
        unit = row / np.linalg.norm(row, axis=1, keepdims=True)
        best = {i: max(staying, key=lambda j: unit[i] @ unit[j]) for i in others}  # noqa: B023
        merged = sorted(others, key=lambda i: -unit[i] @ unit[best[i]])[:gone]  # noqa: B023
        assert all(place[i] == place[best[i]] for i in merged)
        alone = [i for i in range(len(row)) if i not in merged]
        assert sorted(place[alone]) == list(range(tokens))


def test_means_and_back(rng):
    x = jnp.asarray(rng.standard_normal((2, 24, 8)), jnp.float32)
    merging = match(x, (4, 6), 0.5)
    merged = merging.mean(x)
    assert merged.shape == (2, 12, 8)
    for row, place, means in zip(x, merging.place, merged, strict=True):
        expected = [np.asarray(row)[np.asarray(place) == i].mean(0) for i in range(12)]
        np.testing.assert_allclose(means, expected, atol=1e-6)
    np.testing.assert_array_equal(merging.mean(merging.restore(merged)).shape, merged.shape)
    np.testing.assert_allclose(merging.mean(merging.restore(merged)), merged, atol=1e-6)
    assert merging.mean(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_equal_tokens_lose_nothing(rng):
    """Cells of four equal tokens: attention over one of each is attention over all."""
    cells = rng.standard_normal((2, 3, 2, 16)).astype(np.float32)
    x = jnp.asarray(cells.repeat(2, axis=1).repeat(2, axis=2).reshape(2, 24, 16))

    def attend(x):
        return attention(*[x.reshape(*x.shape[:2], 2, 8)] * 3).reshape(x.shape)

    merging = match(x, (6, 4), 0.75)
    np.testing.assert_allclose(merging.restore(attend(merging.mean(x))), attend(x), atol=1e-5)


def test_nothing_merged_is_the_same_program(small_case, inputs):
    """And merging is less work where the first level has attention."""
    config, size = small_case
    x, params = inputs(config, size), functional.init(config, 0)

    def encode(**how):
        return lambda params: functional.bind(config, params).encode(x.latents, x.t, x.cond, **how)

    assert str(jax.make_jaxpr(encode())(params)) == str(jax.make_jaxpr(encode(merge=0.0))(params))
    with_attention = functional.UNetConfig(block_out_channels=(32, 32), transformer_layers=(1, 0), num_heads=2)
    latents, t = np.zeros((1, 64, 64, 4), np.float32), np.zeros(1, np.float32)
    tokens = inputs(with_attention, (1, 8, 8)).cond

    def bound(params):
        return functional.bind(with_attention, params)

    work = [
        flops(lambda p, m=m: bound(p).encode(latents, t, tokens, merge=m), functional.abstract(with_attention))
        for m in (0.0, 0.25, 0.5)
    ]
    assert work[0] > work[1] > work[2]
