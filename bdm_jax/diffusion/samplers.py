"""Samplers as tables of small matrices: every row is one evaluation of the network, followed by

    (latents, memory 1, 2, 3)  <-  matrix (4,6) @ (latents, memory 1, 2, 3, prediction, noise).

All samplers in use are linear in what they have seen, so this is all of them: multistep ones keep past predictions in
the memory, two-evaluation ones the latents that they return to. Only the numbers differ, so one compiled loop runs
them all. `advance` is the pure step; the recipes that fill the tables are in `recipes.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from bdm_jax.diffusion import recipes
from bdm_jax.diffusion.recipes import MEMORY, Steps
from bdm_jax.diffusion.schedule import SPACINGS, Schedule
from bdm_jax.errors import unknown


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """Latents (B,H,W,C) fp32 as the network sees them, and what the sampler remembers (3,B,H,W,C)."""

    latents: jax.Array
    memory: jax.Array


def start(noise: jax.Array, steps: Steps, clean: jax.Array | None = None) -> SamplerState:
    """Unit noise (B,H,W,C), perhaps with the clean latents of a picture -> the state before the first row."""
    latents = steps.initial[0] * noise if clean is None else steps.alpha[0] * clean + steps.sigma[0] * noise
    return SamplerState(latents, jnp.zeros((len(MEMORY), *noise.shape), noise.dtype))


def advance(state: SamplerState, prediction: jax.Array, row: Steps, noise: jax.Array) -> SamplerState:
    """One row of the table. `prediction` is the network's output at `state.latents` and `row.t`, `noise` is unit noise
    that only the stochastic samplers use; both (B,H,W,C).
    """
    seen = jnp.stack([prediction.astype(jnp.float32), noise])
    seen = jnp.concatenate([state.latents[None], state.memory, seen])
    new = jnp.tensordot(row.matrix, seen, axes=1, precision=jax.lax.Precision.HIGHEST)
    return SamplerState(new[0], new[1:])


def row_noise(seeds: jax.Array, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit noise (B, *shape) fp32 for one row of the table: each sample's depends on its seed (B,) and the row only."""

    def one(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), row), shape, jnp.float32)

    return jax.vmap(one)(seeds)


Sampler = Callable[..., Steps]  # (schedule, steps, spacing=..., begin=...)


class Samplers(Mapping[str, Sampler]):
    """Samplers by name. A key is found however users write it: `DPM++ 2M Karras`, `k_euler`, `euler_ancestral`, and
    with another timestep spacing where `-leading`, `-linspace` or `-trailing` is added: `ddim-trailing`.

    Iterating gives the plain names.
    """

    def __init__(self, samplers: Mapping[str, Sampler]):
        self._samplers = dict(samplers)

    def __getitem__(self, name: str) -> Sampler:
        name, spacing = canonical(name), None
        base, _, last = name.rpartition("-")
        if last in SPACINGS:
            name, spacing = base, last
        sampler = self._samplers[name]
        if spacing is None:
            return sampler
        if name == "lcm":
            raise KeyError(f"{name}-{spacing}")  # its timesteps are those it was distilled at
        return partial(sampler, spacing=spacing)

    def __iter__(self) -> Iterator[str]:
        return iter(self._samplers)

    def __len__(self) -> int:
        return len(self._samplers)


def check_sampler(name: str | None) -> None:
    """Raises UserError for a name that no sampler has; None is the system's own."""
    if name is not None and name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)


def system_sampler(name: str, schedule: Schedule) -> str:
    """A system's default sampler: one that is named with a timestep spacing, as `euler-leading`, has the spacing that
    the model's schedule says in its place.
    """
    base, _, last = name.rpartition("-")
    return f"{base}-{schedule.timestep_spacing}" if last in SPACINGS else name


def canonical(name: str) -> str:
    """A sampler's name as other programs write it -> the library's: `DPM++ 2M SDE Karras` -> `dpmpp-2m-sde-karras`."""
    name = re.sub(r"[\s_-]+", "-", name.strip().lower().replace("++", "pp"))
    name = re.sub(r"^(k|sample)-", "", name)
    for pattern, plain in _ALIASES:
        name = re.sub(rf"^{pattern}(?=-|$)", plain, name)
    return name


_ALIASES = (
    ("dpm-?solver(pp)?|dpmpp2m|dpmpp-2m-v2", "dpmpp-2m"),
    ("dpmpp-?2m-?sde(-gpu)?", "dpmpp-2m-sde"),
    ("dpmpp-?sde(-gpu)?", "dpmpp-sde"),
    ("euler-ancestral|eulera", "euler-a"),
    ("uni-pc", "unipc"),
    ("plms", "pndm"),
)

SAMPLERS = Samplers(
    {
        "ddim": recipes.ddim,
        "ddpm": recipes.ddpm,
        "pndm": recipes.pndm,
        "lcm": recipes.lcm,
        "euler-a": recipes.euler_ancestral,
        **{
            f"{name}-{sigmas}" if sigmas else name: partial(recipe, sigmas=sigmas) if sigmas else recipe
            for name, recipe in {
                "lms": recipes.lms,
                "euler": recipes.euler,
                "heun": recipes.heun,
                "dpmpp-2m": recipes.dpmpp_2m,
                "dpmpp-2m-sde": partial(recipes.dpmpp_2m, stochastic=True),
                "dpmpp-sde": recipes.dpmpp_sde,
                "unipc": recipes.unipc,
            }.items()
            for sigmas in (None, "karras", "exponential")
        },
    }
)
