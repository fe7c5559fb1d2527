"""CLIP's vision tower and its picture preparation against transformers."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as Config

from bdm_jax.models.config import CLIPVisionConfig
from bdm_jax.models.towers.clip import normalised


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_outputs_equal_transformers(activation, randomised, torch_params, apply, assert_parity, rng):
    config = CLIPVisionConfig(32, 48, 3, 4, image_size=28, patch_size=7, projection_dim=12, hidden_act=activation)
    reference = randomised(CLIPVisionModelWithProjection(Config(**asdict(config))))
    params = torch_params(reference, config)
    images = rng.standard_normal((2, 28, 28, 3), np.float32)
    expected = reference(torch.from_numpy(np.moveaxis(images, -1, 1).copy()), output_hidden_states=True)
    pooled, states = apply(config, params, images)
    assert_parity(pooled, expected.image_embeds)
    assert_parity(states, expected.hidden_states[-2])


@pytest.mark.parametrize("size", [(300, 225), (31, 77), (224, 224)])
def test_pictures_are_prepared_as_transformers_does(size, rng):
    picture = rng.integers(0, 256, (*size, 3), np.uint8)
    expected = CLIPImageProcessor()(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    ours = normalised(picture, 224)
    assert np.abs(np.moveaxis(ours, -1, 0) - expected).max() < 2.1 / 255 / 0.26  # resizers that round differently
    assert np.abs(np.moveaxis(ours, -1, 0) - expected).mean() < 0.02
