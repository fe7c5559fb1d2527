"""What changes during training, and the one compiled step that changes it.

Frozen networks are not part of the state: they are an argument of the step, so no gradient, no optimizer memory and
no weight decay can reach them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bdm_jax.models.branch import STARTS_ANEW
from bdm_jax.sharding import batch_sharding, replicated, tree_sharding
from bdm_jax.training.config import OptimizerConfig
from bdm_jax.training.tasks import Trees

Loss = Callable[[Trees, Trees, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: () int32; params and ema: fp32 trees of the same shape; optimizer: optax's state."""

    step: jax.Array
    params: Trees
    ema: Trees
    optimizer: Any


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients; biases and norms (one-dimensional parameters) do not decay."""
    warmup = min(config.warmup_steps, steps // 2)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)
    else:
        rate = optax.warmup_constant_schedule(0.0, config.learning_rate, warmup)
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decays),
        optax.stateless(lambda updates, _: _slow_copies(updates, config.copied_factor)),
    )


def _slow_copies(updates: Trees, factor: float) -> Trees:
    """Updates of a branch's copied weights times `factor`; all others as they are."""
    branch = {
        path: update if STARTS_ANEW.search(path) else factor * update
        for path, update in updates.get("branch", {}).items()
    }
    return {**updates, **({"branch": branch} if branch else {})}


def make_state(params: Trees, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, placed on the mesh."""
    create = lambda p: TrainState(  # noqa: E731
        jnp.zeros((), jnp.int32), p, jax.tree.map(jnp.copy, p), optimizer.init(p)
    )
    shardings = tree_sharding(mesh, jax.eval_shape(create, params))
    return jax.jit(create, out_shardings=shardings)(params)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float, seed: int, mesh: Mesh, state: TrainState
) -> Callable[[TrainState, Trees, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `(state, frozen, batch) -> (state, metrics)`; the old state's memory is reused.

    `loss(params, frozen, batch, key) -> (scalar, metrics)`, its key made of the seed and the step. The average of the
    parameters warms up with them: its decay is min(ema_decay, (1 + step) / (10 + step)).
    """

    def step(state: TrainState, frozen: Trees, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda average, now: average + (1.0 - decay) * (now - average), state.ema, params)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(gradients), **metrics}
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    shardings = tree_sharding(mesh, state)
    return jax.jit(
        step,
        in_shardings=(shardings, replicated(mesh), batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
