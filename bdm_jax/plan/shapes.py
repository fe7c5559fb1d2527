"""A run's step from shapes alone: nothing is loaded, allocated or computed. Its memory and work can be counted, and it
can be lowered for devices that are not here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import read_json
from bdm_jax.models import config as presets
from bdm_jax.models.config import Config, from_json
from bdm_jax.runtime.costs import flops, pretend_platform
from bdm_jax.runtime.sharding import batch_ways, bytes_per_device
from bdm_jax.systems.families import SD15
from bdm_jax.systems.fetch import local_config
from bdm_jax.training.config import TrainConfig
from bdm_jax.training.digests import leaves
from bdm_jax.training.objectives.objective import Objective, Sizes, read_sizes, without_remat
from bdm_jax.training.objectives.plugin import read_part
from bdm_jax.training.objectives.starting import settled
from bdm_jax.training.state import abstract_state, frozen_sharding, make_optimizer, make_step, state_sharding


@dataclass(frozen=True)
class StepShapes:
    """What a step computes with: trained (fp32) and frozen (in the compute type) trees, one sample of a batch."""

    objective: Objective
    trained: dict[str, Any]
    frozen: dict[str, Any]
    row: dict[str, Any]

    @property
    def parameters(self) -> int:
        """How many are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    def batch(self, size: int) -> dict[str, Any]:
        """Shapes of `size` samples."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), self.row)


def step_shapes(task: Any, dtype: Any, size: int | None = None, given: Sizes | None = None) -> StepShapes:
    """Of a task's step for images of `size` pixels, by default those of the published system of its family (SD1.5 where
    it names none): 512 or 1024. Networks are those of `given`, or of the task's folders, or, where these are not here,
    that system's.

    Raises:
        UserError: a network that is found nowhere, one of `given` that is none of the task's, networks that do not fit
            together.
    """
    given, asked = given or {}, set()
    usual: Sizes = getattr(task, "row", SD15).sizes or SD15.sizes

    def read(name: str, path: Path) -> Config:
        asked.add(name)
        if name in given:
            return given[name]
        if (path / "config.json").is_file():
            return read_sizes(name, path)
        if path.is_file() or (path / name).is_dir():
            return read_part(name, path)
        if name not in usual:
            raise UserError(f"{path}: no such model folder, and no usual {name}")
        return usual[name]

    if (start := getattr(task, "start_from", None)) is not None and start.exists():
        task = settled(task, Path())
    try:
        sizes = task.sizes(read)
        if strange := sorted(given.keys() - asked):
            raise UserError(f"--networks {strange[0]}=...: this run reads {', '.join(sorted(asked)) or 'none'}")
        objective = task.objective(sizes)
    except UserError:
        raise
    except ValueError as error:  # of configs
        raise UserError(f"these networks do not fit together: {error}") from error
    trained, frozen = objective.shapes()
    size = usual["unet"].sample_size * usual["vae"].factor if size is None else size
    return StepShapes(objective, trained, _in(dtype, frozen), objective.row(size))


def parse_networks(texts: tuple[str, ...]) -> Sizes:
    """ "unet=sdxl-unet", "text_encoder=tower/config.json" -> configs: a preset of `models.config`, or a config.json or
    its folder.

    Raises:
        UserError: no such preset or file.
    """
    found = {}
    known = {name: value for name, value in vars(presets).items() if name.isupper() and hasattr(value, "__dict__")}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--networks {text}: write NAME=PRESET or NAME=CONFIG.JSON, as in unet=sdxl-unet")
        path = local_config(value)
        if path.is_file():
            found[name] = from_json(read_json(path))
        elif (preset := value.upper().replace("-", "_")) in known:
            found[name] = known[preset]
        else:
            raise unknown("preset or config.json", value, [one.lower().replace("_", "-") for one in known])
    return found


def lower(config: TrainConfig, mesh: Mesh, shapes: StepShapes) -> Any:
    """The run's step, of shapes, as `jax.jit(...).lower` returns it, for a mesh of whatever devices."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(shapes.trained, optimizer)
    with pretend_platform(mesh.devices.flat[0].platform), jax.set_mesh(mesh):
        step = make_step(shapes.objective.loss, optimizer, config, mesh, state, shapes.frozen)
        return step.lower(state, shapes.frozen, shapes.batch(config.batch_size))


