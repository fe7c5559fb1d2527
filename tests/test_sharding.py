"""Where arrays live."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from bdm_jax.errors import UserError
from bdm_jax.sharding import SMALLEST_SPLIT, make_mesh, parameter_sharding


def test_mesh_takes_all_devices_and_leaves_sharding_to_the_compiler():
    mesh = make_mesh()
    assert mesh.shape == {"data": jax.device_count(), "fsdp": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("axes", [(3, 5), (0, 1), (1, 0), (-1, -2)])
def test_mesh_that_does_not_fit(axes):
    with pytest.raises(UserError, match="does not fit"):
        make_mesh(*axes)


@pytest.mark.parametrize(
    ("shape", "placement"),
    [
        ((3, 3, 128, 512), PartitionSpec(None, None, None, "fsdp")),
        ((1024, 256), PartitionSpec("fsdp")),
        ((512, 1023), PartitionSpec("fsdp")),
        ((4096,), PartitionSpec()),
        ((SMALLEST_SPLIT // 2, 1), PartitionSpec()),
        ((1021, 1031), PartitionSpec()),
    ],
)
def test_largest_divisible_dimension_is_split(shape, placement):
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    assert parameter_sharding(mesh, shape).spec == placement
