"""Samplers as tables of small matrices: every row is one evaluation of the network, followed by

    (latents, memory 1, 2, 3)  <-  matrix (4,6) @ (latents, memory 1, 2, 3, prediction, noise).

All samplers in use are linear in what they have seen (but for the clipping of pixels, which is added), so this is all
of them: multistep ones keep past predictions in
the memory, two-evaluation ones the latents that they return to. Only the numbers differ, so one compiled loop runs
them all. `advance` is the pure step; the recipes that fill the tables are in `recipes.py`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from bdm_jax.diffusion import recipes
from bdm_jax.diffusion.recipes import Steps
from bdm_jax.diffusion.schedule import SPACINGS, Schedule
from bdm_jax.errors import UserError, unknown


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """Latents (B,H,W,C) fp32 as the network sees them, and what the sampler remembers (M,B,H,W,C), M as its table."""

    latents: jax.Array
    memory: jax.Array


def start(noise: jax.Array, steps: Steps, clean: jax.Array | None = None) -> SamplerState:
    """Unit noise (B,H,W,C), perhaps with the clean latents of a picture -> the state before the first row."""
    latents = steps.initial[0] * noise if clean is None else steps.alpha[0] * clean + steps.sigma[0] * noise
    return SamplerState(latents, jnp.zeros((steps.matrix.shape[1] - 1, *noise.shape), noise.dtype))


def advance(
    state: SamplerState,
    prediction: jax.Array,
    row: Steps,
    noise: jax.Array,
    clipped: Callable[[], jax.Array] | None = None,
) -> SamplerState:
    """One row of the table. `prediction` is the network's output at `state.latents` and `row.t`, `noise` is unit noise
    that only the stochastic samplers use; both (B,H,W,C). `clipped` gives what clipping adds to the clean latents that
    are predicted, for rows that clip.
    """
    seen = jnp.stack([prediction.astype(jnp.float32), noise])
    seen = jnp.concatenate([state.latents[None], state.memory, seen])
    new = jnp.tensordot(row.matrix, seen, axes=1, precision=jax.lax.Precision.HIGHEST)
    if row.clip is not None:
        new = new + row.clip[:, None, None, None, None] * clipped()
    return SamplerState(new[0], new[1:])


def row_noise(seeds: jax.Array, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit noise (B, *shape) fp32 for one row of the table: each sample's depends on its seed (B,) and the row only."""

    def one(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), row), shape, jnp.float32)

    return jax.vmap(one)(seeds)


Sampler = Callable[..., Steps]  # (schedule, steps, spacing=..., begin=...)

_OPTIONS = {
    **{f"-{spacing}": {"spacing": spacing} for spacing in SPACINGS},
    "-sigma-min": {"final_sigma_zero": False},
    "-full-order": {"lower_order_final": False},
}


class Samplers(Mapping[str, Sampler]):
    """Samplers by name. A key is found however users write it: `DPM++ 2M Karras`, `k_euler`, `euler_ancestral`. Endings
    change how it is done, where the sampler has it:

    -leading, -linspace, -trailing: another timestep spacing, as in `ddim-trailing`.
    -sigma-min: the last step ends at the least noise of the schedule, not at none (diffusers' final_sigmas_type).
    -full-order: with few steps the last ones are not of a lower order (diffusers' lower_order_final, off).

    Iterating gives the plain names.
    """

    def __init__(self, samplers: Mapping[str, Sampler]):
        self._samplers = dict(samplers)

    def __getitem__(self, name: str) -> Sampler:
        name, options = canonical(name), {}
        while name not in self._samplers:
            ending = next((ending for ending in _OPTIONS if name.endswith(ending)), None)
            if ending is None or _OPTIONS[ending].keys() & options.keys():
                raise KeyError(name)
            name, options = name.removesuffix(ending), {**options, **_OPTIONS[ending]}
        sampler = self._samplers[name]
        if options.keys() - inspect.signature(sampler).parameters or (name == "lcm" and options):
            raise KeyError(name)  # lcm's timesteps are those it was distilled at
        return partial(sampler, **options) if options else sampler

    def __iter__(self) -> Iterator[str]:
        return iter(self._samplers)

    def __len__(self) -> int:
        return len(self._samplers)


def check_sampler(name: str | None) -> None:
    """Raises UserError for a name that no sampler has, and an ending without effect; None is the system's own."""
    if name is None:
        return
    plain = canonical(name)
    if name in SAMPLERS:
        if "-full-order" in plain and "-sigma-min" not in plain:
            why = "without -sigma-min the last step is of first order anyway"
            raise UserError(f"sampler {name}: -full-order has no effect, {why}")
        return
    base = max((base for base in SAMPLERS if plain.startswith(f"{base}-")), key=len, default="")
    if base and re.fullmatch("|".join((*_OPTIONS, *_LAYOUTS)).join(("(", ")+")), plain.removeprefix(base)):
        raise UserError(f"sampler {name}: {base} has no ending {plain.removeprefix(base)}")
    raise unknown("sampler", name, [known for known in SAMPLERS if not known.endswith(_LAYOUTS)])


def check_options(name: str, **options: object) -> None:
    """Raises UserError for options (by the name of the recipe's argument) that a sampler does not have, or that its
    name decides already.
    """
    sampler = SAMPLERS[name]
    takes, fixed = inspect.signature(sampler).parameters, getattr(sampler, "keywords", {})
    words = {"spacing": "timesteps", "sigmas": "sigmas", "eta": "eta"}
    for option, value in options.items():
        shown = f"{words[option]} {' '.join(map(str, value)) if isinstance(value, tuple | list) else value}"
        if option not in takes or (option == "spacing" and canonical(name).startswith("pndm")):
            raise UserError(f"{shown} has no effect: {name} has no such setting")
        if {"spacing", "sigmas"} & fixed.keys() and option != "eta":
            raise UserError(
                f"{shown} has no effect: {name} lays out its steps itself; take the name without that ending"
            )


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

_SIGMAS = ("karras", "exponential", "beta")
_LAYOUTS = ("-karras", "-exponential", "-beta", "-lu")  # endings for the layout of noise levels


def _with_sigmas(name: str, recipe: Sampler, ways: tuple[str, ...] = _SIGMAS) -> dict[str, Sampler]:
    """A sampler and its variants with noise levels that are laid out in other ways, `euler-karras` and so on."""
    return {name: recipe, **{f"{name}-{sigmas}": partial(recipe, sigmas=sigmas) for sigmas in ways}}


SAMPLERS = Samplers(
    {
        "ddim": recipes.ddim,
        "ddpm": recipes.ddpm,
        "pndm": recipes.pndm,
        "pndm-prk": recipes.pndm_prk,
        "lcm": recipes.lcm,
        "euler-a": recipes.euler_ancestral,
        **_with_sigmas("lms", recipes.lms),
        **_with_sigmas("euler", recipes.euler),
        **_with_sigmas("heun", recipes.heun),
        **_with_sigmas("dpmpp-2m", recipes.dpmpp_2m, (*_SIGMAS, "lu")),
        **_with_sigmas("dpmpp-2m-sde", partial(recipes.dpmpp_2m, stochastic=True), (*_SIGMAS, "lu")),
        **_with_sigmas("dpmpp-sde", recipes.dpmpp_sde),
        **_with_sigmas("unipc", recipes.unipc),
    }
)
