"""Softmax attention, in the form that fits the machine it is compiled for.

CPU: groups of heads, and chunks of queries where one head is large, divided by their sum after the values are mixed
(performance.md, 7.1). CUDA: cuDNN's fused attention where it is legal (performance.md, 4.2). TPU: the flash
kernel where the sequence is long enough to pay for padding its heads to 128 (performance.md, 4.3). The plain form, with
its whole matrix of scores, everywhere else.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Form = Literal["plain", "chunked", "cudnn", "flash"]

# Scores of one piece on a CPU. XLA computes softmax between both products, in blocks that stay in a core's caches.
CPU_SCORES = 2**22
_FEWEST_QUERIES = 128

_FLASH_TOKENS = 4096


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention with scores scaled by 1 / sqrt(K).

    query (B,T,N,K), key and value (B,S,N,K); mask (B,S) bool, False where a key must not be seen. Returns (B,T,N,K).
    """
    platform = jax.default_backend()
    form = choose(platform, query.dtype, query.shape, key.shape[1], mask is not None, _capability(platform))
    if form == "chunked":
        return _chunked(query, key, value, mask)
    if form == "cudnn":
        mask_bnts = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask_bnts, implementation="cudnn")
    if form == "flash":
        return _flash(query, key, value)
    return plain_attention(query, key, value, mask)


def decoupled_attention(
    query: jax.Array,
    text: tuple[jax.Array, jax.Array],
    images: Sequence[tuple[jax.Array, jax.Array]] = (),
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention to the text's keys and values, plus that to each image's (Ye et al. 2023, eq. 5), before `to_out`.

    An image's strength is in its values already. query (B,T,N,K); keys and values (B,S,N,K), with an S of their own;
    mask (B,S) of the text; bias (B,T,S), added to the text's scores in units of the largest of the sample
    (`biased_attention`). Returns (B,T,N,K).
    """
    read = attention(query, *text, mask) if bias is None else biased_attention(query, *text, bias, mask)
    return sum((attention(query, *image) for image in images), read)


def choose(
    platform: str,
    dtype: jnp.dtype,
    query_shape: tuple[int, int, int, int],
    keys: int,
    masked: bool = False,
    capability: float = 0.0,
) -> Form:
    """The form of attention for queries (B,T,N,K) and `keys` keys on a platform ("cpu", "gpu" or "tpu").

    `capability` is the GPU's CUDA compute capability: from 9.0 cuDNN takes heads up to 256 wide, before that up to 128.
    """
    batch, queries, heads, width = query_shape
    if platform == "cpu":
        return "chunked"
    if platform in ("gpu", "cuda"):
        legal = dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= (256 if capability >= 9 else 128)
        return "cudnn" if legal and capability >= 8 else "plain"
    if platform == "tpu":
        # Blocks of the kernel are 128 tokens at least; cross-attention to a text is too short to pay.
        whole = queries % 512 == 0 and keys % 512 == 0
        return "flash" if whole and not masked and min(queries, keys) >= _FLASH_TOKENS and width <= 128 else "plain"
    return "plain"


def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, causal: bool = False
) -> jax.Array:
    """The same as `attention`, by its definition; a `causal` query attends to the keys up to its own place."""
    scores = jnp.einsum("btnk,bsnk->bnts", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[2:], dtype=bool), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnk->btnk", weights, value, preferred_element_type=jnp.float32).astype(value.dtype)


def biased_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """softmax((QK' + bias max(QK')) / sqrt(K)) V: eDiff-I's paint-with-words (arXiv 2211.01324, section 4.3).

    The maximum is each sample's, over heads, queries and keys; no gradient flows through it.

    query (B,T,N,K), key and value (B,S,N,K), bias (B,T,S), mask (B,S) bool. Returns (B,T,N,K).
    """
    scores = jnp.einsum("btnk,bsnk->bnts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=(1, 2, 3), keepdims=True))
    scores = (scores + bias.astype(jnp.float32)[:, None] * largest) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnk->btnk", weights, value, preferred_element_type=jnp.float32).astype(value.dtype)


def _chunked(query, key, value, mask):
    """Loops over groups of heads or, where one head is too large, over chunks of its queries. The batch stays whole, so
    that it may be sharded. A column of ones beside the values makes their sums in the same product.
    """
    batch, queries, heads, width = query.shape
    most = max(1, CPU_SCORES // (batch * key.shape[1]))  # queries, of all heads of a group together
    group = max(size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * queries <= most))
    chunks = -(-queries // max(_FEWEST_QUERIES, most)) if group == 1 else 1
    size = -(-queries // chunks)
    query = (query.astype(jnp.float32) / math.sqrt(width)).astype(query.dtype)
    query = jnp.pad(query, ((0, 0), (0, chunks * size - queries), (0, 0), (0, 0)))
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    # Held as they are read: else XLA reads heads out of (B,T,N,K) in every product.
    parts = _pieces(query, group, chunks), _pieces(key, group)[:, 0], _pieces(value, group)[:, 0]
    parts = jax.lax.optimization_barrier(parts)

    def one_group(parts):
        query_cbgtk, key, value = parts
        return _map(lambda chunk: _mix(chunk, key, value, mask), query_cbgtk)

    out = _map(one_group, parts)  # (N/G,C,B,G,T,K)
    return out.transpose(2, 1, 4, 0, 3, 5).reshape(batch, chunks * size, heads, -1)[:, :queries]


def _pieces(x, group, chunks=1):
    """(B,T,N,K) -> (N/G,C,B,G,T/C,K)."""
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch, chunks, tokens // chunks, heads // group, group, width)
    return x.transpose(3, 1, 0, 4, 2, 5)


def _map(function, parts):
    """jax.lax.map, without a loop where there is one part only."""
    if len(jax.tree.leaves(parts)[0]) == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.map(function, parts)


def _mix(query, key, value, mask):
    """Scaled queries (B,G,T,K), keys (B,G,S,K), values with their ones (B,G,S,K+1) -> (B,G,T,K)."""
    shape = query.shape
    query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    scores = jnp.einsum("btk,bsk->bts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(jnp.repeat(mask, shape[1], axis=0)[:, None, :], scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))).astype(value.dtype)
    mixed = jnp.einsum("bts,bsk->btk", weights, value, preferred_element_type=jnp.float32)
    return (mixed[..., :-1] / mixed[..., -1:]).astype(value.dtype).reshape(shape)


def _flash(query, key, value):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention  # imports on a TPU machine only

    def kernel(query, key, value):
        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        return flash_attention(query, key, value, sm_scale=1 / math.sqrt(query.shape[-1])).transpose(0, 2, 1, 3)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value)
    # The compiler cannot split a kernel: each device is given its own samples, and its heads where `tensor` has them.
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    heads = "tensor" if query.shape[2] % mesh.shape.get("tensor", 1) == 0 else None
    spec = jax.sharding.PartitionSpec(rows, None, heads if heads in mesh.shape else None)
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)


def _capability(platform: str) -> float:
    """CUDA compute capability of the first GPU, 0 where there is none."""
    if platform not in ("gpu", "cuda"):
        return 0.0
    return float(getattr(jax.devices()[0], "compute_capability", 0.0))
