"""What changes during training, and the one compiled step that changes it.

Frozen networks are not part of the state: they are an argument of the step, so no gradient, no optimizer memory and
no weight decay can reach them. They are placed by the same rules as what is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdm_jax.models.unet.branch import REINITIALISED
from bdm_jax.runtime.sharding import batch_sharding, place, replicated, split_sharding, tree_sharding
from bdm_jax.training.config import MeshConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.objective import Batch, Trees

Loss = Callable[[Trees, dict[str, Any], Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: () int32; params and ema: fp32 trees of the same shape; optimizer: optax's state."""

    step: jax.Array
    params: Trees
    ema: Trees
    optimizer: Any


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipped gradients through `config.name`; biases and norms (one-dimensional parameters) do not decay.

    AdamW (arXiv 1711.05101); Lion (arXiv 2302.06675); Adafactor (arXiv 1804.04235) without momentum and with an
    absolute learning rate: second moments as the outer product of rows and columns, updates of at most unit RMS.
    """
    warmup = min(config.warmup_steps, steps // 2)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)
    elif warmup:
        rate = optax.warmup_constant_schedule(0.0, config.learning_rate, warmup)
    else:  # without steps of warm-up, optax's schedule stays at its start, zero
        rate = config.learning_rate
    direction = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    }[config.name]()
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, _decays),
        optax.scale_by_learning_rate(rate),
        optax.stateless(lambda updates, _: _slow_copies(updates, config.copied_factor)),
    )


def _decays(params: Trees) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _slow_copies(updates: Trees, factor: float) -> Trees:
    """Updates of a branch's copied weights times `factor`; all others as they are."""
    branch = {
        path: update if REINITIALISED.search(path) else factor * update
        for path, update in updates.get("branch", {}).items()
    }
    return {**updates, **({"branch": branch} if branch else {})}


def abstract_state(params: Trees, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and types of the state for these parameters, or for their shapes."""
    return jax.eval_shape(lambda p: _new_state(p, optimizer), params)


def make_state(params: Trees, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, placed on the mesh."""
    shardings = state_sharding(mesh, abstract_state(params, optimizer))
    create = jax.jit(lambda p: _new_state(p, optimizer), out_shardings=shardings)
    return create(place(params, shardings.params))


def state_sharding(mesh: Mesh, state: TrainState) -> TrainState:
    """Where every array of the state lives: a parameter by its rule; what has its name and shape, with it."""
    params = tree_sharding(mesh, state.params)

    def where(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if len(keys) >= 2:
            name, parameter = keys[-2:]
            if state.params.get(name, {}).get(parameter, leaf).shape == leaf.shape and parameter in params[name]:
                return params[name][parameter]
        return split_sharding(mesh, leaf.shape)

    return jax.tree_util.tree_map_with_path(where, state)


def frozen_sharding(mesh: Mesh, config: MeshConfig, frozen: dict[str, Any]) -> dict[str, Any]:
    """Where every frozen array, of `frozen` or its shapes, lives: by the rules of what is trained; whole over fsdp with
    "whole", and with zero1, which computes with whole weights anyway.
    """
    over_fsdp = config.strategy == "fsdp" if config.frozen == "auto" else config.frozen == "split"
    return tree_sharding(mesh, frozen, over_fsdp=over_fsdp)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    frozen: dict[str, Any],
    *,
    stacked: bool = False,
) -> Callable[[TrainState, dict[str, Any], Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `(state, frozen, batch) -> (state, metrics)`; the old state's memory is reused.

    `loss(params, frozen, batch, key) -> (mean, metrics)`: its parameters come in the run's compute type, its key is
    made of the seed and the step. Gradients of `config.accumulate` parts of the batch are averaged in fp32. The average
    of the parameters warms up with them: its decay is min(ema_decay, (1 + step) / (10 + step)). Of `state` and `frozen`
    only the shapes are read; the frozen arrays are to lie as `frozen_sharding` says. `stacked`: a call takes several
    batches, stacked, and returns the metrics of as many steps.
    """
    shardings = state_sharding(mesh, state)
    dtype = config.compute_dtype()
    gradients_of = _accumulated(jax.value_and_grad(loss, has_aux=True), config.accumulate, mesh)

    def step(state: TrainState, frozen: dict[str, Any], batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        working = jax.tree.map(lambda p: p.astype(dtype), state.params)
        if config.mesh.strategy == "zero1":  # cast where it lies, then gathered: half the bytes
            working = jax.lax.with_sharding_constraint(working, shardings.params)
            working = jax.lax.with_sharding_constraint(working, replicated(mesh))
        (value, metrics), gradients = gradients_of(working, frozen, batch, key)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda average, now: average + (1.0 - decay) * (now - average), state.ema, params)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **metrics}
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    def steps(state: TrainState, frozen: dict[str, Any], batches: Batch):
        return jax.lax.scan(lambda state, batch: step(state, frozen, batch), state, batches)

    return jax.jit(
        steps if stacked else step,
        in_shardings=(shardings, frozen_sharding(mesh, config.mesh, frozen), batch_sharding(mesh, stacked)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _new_state(params: Trees, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def _accumulated(value_and_gradient: Callable, parts: int, mesh: Mesh) -> Callable:
    """The same function over `parts` equal parts of its batch, one after the other: means, in fp32."""

    def in_fp32(*arguments):
        return jax.tree.map(lambda x: x.astype(jnp.float32), value_and_gradient(*arguments))

    if parts == 1:
        return in_fp32

    def split(x):  # every device's rows are dealt out to the parts, so that none of them has to move
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))

    def over_parts(params, frozen, batch, key):
        def one(part):
            return in_fp32(params, frozen, part, key)

        batch = jax.tree.map(split, batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch))
        )
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, batch)
        return jax.tree.map(lambda x: x / parts, total)

    return over_parts
