"""Where arrays live."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from bdm_jax.errors import UserError
from bdm_jax.models import config
from bdm_jax.models.functional import abstract
from bdm_jax.runtime.sharding import (
    AXES,
    RULES,
    SMALLEST_SPLIT,
    bytes_per_device,
    explain,
    make_mesh,
    parameter_sharding,
    placement,
    tree_sharding,
)
from bdm_jax.training.digests import leaves
from bdm_jax.training.state import abstract_state, state_sharding

NETWORKS = (
    "SD15_UNET",
    "SD15_VAE",
    "TAESD",
    "CLIP_L_TEXT",
    "CHINESE_CLIP_H_TEXT",
    "BDM_BRANCH",
    "SD15_CONTROLNET",
)


def abstract_mesh(data, fsdp, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def test_mesh_takes_all_devices_and_leaves_sharding_to_the_compiler():
    mesh = make_mesh()
    assert mesh.shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("axes", [(3, 5), (0, 1), (1, 0), (-1, -2), (-1, -1), (1, 1, 7)])
def test_mesh_that_does_not_fit(axes):
    with pytest.raises(UserError, match="does not fit"):
        make_mesh(*axes)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_is_matched_by_exactly_one_rule(network):
    params = abstract(getattr(config, network))
    for path in params:
        assert sum(bool(re.search(pattern, path)) for pattern, _ in RULES) == 1, path
    assert {"whole", "split"} <= {placement(path) for path in params}


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="mystery.weights: 0 sharding rules"):
        placement("mystery.weights")


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("conv_in.kernel", (3, 3, 128, 512), PartitionSpec(None, None, None, "fsdp")),
        ("proj.kernel", (1024, 256), PartitionSpec("fsdp")),
        ("proj.kernel", (512, 1023), PartitionSpec("fsdp")),
        ("proj.kernel", (SMALLEST_SPLIT // 2, 1), PartitionSpec()),
        ("proj.kernel", (1021, 1031), PartitionSpec()),
        ("word.embedding", (1000, 768), PartitionSpec("fsdp")),
        ("norm.bias", (2**20,), PartitionSpec()),
        ("attn1.to_q.kernel", (640, 640), PartitionSpec("fsdp", "tensor")),
        ("attn1.to_out.0.kernel", (640, 640), PartitionSpec("tensor", "fsdp")),
        ("ff.net.0.proj.kernel", (640, 5121), PartitionSpec("fsdp")),
        ("resnets.0.conv2.kernel", (3, 3, 640, 320), PartitionSpec(None, None, "tensor", "fsdp")),
    ],
)
def test_placements(path, shape, spec):
    """The largest divisible dimension that tensor leaves is split over fsdp; what does not divide stays whole."""
    assert parameter_sharding(abstract_mesh(2, 4, 2), path, shape).spec == spec


def test_what_the_optimizer_keeps_of_a_parameter_lies_with_it():
    mesh, params = abstract_mesh(1, 4, 2), {"branch": abstract(config.BDM_BRANCH)}
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.kernel"
    state = abstract_state(params, optax.adam(1e-3))
    shardings = state_sharding(mesh, state)
    spec = PartitionSpec("fsdp", "tensor")
    adam = shardings.optimizer[0]
    assert [tree["branch"][path].spec for tree in (shardings.params, shardings.ema, adam.mu, adam.nu)] == [spec] * 4
    assert shardings.step.spec == adam.count.spec == PartitionSpec()
    factored = state_sharding(mesh, abstract_state(params, optax.scale_by_factored_rms())).optimizer
    assert factored.v_row["branch"][path].spec == PartitionSpec()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_bytes_per_device_add_up(sizes):
    """On each device the whole of what is not split and its share of what is: the sum that `explain` ends with."""
    mesh, params = abstract_mesh(*sizes), abstract(config.BDM_BRANCH)
    shardings = tree_sharding(mesh, {"branch": params})["branch"]
    expected = 0
    for path, leaf in params.items():
        ways = math.prod(mesh.shape[axis] for axis in shardings[path].spec if axis)
        assert leaf.size % ways == 0
        expected += 4 * leaf.size // ways
    lines = list(explain(params, shardings))
    assert len(lines) == len(params) + 1 and lines[-1].split() == ["sum", f"{expected:,}"]
    assert all(path in line for path, line in zip(params, lines, strict=False))
    assert max(map(len, lines)) < 160


def test_explained_bytes_are_those_of_real_shards():
    mesh = make_mesh()
    for path, shape in {"proj.kernel": (1024, 256), "bias": (7,)}.items():
        sharding = parameter_sharding(mesh, path, shape)
        array = jax.device_put(jnp.zeros(shape, jnp.bfloat16), sharding)
        assert bytes_per_device(array, sharding) == array.addressable_shards[0].data.nbytes


def test_fsdp_splits_nearly_everything_of_a_branch():
    """Eight ways: the train state of 363 M parameters falls from 5.8 GB to an eighth and what biases and norms take."""
    params = {"branch": abstract(config.BDM_BRANCH)}
    state = abstract_state(params, optax.adam(1e-3))
    arrays = leaves(state)
    held = {}
    for ways in (1, 8):
        shardings = leaves(state_sharding(abstract_mesh(1, ways), state))
        held[ways] = sum(bytes_per_device(leaf, shardings[path]) for path, leaf in arrays.items())
    assert held[1] == sum(np.prod(leaf.shape, dtype=np.int64) * 4 for leaf in arrays.values())
    assert held[8] < 1.02 * held[1] / 8
