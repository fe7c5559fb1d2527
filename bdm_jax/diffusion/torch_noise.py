"""The noise that PyTorch's CPU generator draws, so that pictures of PyTorch programs can be repeated from their seeds.

`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` (ATen/native/cpu/DistributionTemplates.h,
normal_fill): Mersenne Twister, 24 bits to a uniform number, Box-Muller on blocks of 16.
"""

import numpy as np

_BLOCK = 16


def randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """`shape` fp32, at least 16 numbers; equal to PyTorch's up to the last bits of its logarithm and cosine.

    Raises ValueError for fewer than 16 numbers, which PyTorch draws in another way.
    """
    size = int(np.prod(shape))
    if size < _BLOCK:
        raise ValueError(f"{size} numbers: PyTorch draws fewer than {_BLOCK} in another way")
    generator = np.random.RandomState(seed)  # Mersenne Twister, seeded as PyTorch's
    whole, rest = size // _BLOCK * _BLOCK, size % _BLOCK
    uniform = _uniform(generator, size)
    values = np.empty(size, np.float32)
    values[:whole] = _box_muller(uniform[:whole])
    if rest:  # the last 16 numbers are drawn again
        values[-_BLOCK:] = _box_muller(_uniform(generator, _BLOCK))
    return values.reshape(shape)


def _uniform(generator: np.random.RandomState, size: int) -> np.ndarray:
    bits = generator.randint(0, 2**32, size, dtype=np.uint32) & np.uint32((1 << 24) - 1)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    first, second = np.split(uniform.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * np.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
