"""Dense layers, and the product that all networks share."""

import jax
import jax.numpy as jnp
from flax import nnx


def product(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x (...,I), kernel (I,O) or, prepared, (1,O,I), bias (O,) -> (...,O) in the type of x."""
    return sums(x, kernel, bias).astype(x.dtype)


def sums(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """The same before it is rounded: in fp32 on a CPU, where XLA's products of bf16 with a bf16 result are slower than
    those in fp32, and with an fp32 result two to four times as fast (processors with AVX512_BF16 or AMX). Elsewhere in
    the type of x, as the hardware sums in fp32 anyway.
    """
    result = jnp.float32 if jax.default_backend() == "cpu" else x.dtype
    kernel, inputs = (kernel, 0) if kernel.ndim == 2 else (kernel[0], 1)
    contract = ((x.ndim - 1,), (inputs,)), ((), ())
    out = jax.lax.dot_general(x, kernel, contract, preferred_element_type=jnp.promote_types(result, x.dtype))
    return out if bias is None else out + bias


class Linear(nnx.Module):
    """(...,I) -> (...,O)."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, use_bias: bool = True):
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.sums(x).astype(x.dtype)

    def sums(self, x: jax.Array) -> jax.Array:
        """The same before it is rounded (`sums`)."""
        return sums(x, self.kernel[...], None if self.bias is None else self.bias[...])
