"""Random trees, and how they are compared with what diffusers makes of a file."""

import numpy as np
import pytest
import torch

from bdm_jax.models.functional import abstract


@pytest.fixture
def drawn():
    """A function from a config and a generator to a random tree, in our names."""
    return lambda config, rng: {k: rng.standard_normal(leaf.shape, np.float32) for k, leaf in abstract(config).items()}


@pytest.fixture
def as_torch():
    """A function from arrays by name to torch's."""
    return lambda tensors: {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in tensors.items()}


@pytest.fixture
def same():
    """A function that asserts that two trees have the same names and numbers, whatever their trivial axes."""

    def check(ours, reference):
        assert ours.keys() == reference.keys()
        for key, array in ours.items():
            np.testing.assert_array_equal(array, np.asarray(reference[key]).reshape(array.shape), err_msg=key)

    return check
