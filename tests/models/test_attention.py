"""Every form of attention against its definition, and which form is taken where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax.models import attention as module
from bdm_jax.models.attention import attention, choose, plain_attention

TOLERANCE = 1e-5  # fp32: the order of summation

SHAPES = {  # (B, T, S, N, K)
    "self": (2, 96, 96, 3, 8),
    "not a multiple of the chunk": (1, 131, 131, 2, 8),
    "text": (2, 150, 7, 3, 8),
    "one wide head": (1, 64, 64, 1, 48),
    "two of four heads at a time": (2, 16, 8, 4, 8),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Forces several chunks at small sizes."""
    monkeypatch.setattr(module, "CPU_SCORES", 512)
    monkeypatch.setattr(module, "_FEWEST_QUERIES", 16)


def draw(rng, shape):
    batch, queries, keys, heads, width = shape
    sizes = [(batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width)]
    return [jnp.asarray(rng.standard_normal(size, np.float32)) for size in sizes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_equals_plain(small_chunks, rng, assert_parity, shape, masked):
    query, key, value = draw(rng, shape)
    mask = jnp.asarray(rng.random(key.shape[:2]) < 0.5).at[:, 0].set(True) if masked else None
    assert choose("cpu", query.dtype, query.shape, key.shape[1]) == "chunked"
    ours = jax.jit(attention)(query, key, value, mask)
    assert_parity(ours, plain_attention(query, key, value, mask), TOLERANCE)


def test_large_scores_do_not_overflow(small_chunks, rng, assert_parity):
    query, key, value = draw(rng, SHAPES["self"])
    assert_parity(attention(100 * query, key, value), plain_attention(100 * query, key, value), 1e-4)


def test_gradients_equal_plain(small_chunks, rng, assert_parity):
    inputs = draw(rng, SHAPES["not a multiple of the chunk"])
    gradients = [
        jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)) for f in (attention, plain_attention)
    ]
    for ours, plain in zip(*(gradient(*inputs) for gradient in gradients), strict=True):
        assert_parity(ours, plain, TOLERANCE)


def test_bf16_stays_bf16(small_chunks, rng, assert_parity):
    parts = draw(rng, SHAPES["self"])
    out = attention(*(x.astype(jnp.bfloat16) for x in parts))
    assert out.dtype == jnp.bfloat16
    assert_parity(out.astype(jnp.float32), plain_attention(*parts), 0.03)  # bf16 keeps 8 bits


@pytest.mark.parametrize(
    ("platform", "dtype", "query", "keys", "masked", "capability", "form"),
    [
        # SD1.5 at 512 px, by head size: 40, 80, 160; the VAE's single head.
        ("cpu", jnp.float32, (2, 4096, 8, 40), 4096, False, 0, "chunked"),
        ("cpu", jnp.float32, (2, 4096, 8, 40), 77, False, 0, "chunked"),
        ("cpu", jnp.float32, (1, 4096, 1, 512), 4096, False, 0, "chunked"),
        ("cpu", jnp.float32, (2, 64, 8, 160), 64, False, 0, "chunked"),
        ("gpu", jnp.bfloat16, (2, 4096, 8, 40), 4096, False, 9.0, "cudnn"),
        ("gpu", jnp.float16, (2, 1024, 8, 80), 77, True, 8.0, "cudnn"),
        ("gpu", jnp.bfloat16, (2, 256, 8, 160), 256, False, 9.0, "cudnn"),
        ("gpu", jnp.bfloat16, (2, 256, 8, 160), 256, False, 8.0, "plain"),
        ("gpu", jnp.bfloat16, (1, 4096, 1, 512), 4096, False, 9.0, "plain"),
        ("gpu", jnp.float32, (2, 4096, 8, 40), 4096, False, 9.0, "plain"),
        ("gpu", jnp.bfloat16, (2, 4096, 8, 36), 4096, False, 9.0, "plain"),
        ("gpu", jnp.bfloat16, (2, 4096, 8, 40), 4096, False, 7.5, "plain"),
        ("tpu", jnp.bfloat16, (2, 4096, 8, 40), 4096, False, 0, "flash"),
        ("tpu", jnp.bfloat16, (2, 4096, 8, 40), 77, False, 0, "plain"),
        ("tpu", jnp.bfloat16, (2, 1024, 8, 80), 1024, False, 0, "plain"),
        ("tpu", jnp.bfloat16, (2, 4096, 8, 40), 4096, True, 0, "plain"),
        ("tpu", jnp.bfloat16, (1, 4096, 1, 512), 4096, False, 0, "plain"),
        ("other", jnp.float32, (2, 4096, 8, 40), 4096, False, 0, "plain"),
    ],
)
def test_choice(platform, dtype, query, keys, masked, capability, form):
    assert choose(platform, dtype, query, keys, masked, capability) == form
