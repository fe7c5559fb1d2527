"""A fingerprint of every array of a train state, the same on any mesh, taken where the array lies.

An array split over hundreds of chips cannot be read by one host, so its digest is a compiled program: every element's
bits are mixed with its place (the finaliser of MurmurHash3, a bijection) and summed modulo 2^32, four times with other
constants. A change within one element always changes the digest; any other change goes unseen with a chance of 2^-128.
It guards against damage, not against an attacker.
"""

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bdm_jax.runtime.sharding import replicated

_LANES = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], np.uint32)


def leaves(tree: Any) -> dict[str, Any]:
    """Path ("params/branch/conv_in.kernel") -> leaf, in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def structure(tree: Any) -> dict[str, list]:
    """Path -> [dtype, shape] of arrays or of their shapes."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves(tree).items()}


def begin(tree: Any, mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> (4,) uint32, being computed: the arrays may be donated as soon as this returns."""
    digest, found = _program(mesh), {}
    for path, leaf in leaves(tree).items():
        found[path] = digest(leaf)
        if jax.default_backend() == "cpu":  # virtual devices share few threads: sums of several programs at once, each
            found[path].block_until_ready()  # waiting for all devices, can wait for each other for ever
    return found


def finish(digests: dict[str, jax.Array]) -> dict[str, str]:
    """What `begin` returned -> path -> 32 hexadecimal digits."""
    return {path: np.asarray(words).astype(">u4").tobytes().hex() for path, words in digests.items()}


@lru_cache(maxsize=8)
def _program(mesh: Mesh):
    return jax.jit(_digest, out_shardings=replicated(mesh))


def _digest(array: jax.Array) -> jax.Array:
    bits = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    width = bits.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = np.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * stride
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(place * 2 + 1 + lane)), dtype=jnp.uint32) for lane in _LANES])


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
