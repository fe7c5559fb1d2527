"""Noise from PyTorch's seeds."""

import numpy as np
import pytest
import torch

from bdm_jax.diffusion.torch_noise import randn


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 5, 7), (16,), (17,)])
@pytest.mark.parametrize("given", [0, 3546724423, 2**32 - 1, None])
def test_equals_torch(shape, given, seed):
    """1e-6: the libraries' logarithms and cosines differ in their last bits."""
    given = seed if given is None else given
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(given)).numpy()
    np.testing.assert_allclose(randn(given, shape), expected, atol=1e-6)


def test_few_numbers_are_refused():
    with pytest.raises(ValueError, match="15 numbers"):
        randn(0, (3, 5))
