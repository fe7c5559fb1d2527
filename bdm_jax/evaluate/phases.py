"""Does a network take a longer noise schedule in mid-training easily? `python -m bdm_jax.evaluate.phases --json FILE`

Kolors learns concepts with SDXL's schedule (1000 timesteps, beta_end 0.012) and quality with one of 1100 timesteps and
a beta_end of 0.014, whose last pictures are noisier; its authors say that this adapts easily, since the noise at the
first 1000 timesteps hardly changes. Measured here on a small unconditional UNet that predicts the noise in the demo's
latents of emoji (64 x 64 pixels, 8 x 8 x 4). It is trained on the base schedule; then copies of it go on with

    base      the same schedule, other batches: what changes without any change
    kolors    1100 timesteps, beta_end 0.014
    naive     1100 timesteps, beta_end 0.012 as before
    shifted   1000 timesteps with the noise levels k of all multiplied, so that the last is Kolors'

all on the same batches, times (as shares of the schedule) and noise. The loss is that of pictures kept apart, with the
same noise for all, of averaged weights, at timesteps below 1000. From several trainings:

    jump       the loss at equal timesteps under the new schedule less that under the old one, of the same weights: its
               absolute value, averaged over timesteps
    adapting   how much of the loss under the new schedule the second phase takes away, less what it takes away in base
    new times  the loss at timesteps from 1000 on, when the schedule changes and after the second phase
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from bdm_jax import command_line
from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.images.chart import bars
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.images.pictures import write_png
from bdm_jax.latents.autoencoder import encode
from bdm_jax.models.config import UNetConfig
from bdm_jax.models.functional import Params, bind, init
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import DEMO, EMOJI, check_output
from bdm_jax.runtime import compile_cache
from bdm_jax.systems.components import load_component

SIDE = 64  # pixels
TIMES = np.arange(50, 1000, 100)  # at which the loss is measured
NEW_TIMES = np.arange(1010, 1100, 20)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    transformer_layers=(0, 0),
    layers_per_block=1,
    num_heads=2,
    cross_attention_dim=8,
    norm_num_groups=8,
)
_AVERAGE = 0.98  # of the weights that are measured, per step
_RATE = 1e-3


@dataclass(frozen=True)
class Shifted(DiscreteSchedule):
    """Every noise level k = sigma / alpha multiplied by `shift` (as for larger images in arXiv 2301.11093)."""

    shift: float = 1.0

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(num_train_timesteps,) float64: 1 / (1 + k^2)."""
        return 1 / (1 + np.square(self.shift) * (1 / super().alphas_cumprod - 1))


BASE, KOLORS = DiscreteSchedule(), DiscreteSchedule(num_train_timesteps=1100, beta_end=0.014)
ARMS: dict[str, DiscreteSchedule] = {
    "base": BASE,
    "kolors": KOLORS,
    "naive": DiscreteSchedule(num_train_timesteps=1100),
    "shifted": Shifted(shift=float(KOLORS.noise_levels[-1] / BASE.noise_levels[-1])),
}


@dataclass(frozen=True)
class PhaseArgs:
    """Measure a change of the noise schedule in mid-training."""

    first: int = 800
    """steps of the first phase"""
    second: int = 200
    """steps of the second phase"""
    seeds: int = 3
    """trainings, each with weights, batches and noise of its own"""
    batch_size: int = 32
    """pictures in a step"""
    held_out: int = 256
    """pictures that the loss is measured on"""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the figures here"""
    chart: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """draw the losses at the change as PNG here"""


class State(NamedTuple):
    """Of a training."""

    params: Params
    optimizer: Any
    average: Params


def measure(latents: np.ndarray, asked: PhaseArgs) -> dict[str, Any]:
    """Latents (N,h,w,4) of unit scale -> the figures: for every arm lists over trainings, printed as they come.

    Raises UserError for counts that are not positive or fewer latents than are held out.
    """
    for name in ("first", "second", "seeds", "batch_size", "held_out"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(asked, name)}: must be at least 1")
    if asked.held_out >= len(latents):
        raise UserError(f"--held-out {asked.held_out}: there are only {len(latents)} pictures")
    order = np.random.default_rng(0).permutation(len(latents))
    kept, trained = latents[order[: asked.held_out]], latents[order[asked.held_out :]]
    runs = [_run(trained, kept, asked, seed) for seed in range(asked.seeds)]
    arms = {name: {key: [run[name][key] for run in runs] for key in runs[0][name]} for name in ARMS}
    return {"times": TIMES.tolist(), "arms": arms, "summary": {name: _summary(arms, name) for name in ARMS}}


def _run(trained: np.ndarray, kept: np.ndarray, asked: PhaseArgs, seed: int) -> dict[str, dict[str, Any]]:
    """One training with all its second phases: arm -> losses by time."""
    params = init(UNET, seed)
    state = State(params, optax.adam(_RATE).init(params), params)
    state = _phase(state, trained, BASE, asked.first, asked.batch_size, np.random.default_rng([seed, 1]))
    before, found = losses(state.average, kept, BASE, TIMES), {}
    for name, schedule in ARMS.items():
        after = _phase(state, trained, schedule, asked.second, asked.batch_size, np.random.default_rng([seed, 2]))
        new = NEW_TIMES[NEW_TIMES < schedule.num_train_timesteps]
        found[name] = {
            "before": before,
            "at_change": before if schedule == BASE else losses(state.average, kept, schedule, TIMES),
            "after": losses(after.average, kept, schedule, TIMES),
            "new_at_change": losses(state.average, kept, schedule, new),
            "new_after": losses(after.average, kept, schedule, new),
        }
        jump = np.abs(np.subtract(found[name]["at_change"], found[name]["before"])).mean()
        means = [np.mean(found[name][key]) for key in ("before", "at_change", "after")]
        print(f"seed {seed} {name:8} jump {jump:.5f}  loss {means[0]:.4f} {means[1]:.4f} {means[2]:.4f}", flush=True)
    return found


def _summary(arms: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The figures of the module's head, each a list over trainings."""
    before, change, after = (np.array(arms[name][key]) for key in ("before", "at_change", "after"))
    gained = {one: np.mean(arms[one]["at_change"], 1) - np.mean(arms[one]["after"], 1) for one in ("base", name)}
    new = [np.array(arms[name][key]) for key in ("new_at_change", "new_after")]
    return {
        "before": before.mean(1).tolist(),
        "at_change": change.mean(1).tolist(),
        "after": after.mean(1).tolist(),
        "jump": np.abs(change - before).mean(1).tolist(),
        "adapting": (gained[name] - gained["base"]).tolist(),
        **({"new_at_change": new[0].mean(1).tolist(), "new_after": new[1].mean(1).tolist()} if new[0].size else {}),
    }


