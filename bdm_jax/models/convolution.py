"""Convolutions; on a CPU those of 3x3 and stride 1 as Winograd's (Lavin and Gray 2015, arXiv 1509.09308), others on
small maps as products of patches.

F(m,3) makes a tile of m x m outputs with (m+2)^2 multiplications instead of 9 m^2: 2.25 times fewer for m = 2, 4 times
for m = 4. `prepare` transforms the filters once; a `Conv` then finds a kernel (16 or 36, O, I) where it was declared
with (3, 3, I, O), and applies what it finds. Nothing else changes: paths, biases, results up to rounding (1e-6 of the
largest output for m = 2, 5e-6 for m = 4, in fp32). In bf16 only products are: tiles are transformed in fp32.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.models.config import EncoderConfig, VAEConfig
from bdm_jax.models.linear import activation_dtype, product

# Points at which the polynomials of Winograd's algorithm are evaluated, besides infinity. For m = 4 those with square
# roots of two lose four times less precision than 0, 1, -1, 2, -2.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}

# Bytes of transformed input held at once: larger maps are computed in strips of rows.
_STRIP_BYTES = 64e6


class Conv(nnx.Module):
    """A square convolution (B,H,W,I) -> (B,H',W',O) with zero padding; as a matrix product if it is 1x1."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        kernel: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        use_bias: bool = True,
    ):
        """`padding` before and after, on both axes; kernel // 2 on each side where None, as in PyTorch's networks."""
        self.stride = stride
        self.padding = (kernel // 2, kernel // 2) if padding is None else padding
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (kernel, kernel, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if kernel.ndim == 3:
            out = product(x, kernel) if len(kernel) == 1 else winograd(x, kernel)
        elif kernel.shape[:2] == (1, 1) and self.stride == 1:
            out = product(x, kernel[0, 0])
        elif jax.default_backend() == "cpu" and math.prod(x.shape[:-1]) <= self.stride**2 * kernel.shape[-1]:
            out = product(patches(x, kernel, self.stride, self.padding), kernel.reshape(-1, kernel.shape[-1]))
        else:
            x, kernel = (part.astype(activation_dtype(kernel.dtype)) for part in (x, kernel))
            out = jax.lax.conv_general_dilated(
                x, kernel, (self.stride,) * 2, (self.padding,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return out if self.bias is None else out + self.bias[...]


def prepare(
    config: EncoderConfig | VAEConfig, params: dict[str, jax.Array], size: tuple[int, int]
) -> dict[str, jax.Array]:
    """Parameters of a UNet, branch, ControlNet or autoencoder with the filters transformed for latents of `size` (H,W).

    For sampling on a CPU in fp32 and bf16; elsewhere the parameters come back as they are. In bf16 the kernels of dense
    layers and 1x1 convolutions become (1, O, I): with few rows, products are up to twice as fast so. They remain right
    for any other size, and for any batch size. Transformed filters take 16/9 or 4 times the memory of the plain ones
    (in fp32, for 512 px, 2.3 GB more for an SD1.5 UNet, 0.7 GB for its branch, 0.9 GB for the autoencoder);
    all other leaves are shared with `params`.
    """
    if jax.default_backend() != "cpu":
        return params
    return {path: _prepared(config, path, value, size) for path, value in params.items()}


def tile_size(height: int, width: int, inputs: int, outputs: int) -> int:
    """The m of F(m,3) that is fastest on a CPU for a map of height x width pixels; 0 where the plain form is.

    Transforms cost in proportion to the channels, products to their square: few channels do not pay. A map of 16 x 16
    or less has too few tiles of 4 x 4 to use each of the 36 filters well; 2 pays down to 4 x 4. Measured for SD1.5's
    shapes, batch 2.
    """
    if min(inputs, outputs) < 64 or height * width < 16:
        return 0
    return 4 if height * width > 16 * 16 else 2


def transform_filters(kernel: jax.Array, m: int) -> jax.Array:
    """Filters (3,3,I,O) -> ((m+2)^2, O, I), as `winograd` takes them: XLA's products are 1.2 to 1.4 times as fast so on
    a CPU as with (..., I, O).
    """
    _, filters, _ = _matrices(m)
    filters, wide = jnp.asarray(filters, jnp.float32), kernel.astype(jnp.float32)
    rows = jnp.einsum("ai,ijco->ajco", filters, wide, precision="highest")
    both = jnp.einsum("bj,ajco->baoc", filters, rows, precision="highest")
    return both.reshape(-1, *both.shape[2:]).astype(kernel.dtype)


def patches(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """What each output of a convolution is made of: x (B,H,W,I), kernel (k,k,I,O) -> (B,H',W',k*k*I).

    Where a map has fewer pixels than the output has channels, one product of them is two to three times as fast as
    XLA's convolution on a CPU, its gradients three times.
    """
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    size = len(kernel)
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    rows = [_every(x, 1, i, height, stride) for i in range(size)]
    return jnp.concatenate([_every(row, 2, j, width, stride) for row in rows for j in range(size)], axis=-1)


def winograd(x: jax.Array, filters: jax.Array) -> jax.Array:
    """3x3 convolution of x (B,H,W,I), stride 1, zero padding 1, with transformed filters (n^2,O,I): (B,H,W,O), fp32."""
    n = round(len(filters) ** 0.5)
    m = n - 2
    batch, height, width, channels = x.shape
    rows, columns = -(-height // m), -(-width // m)
    row_bytes = batch * columns * n * n * max(channels, filters.shape[1]) * 4
    strips = -(-rows // max(1, int(_STRIP_BYTES / row_bytes)))
    rows = -(-rows // strips)
    pads = (0, 0), (1, strips * rows * m + 1 - height), (1, columns * m + 1 - width), (0, 0)
    x = jnp.pad(x, pads)
    if strips == 1:
        out = _tiles(x, filters, rows, columns, m)
    else:

        def strip(i):
            rows_of_strip = jax.lax.dynamic_slice_in_dim(x, i * rows * m, rows * m + 2, axis=1)
            return _tiles(rows_of_strip, filters, rows, columns, m)

        out = jax.lax.map(strip, jnp.arange(strips))
        out = jnp.moveaxis(out, 0, 1).reshape(batch, strips * rows * m, columns * m, -1)
    return out[:, :height, :width]


def _tiles(x, filters, rows, columns, m):
    """Padded x (B, rows m + 2, columns m + 2, I) -> (B, rows m, columns m, O) in fp32."""
    n, batch, channels = m + 2, x.shape[0], x.shape[-1]
    outputs, _, inputs = _matrices(m)
    # Written as sums of strided slices, along one axis after the other: XLA turns each into one pass over contiguous
    # channels.
    wide = x.astype(jnp.float32)
    y = jnp.stack([_sum(row, [_every(wide, 1, i, rows, m) for i in range(n)]) for row in inputs])
    y = jnp.stack([_sum(row, [_every(y, 3, j, columns, m) for j in range(n)]) for row in inputs])
    y = y.reshape(n * n, batch * rows * columns, channels).astype(filters.dtype)
    if 16 * y.shape[1] <= filters.shape[1]:
        # Few tiles: what stands first in a product is read as it lies, what stands second is repacked on every call.
        # Held, so that XLA does not turn it round.
        held = jax.lax.optimization_barrier
        y = held(held(jnp.einsum("noi,nti->not", filters, y, preferred_element_type=jnp.float32)).swapaxes(1, 2))
    else:
        y = jnp.einsum("nti,noi->nto", y, filters, preferred_element_type=jnp.float32)
    y = y.reshape(n, n, batch, rows, columns, -1)
    lines = [_sum(row, [y[:, a] for a in range(n)]) for row in outputs]
    lines = [jnp.stack([_sum(row, list(line)) for row in outputs], axis=3) for line in lines]
    return jnp.stack(lines, axis=2).reshape(batch, rows * m, columns * m, -1)


def _every(x, axis, start, count, step):
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * step + 1, step, axis=axis)


def _sum(coefficients, terms):
    """The linear combination; zeros cost nothing."""
    used = [(float(c), term) for c, term in zip(coefficients, terms, strict=True) if abs(c) > 1e-9]
    return sum((term if c == 1 else term * np.asarray(c, term.dtype) for c, term in used[1:]), start=_scaled(*used[0]))


def _scaled(c, term):
    return term if c == 1 else term * np.asarray(c, term.dtype)


def _matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(m,n), (n,3), (n,n) with y = outputs @ ((filters @ g) * (inputs @ d)): Cook and Toom's construction."""
    points, n = np.array(_POINTS[m]), m + 2

    def powers(count):  # the values of 1, x, x^2, ... at each point; at infinity only the last counts
        return np.concatenate([points[:, None] ** np.arange(count), np.eye(count)[-1:]])

    gaps = points[:, None] - points + np.eye(n - 1)
    scale = np.append(gaps.prod(axis=1), 1.0)[:, None]
    return powers(m).T, powers(3) / scale, np.linalg.inv(powers(n)).T * scale


def _prepared(config, path, value, size):
    short = value.dtype == jnp.bfloat16
    if not path.endswith("kernel") or value.ndim not in (2, 4) or value.dtype not in (jnp.float32, jnp.bfloat16):
        return value
    if value.ndim == 2 or value.shape[:2] == (1, 1):
        return _outputs_first(value) if short else value
    if value.shape[:2] != (3, 3):
        return value
    halvings = _halvings(config, path)
    if halvings is None:
        return value
    height, width = (-(-side // 2**halvings) if halvings > 0 else side * 2**-halvings for side in size)
    m = tile_size(height, width, *value.shape[2:])
    m = min(m, 2) if short else m  # the larger one loses three times as much of bf16's precision
    return _transform_filters(value, m) if m else value


@jax.jit
def _outputs_first(kernel):
    """(I,O) or (1,1,I,O) -> (1,O,I)."""
    return kernel.reshape(1, *kernel.shape[-2:]).swapaxes(1, 2)


_transform_filters = jax.jit(transform_filters, static_argnums=1)


def _halvings(config, path: str) -> int | None:
    """How many times the latents were halved before this convolution; None where its stride is not 1."""
    if "downsamplers" in path or "cond_embedding" in path:
        return None
    last = len(config.block_out_channels) - 1
    first = -last if path.startswith("encoder.") else 0
    if found := re.search(r"down_blocks\.(\d+)\.", path):
        return first + int(found[1])
    if found := re.search(r"up_blocks\.(\d+)\.", path):
        bottom = 0 if isinstance(config, VAEConfig) else last
        return bottom - int(found[1]) - ("upsamplers" in path)
    if "mid_block" in path:
        return 0 if isinstance(config, VAEConfig) else last
    if isinstance(config, VAEConfig) and path.startswith("encoder.conv_out"):
        return 0
    return first if "conv_in" in path or isinstance(config, EncoderConfig) else -last