def analytic_flops(shapes: StepShapes) -> int:
    """Convolutions and matrix products that the loss of one image and its gradient need, without rematerialisation:
    from the jaxpr, with attention by its definition.
    """
    objective = without_remat(shapes.objective)

    def loss(params, frozen, batch):
        return objective.loss(params, frozen, batch, jax.random.key(0))[0]

    trained = _in(jnp.dtype("bfloat16"), shapes.trained)
    return flops(jax.grad(loss), trained, shapes.frozen, shapes.batch(1))


def state_bytes(config: TrainConfig, mesh: Mesh | AbstractMesh, shapes: StepShapes) -> int:
    """Of the train state, on each device."""
    state = abstract_state(shapes.trained, make_optimizer(config.optimizer, config.steps))
    return _bytes(state, state_sharding(mesh, state))


def memory_by_shapes(
    config: TrainConfig, mesh: Mesh | AbstractMesh, shapes: StepShapes, activations: int | None = None
) -> dict[str, int]:
    """Bytes on each device, by what they are for. All but the last two are exact; a compiler may keep more of these, or
    less.

    "weights" are what is trained in the compute type, "gradients" fp32, "gathered" two of the largest arrays whole,
    where any is split (one in use, one on its way), "activations" what the gradient of a device's samples keeps; of
    one sample it is `activations`, found by tracing where that is not given.
    """
    dtype = config.compute_dtype()
    each = activation_bytes(shapes, dtype) if activations is None else activations
    trained, ways = shapes.trained, batch_ways(mesh) * config.accumulate
    state = abstract_state(trained, make_optimizer(config.optimizer, config.steps))
    split = state_sharding(mesh, state).params
    working, frozen = _in(dtype, trained), frozen_sharding(mesh, config.mesh, shapes.frozen)
    whole = sum(leaf.size for leaf in jax.tree.leaves(working)) * dtype.itemsize
    largest = 0
    for tree, shardings in ((working, split), (shapes.frozen, frozen)):
        placed = leaves(shardings)
        for path, leaf in leaves(tree).items():
            size = leaf.size * leaf.dtype.itemsize
            largest = max(largest, size if bytes_per_device(leaf, placed[path]) < size else 0)
    return {
        "state": _bytes(state, state_sharding(mesh, state)),
        "frozen": _bytes(shapes.frozen, frozen),
        "weights": whole if config.mesh.strategy == "zero1" else _bytes(working, split),
        "gradients": _bytes(trained, split),
        "batch": -(-config.batch_size // batch_ways(mesh)) * _row_bytes(shapes.row),
        "gathered": 2 * largest,
        "activations": math.ceil(config.batch_size / ways) * each,
    }


def activation_bytes(shapes: StepShapes, dtype: jnp.dtype) -> int:
    """What the gradient of the loss keeps for each sample: by tracing it, with the objective's rematerialisation."""
    trained = _in(dtype, shapes.trained)

    def kept(params, frozen, batch):
        def loss(params):
            return shapes.objective.loss(params, frozen, batch, jax.random.key(0))[0]

        return jax.vjp(loss, params)[1]

    def total(size: int) -> int:
        with pretend_platform("none"):  # this machine's processor would compute in fp32
            found = jax.eval_shape(kept, trained, shapes.frozen, shapes.batch(size))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))

    return total(2) - total(1)


def _row_bytes(row: Mapping[str, Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))


def _bytes(tree: Any, shardings: Any) -> int:
    placed = leaves(shardings)
    return sum(bytes_per_device(leaf, placed[path]) for path, leaf in leaves(tree).items())


def _in(dtype: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