def losses(params: Params, latents: np.ndarray, schedule: DiscreteSchedule, times: np.ndarray) -> list[float]:
    """The mean squared error of the predicted noise at each of the times, with the same noise at all of them."""
    noise = np.random.default_rng(99).standard_normal(latents.shape, np.float32)
    return [float(_error(params, latents, noise, *_levels(schedule, np.full(len(latents), t)))) for t in times]


def _levels(schedule: DiscreteSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times (B,) with alpha^2 (B,1,1,1) there, both arguments of one compiled program for all schedules."""
    return t.astype(np.int32), schedule.alphas_cumprod[t].astype(np.float32)[:, None, None, None]


@jax.jit
def _error(params: Params, clean: jax.Array, noise: jax.Array, t: jax.Array, squared: jax.Array) -> jax.Array:
    noisy = jnp.sqrt(squared) * clean + jnp.sqrt(1 - squared) * noise
    text = Conditioning(jnp.zeros((len(clean), 1, UNET.cross_attention_dim)))
    return jnp.mean(jnp.square(bind(UNET, params)(noisy, t, text) - noise))


def _phase(
    state: State,
    latents: np.ndarray,
    schedule: DiscreteSchedule,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> State:
    """So many steps on; the draws are the same for every schedule."""
    for _ in range(steps):
        chosen = rng.integers(len(latents), size=batch_size)
        noise = rng.standard_normal((batch_size, *latents.shape[1:]), np.float32)
        times = (rng.random(batch_size) * schedule.num_train_timesteps).astype(np.int64)
        state = _step(state, latents[chosen], noise, *_levels(schedule, times))
    return state


@jax.jit
def _step(state: State, *batch: jax.Array) -> State:
    gradients = jax.grad(_error)(state.params, *batch)
    updates, optimizer = optax.adam(_RATE).update(gradients, state.optimizer)
    params = optax.apply_updates(state.params, updates)
    average = jax.tree.map(lambda a, b: _AVERAGE * a + (1 - _AVERAGE) * b, state.average, params)
    return State(params, optimizer, average)


def chart(found: dict[str, Any]) -> np.ndarray:
    """For each timestep how far the loss is from that under the old schedule, at the change, as bars."""
    arms = {name: found["arms"][name] for name in ("shifted", "naive", "kolors")}
    gaps = {name: np.subtract(arm["at_change"], arm["before"]).mean(0) for name, arm in arms.items()}
    groups = {
        f"t = {t}": {name: float(abs(gap[row])) for name, gap in gaps.items()} for row, t in enumerate(found["times"])
    }
    return bars(groups, "")


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr)."""

    def command() -> None:
        asked = command_line.parse(PhaseArgs, args, prog="python -m bdm_jax.evaluate.phases")
        check_output("--json", asked.json)
        check_output("--chart", asked.chart)
        compile_cache.enable()
        found = measure(_latents(), asked)
        print(f"\n{'mean over trainings':20}" + "".join(f"{name:>16}" for name in ARMS))
        for key in found["summary"]["kolors"]:
            rows = [found["summary"][name].get(key) for name in ARMS]
            print(f"{key:20}" + "".join(f"{'' if row is None else f'{np.mean(row):.5f}':>16}" for row in rows))
        if asked.json:
            write_json(asked.json, found)
        if asked.chart:
            write_png(asked.chart, chart(found), palette=True)

    return command_line.run(command)


def _latents() -> np.ndarray:
    """The bundled drawings, one style."""
    source, vae = open_source(EMOJI), load_component(DEMO / "vae", "float32")
    records = (source[int(i)] for i in concepts(source, "fluent", language="zh"))
    images = [resize_to_cover(decode_image(record["image"]), (SIDE, SIDE)) for record in records]
    return encode(vae, np.stack(images))


if __name__ == "__main__":
    sys.exit(main())
