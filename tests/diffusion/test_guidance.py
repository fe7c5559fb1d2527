"""Guidance as weights, against its formulas."""

import numpy as np
import pytest

from bdm_jax.diffusion.guidance import guide, rescale, scales


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.1, 7.5])
def test_classifier_free_guidance_is_two_weights(scale, rng):
    """Bit for bit negative + scale (positive - negative): what it was before it was a table."""
    negative, positive = rng.standard_normal((2, 2, 3, 3, 4), dtype=np.float32)
    guided = guide([negative, positive], np.float32(scales([(1 - scale, scale)]))[0])
    np.testing.assert_array_equal(guided, negative + np.float32(scale) * (positive - negative))
    if scale == 1.0:
        np.testing.assert_allclose(guided, positive, atol=1e-6)


@pytest.mark.parametrize(("english", "chinese"), [(5.0, 2.0), (2.5, 7.5), (3.0, 3.0)])
def test_two_languages_are_three_weights(english, chinese, rng):
    neither, one, both = rng.standard_normal((3, 2, 3, 3, 4), dtype=np.float32)
    row = np.float32(scales([(1 - english, english - chinese, chinese)]))[0]
    expected = neither + np.float32(english) * (one - neither) + np.float32(chinese) * (both - one)
    np.testing.assert_array_equal(guide([neither, one, both], row), expected)


def test_any_weights_are_the_weighted_sum(rng):
    """Composed prompts (one negative, several positives), interleaved guidance, PAG: rows of the table."""
    predictions = rng.standard_normal((5, 2, 3, 3, 4), dtype=np.float32)
    weights = rng.standard_normal((7, 5)) * 4
    weights[:, 0] += 1 - weights.sum(axis=1)
    for row, own in zip(np.float32(scales(weights)), weights, strict=True):
        np.testing.assert_allclose(guide(predictions, row), np.tensordot(own, predictions, axes=1), atol=1e-4)
    assert scales(np.ones((3, 1))).shape == (3, 0)
    np.testing.assert_array_equal(guide(predictions[:1], []), predictions[0])


def test_weights_sum_to_one():
    scales([(1 - 1e17, 1e17)])  # as far as float64 can tell
    with pytest.raises(ValueError, match="do not sum to 1"):
        scales([(0.5, 0.5), (0.5, 0.6)])


def test_rescaled_guidance_has_the_contrast_of_the_positive_prompt(rng):
    """The whole of it; a part is the mean of both (2305.08891, equations 15 and 16)."""
    guided, positive = rng.standard_normal((2, 3, 4, 5, 4), dtype=np.float32)
    guided = 5 * guided * np.arange(1, 4, dtype=np.float32)[:, None, None, None]
    whole = np.asarray(rescale(guided, positive, 1.0))
    np.testing.assert_allclose(whole.std(axis=(1, 2, 3)), positive.std(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(rescale(guided, positive, 0.7), 0.7 * whole + 0.3 * guided, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rescale(guided, positive, 0.0), guided, rtol=1e-6)
