"""Dense layers, and the product that all networks share."""

import jax
import jax.numpy as jnp
from flax import nnx


def product(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x (...,I), kernel (I,O) or, prepared, (1,O,I), bias (O,) -> (...,O) in the type of both or, where `is_mixed`, in
    fp32.
    """
    mixed = is_mixed(kernel.dtype)
    dtype = kernel.dtype if mixed else jnp.promote_types(x.dtype, kernel.dtype)
    kernel, inputs = (kernel, 0) if kernel.ndim == 2 else (kernel[0], 1)
    contract = ((x.ndim - 1,), (inputs,)), ((), ())
    result = jnp.float32 if mixed else dtype
    out = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), contract, preferred_element_type=result)
    return out if bias is None else out + bias


def is_mixed(dtype: jnp.dtype) -> bool:
    """Whether weights of this type stand for a computation in fp32 but for the operands of products: bf16 on a CPU.

    XLA's products of bf16 are two to four times as fast there as in fp32 (processors with AVX512_BF16 or AMX), but only
    with a result in fp32; in everything else bf16 gains nothing.
    """
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def activation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type of what networks with weights of a type compute."""
    return jnp.dtype(jnp.float32 if is_mixed(dtype) else dtype)


class Linear(nnx.Module):
    """(...,I) -> (...,O)."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, use_bias: bool = True):
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return product(x, self.kernel[...], None if self.bias is None else self.bias[...])
