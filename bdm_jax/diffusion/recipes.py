"""How each sampler fills its table, in float64 on the host.

A recipe is written as the sampler's own step, on symbols: `LATENTS`, `MEMORY`, `PREDICTION` and `NOISE` are unit
vectors, so what a step returns is the matrix that does it. Latents always have the variance that the network was
trained with, x = alpha x0 + sigma noise; the papers' and diffusers' variance-exploding samplers hold x / alpha, whose
noise is `k` = sigma / alpha. With `begin`, the first steps are left out: an image that is noised to that level is
drawn from there (img2img). A table takes the trajectory of the diffusers scheduler that its recipe names, and a
comment says where that is a quirk.

`spacing` lays out the timesteps, or is the timesteps themselves; `sigmas` lays out the noise levels, or is the levels k
themselves with the one at which the last step ends (usually 0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from scipy import special

from bdm_jax.diffusion.schedule import NEARLY_ZERO, DiscreteSchedule, Schedule
from bdm_jax.errors import UserError

LATENTS, *MEMORY, PREDICTION, NOISE, CLIP = np.eye(7)

Spacing = str | Sequence[float] | None

_ROUNDED = 1.001  # 14.6146, the most noise of SD1.5, is 14.615 in published lists
_LCM_STEPS = 50  # at which latent consistency models are distilled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """A sampler's table; N rows, one for every evaluation of the network (some samplers take two per step)."""

    row: jax.Array  # (N,) int32: its own number
    t: jax.Array  # (N,) fp32: the time given to the network; some samplers evaluate between the trained timesteps
    alpha: jax.Array  # (N,) fp32: latents at this row are alpha x0 + sigma noise
    sigma: jax.Array
    initial: jax.Array  # (N,) fp32: what unit noise is multiplied with to begin here
    matrix: jax.Array  # (N,4,6) fp32: (latents, memory) from (latents, memory, prediction, noise)
    clip: jax.Array | None = None  # (N,4) fp32: and what clipping changes of the clean latents, times this; None is 0


def ddim(
    schedule: DiscreteSchedule, count: int, spacing: Spacing = "leading", eta: float = 0.0, begin: int = 0
) -> Steps:
    """DDIM (Song et al. 2021; diffusers' DDIMScheduler). `eta` from 0 to 1: how much of DDPM's fresh noise it adds."""
    at, stride = _trained(schedule), schedule.num_train_timesteps // count
    times = schedule.timesteps(count, spacing).round()
    # diffusers' stride under every spacing, though only "leading" has it
    ends = times - stride if isinstance(spacing, str) else np.append(times[1:], -1)
    rows = []
    for t, end in zip(times[begin:], ends[begin:], strict=True):
        (alpha, sigma), (alpha_to, sigma_to) = at(t), at(end)
        x0, noise = _x0_and_noise(schedule, alpha, sigma)
        fresh = eta * sigma_to / sigma * np.sqrt(1 - (alpha / alpha_to) ** 2)
        kept = np.sqrt(sigma_to**2 - fresh**2) if eta else sigma_to
        rows.append((t, alpha, sigma, [alpha_to * _clipped(schedule, x0) + kept * noise + fresh * NOISE]))
    return _table(rows)


def ddpm(schedule: DiscreteSchedule, count: int, spacing: Spacing = "leading", begin: int = 0) -> Steps:
    """Ancestral sampling with the smaller variance (Ho et al. 2020; diffusers' DDPMScheduler)."""
    at = _trained(schedule)
    times = schedule.timesteps(count, spacing).round()[begin:]
    rows = []
    for i, t in enumerate(times):
        alpha, sigma = at(t)
        alpha_to, sigma_to = at(times[i + 1]) if i + 1 < len(times) else (1.0, 0.0)
        x0 = _clipped(schedule, _x0_and_noise(schedule, alpha, sigma)[0])
        kept = alpha / alpha_to
        beta = 1 - kept**2
        mean = alpha_to * beta / sigma**2 * x0 + kept * sigma_to**2 / sigma**2 * LATENTS
        rows.append((t, alpha, sigma, [mean + sigma_to / sigma * np.sqrt(beta) * NOISE]))
    return _table(rows)


def pndm(schedule: DiscreteSchedule, count: int, spacing: str = "leading", begin: int = 0) -> Steps:
    """Pseudo linear multistep, "PLMS" (Liu et al. 2022; diffusers' PNDMScheduler with skip_prk_steps): count + 1 rows.

    The second row takes the first step again, with the mean of its two ends.
    """
    at, stride = _trained(schedule, NEARLY_ZERO), schedule.num_train_timesteps // count
    times = schedule.timesteps(count, spacing).round()[begin:]
    v = schedule.prediction_type == "v_prediction"  # diffusers averages v itself and turns it into noise afterwards
    rows = []
    for i, t in enumerate([*times[:2], *times[1:]]):
        begin, end = (t + stride, t) if i == 1 else (t, t - stride)
        alpha, sigma = at(begin)
        alpha_to, sigma_to = at(end)
        last = PREDICTION if v else _x0_and_noise(schedule, *at(t))[1]
        latents, history = LATENTS, [last, *MEMORY]
        if i == 0:
            mean, memory = last, [last, LATENTS]
        elif i == 1:
            mean, latents, memory = (last + MEMORY[0]) / 2, MEMORY[1], [MEMORY[0]]
        else:
            weights = ((3, -1), (23, -16, 5), (55, -59, 37, -9))[min(i, 4) - 2]
            mean = sum(w * h for w, h in zip(weights, history, strict=False)) / sum(weights)
            memory = history[:3]
        noise = alpha * mean + sigma * latents if v else mean
        rows.append((t, *at(t), [alpha_to * (latents - sigma * noise) / alpha + sigma_to * noise, *memory]))
    return _table(rows)


def pndm_prk(schedule: DiscreteSchedule, count: int, spacing: Spacing = "leading", begin: int = 0) -> Steps:
    """PNDM as in its paper (Liu et al. 2022; diffusers' PNDMScheduler without skip_prk_steps): three Runge-Kutta steps
    of four evaluations each, then multistep: count + 9 rows.
    """
    if count - begin < 4:
        raise UserError(f"pndm-prk takes at least 4 steps, the first three to start; {count - begin} were asked for")
    latents, begun, mean, *past, prediction, _, _ = np.eye(9)
    at, stride = _trained(schedule, NEARLY_ZERO), schedule.num_train_timesteps // count
    times, half = schedule.timesteps(count, spacing).round()[begin:], stride // 2
    v = schedule.prediction_type == "v_prediction"

    def output(t):
        alpha, sigma = at(t)
        return (latents - alpha * prediction) / sigma if schedule.prediction_type == "sample" else prediction

    def step(x, t, end, mean):
        (alpha, sigma), (alpha_to, sigma_to) = at(t), at(end)
        noise = alpha * mean + sigma * x if v else mean
        return alpha_to * (x - sigma * noise) / alpha + sigma_to * noise

    rows = []
    for t, end in zip(times[:3], times[1:4], strict=True):
        middle = end + half
        now = output(t)
        rows.append((t, *at(t), [step(latents, t, t - half, now), latents, now / 6, now, *past[:2]]))
        for after in (middle, middle - half):
            now = output(middle)
            rows.append((middle, *at(middle), [step(begun, t, after, now), begun, mean + now / 3, *past]))
        rows.append((end, *at(end), [step(begun, t, end, mean + output(end) / 6), begun, mean, *past]))
    for t in times[3:]:
        now = output(t)
        adams = (55 * now - 59 * past[0] + 37 * past[1] - 9 * past[2]) / 24
        rows.append((t, *at(t), [step(latents, t, t - stride, adams), begun, mean, now, *past[:2]]))
    return _table(rows)


def lcm(schedule: DiscreteSchedule, count: int, spacing: Sequence[float] | None = None, begin: int = 0) -> Steps:
    """Latent consistency models (Luo et al. 2023; diffusers' LCMScheduler): to the clean latents and back to less
    noise, at the timesteps that the model was distilled at.
    """
    at, distilled = _trained(schedule), min(_LCM_STEPS, schedule.num_train_timesteps)
    if count > distilled:
        raise UserError(f"lcm takes at most {distilled} steps, as many as it was distilled at; {count} were asked for")
    known = np.arange(distilled, 0, -1) * (schedule.num_train_timesteps // distilled) - 1
    times = known[np.floor(np.linspace(0, distilled, count, endpoint=False)).astype(int)]
    times = (times if spacing is None else schedule.timesteps(count, spacing))[begin:]
    rows = []
    for i, t in enumerate(times):
        x0 = _clipped(schedule, _x0_and_noise(schedule, *at(t))[0])
        far = 10.0 * t / 0.5
        clean = far / np.sqrt(far**2 + 1) * x0 + LATENTS / (far**2 + 1)
        alpha_to, sigma_to = at(times[i + 1]) if i + 1 < len(times) else (1.0, 0.0)
        rows.append((t, *at(t), [alpha_to * clean + sigma_to * NOISE]))
    return _table(rows)


def euler(schedule: Schedule, count: int, spacing: Spacing = None, sigmas: Spacing = None, begin: int = 0) -> Steps:
    """Euler (Karras et al. 2022; diffusers' EulerDiscreteScheduler)."""
    grid = _grid(schedule, count, spacing, sigmas, begin=begin)
    return grid.table([[grid.alpha[i + 1] * (x0 + grid.k[i + 1] * noise)] for i, x0, noise in grid.steps()])


def euler_ancestral(
    schedule: Schedule, count: int, spacing: Spacing = None, sigmas: Sequence[float] | None = None, begin: int = 0
) -> Steps:
    """Euler with fresh noise in every step (diffusers' EulerAncestralDiscreteScheduler)."""
    grid = _grid(schedule, count, spacing, sigmas, begin=begin)
    matrices = []
    for i, x0, noise in grid.steps():
        down, up = _ancestral(grid.k[i], grid.k[i + 1])
        matrices.append([grid.alpha[i + 1] * (x0 + down * noise + up * NOISE)])
    return grid.table(matrices)


def lms(schedule: Schedule, count: int, spacing: Spacing = None, sigmas: Spacing = None, begin: int = 0) -> Steps:
    """Linear multistep of order 4 (diffusers' LMSDiscreteScheduler): the noise as a polynomial in k, integrated."""
    grid = _grid(schedule, count, spacing, sigmas, begin=begin)
    nodes, weights = np.polynomial.legendre.leggauss(2)  # exact for the cubic
    matrices = []
    for i, _, noise in grid.steps():
        past, k = grid.k[i::-1][:4], grid.k[i : i + 2]
        at = k.mean() + nodes * np.diff(k) / 2
        history = [noise, *MEMORY]
        change = 0
        for j, node in enumerate(past):
            others = np.delete(past, j)
            basis = np.prod((at[:, None] - others) / (node - others), axis=1)
            change = change + (weights * basis).sum() * np.diff(k) / 2 * history[j]
        matrices.append([grid.alpha[i + 1] * (LATENTS / grid.alpha[i] + change), *history[:3]])
    return grid.table(matrices)


def heun(schedule: Schedule, count: int, spacing: Spacing = None, sigmas: Spacing = None, begin: int = 0) -> Steps:
    """Heun (Karras et al. 2022; diffusers' HeunDiscreteScheduler): every step but the last evaluates both ends."""
    grid = _grid(schedule, count, spacing, sigmas, begin=begin)
    rows = []
    for i, x0, noise in grid.steps():
        alpha_to, sigma_to = grid.alpha[i + 1], grid.sigma[i + 1]
        rows.append((grid.t[i], grid.alpha[i], grid.sigma[i], [alpha_to * x0 + sigma_to * noise, LATENTS, noise]))
        if i + 1 < len(grid.t):
            _, noise_to = _x0_and_noise(schedule, alpha_to, sigma_to)
            mean = (MEMORY[1] + noise_to) / 2
            back = alpha_to * (MEMORY[0] / grid.alpha[i] + (grid.k[i + 1] - grid.k[i]) * mean)
            rows.append((grid.t[i + 1], alpha_to, sigma_to, [back]))
    return _table(rows, grid.initial)


def dpmpp_2m(
    schedule: Schedule,
    count: int,
    spacing: Spacing = None,
    sigmas: Spacing = None,
    stochastic: bool = False,
    final_sigma_zero: bool = True,
    lower_order_final: bool = True,
    begin: int = 0,
) -> Steps:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022; diffusers' DPMSolverMultistepScheduler); `stochastic` is its
    "sde-dpmsolver++".

    `final_sigma_zero=False` ends at the sigma of timestep 0 as diffusers 0.24 did, and with it BDM's reference;
    `lower_order_final=False` keeps to the second order there even with few steps. At 0 itself only the first is known.
    """
    grid = _grid(schedule, count, spacing, sigmas, solver=True, final_sigma_zero=final_sigma_zero, begin=begin)
    ends_low = grid.k[-1] == 0 or (lower_order_final and count < 15)
    matrices = []
    for i, x0, _ in grid.steps():
        x0 = _clipped(schedule, x0, by_values=False)
        first_order = i == 0 or (i == len(grid.t) - 1 and ends_low)
        kept = grid.k[i + 1] / grid.k[i]
        slope = 0.0
        if not first_order:
            slope = (x0 - MEMORY[0]) * np.log(kept) / np.log(grid.k[i] / grid.k[i - 1])
        kept = kept**2 if stochastic else kept
        latents = grid.alpha[i + 1] / grid.alpha[i] * kept * LATENTS
        latents = latents + grid.alpha[i + 1] * (1 - kept) * (x0 + slope / 2)
        if stochastic:
            latents = latents + grid.sigma[i + 1] * np.sqrt(1 - kept) * NOISE
        matrices.append([latents, x0])
    return grid.table(matrices)


def dpmpp_sde(schedule: Schedule, count: int, spacing: Spacing = None, sigmas: Spacing = None, begin: int = 0) -> Steps:
    """DPM-Solver++ SDE, two evaluations per step (k-diffusion; diffusers' DPMSolverSDEScheduler).

    Its noise is one Brownian path: that of a whole step contains that of its first half.
    """
    grid = _grid(schedule, count, spacing, sigmas, begin=begin)
    rows = []
    for i, x0, noise in grid.steps():
        level, k, k_to = (grid.t[i], grid.alpha[i], grid.sigma[i]), grid.k[i], grid.k[i + 1]
        if k_to == 0:
            rows.append((*level, [x0]))
            break
        k_mid = np.sqrt(k * k_to)
        alpha, sigma = _alpha_sigma(k_mid)
        down, up = _ancestral(k, k_mid)
        rows.append((*level, [alpha * (x0 + down * noise + up * NOISE), LATENTS, NOISE]))
        x0, _ = _x0_and_noise(schedule, alpha, sigma)
        down, up = _ancestral(k, k_to)
        path = (np.sqrt(k - k_mid) * MEMORY[1] + np.sqrt(k_mid - k_to) * NOISE) / np.sqrt(k - k_to)
        latents = down / k * MEMORY[0] / grid.alpha[i] + (1 - down / k) * x0 + up * path
        rows.append((schedule.time(k_mid), alpha, sigma, [grid.alpha[i + 1] * latents]))
    return _table(rows, grid.initial)


def unipc(
    schedule: Schedule,
    count: int,
    spacing: Spacing = None,
    sigmas: Spacing = None,
    final_sigma_zero: bool = True,
    lower_order_final: bool = True,
    begin: int = 0,
) -> Steps:
    """UniPC of order 2, "bh2" (Zhao et al. 2023; diffusers' UniPCMultistepScheduler): each evaluation first corrects
    the step that led to it, then predicts the next. Its end is as `dpmpp_2m`'s.
    """
    grid = _grid(schedule, count, spacing, sigmas, solver=True, final_sigma_zero=final_sigma_zero, begin=begin)
    ends_low = grid.k[-1] == 0 or lower_order_final
    log_snr = -np.log(grid.k[:-1])
    before, before_that, corrected = MEMORY
    order, matrices = 0, []
    for i, x0, _ in grid.steps():
        x0 = _clipped(schedule, x0, by_values=False)
        latents = LATENTS
        if i > 0:
            h = log_snr[i] - log_snr[i - 1]
            first = np.expm1(-h)
            if order == 1:
                change = 0.5 * (x0 - before)
            else:
                r = (log_snr[i - 2] - log_snr[i - 1]) / h
                phi_1 = -first / h - 1
                phi_2 = -phi_1 / h - 0.5
                old, new = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_1 / first, 2 * phi_2 / first])
                change = old * (before_that - before) / r + new * (x0 - before)
            latents = grid.sigma[i] / grid.sigma[i - 1] * corrected - grid.alpha[i] * first * (before + change)
        order = min(2, len(grid.t) - i if ends_low else 2, i + 1)
        kept = grid.k[i + 1] / grid.k[i]
        slope = 0.0 if order == 1 else (x0 - before) * np.log(kept) / np.log(grid.k[i] / grid.k[i - 1])
        ahead = grid.sigma[i + 1] / grid.sigma[i] * latents + grid.alpha[i + 1] * (1 - kept) * (x0 + slope / 2)
        matrices.append([ahead, x0, before, latents])
    return grid.table(matrices)


@dataclass(frozen=True)
class _Grid:
    """Noise levels k that a sampler steps over, from the highest to the last, where no network is evaluated."""

    schedule: Schedule
    t: np.ndarray  # (N,)
    k: np.ndarray  # (N+1,)
    initial: float
    ends_exploded: bool = False  # diffusers' k-diffusion samplers give x / alpha where they end, if not at k = 0

    @property
    def alpha(self) -> np.ndarray:
        alpha, _ = _alpha_sigma(self.k)
        return np.append(alpha[:-1], 1.0) if self.ends_exploded else alpha

    @property
    def sigma(self) -> np.ndarray:
        return self.k * self.alpha

    def steps(self):
        """(index, clean latents, noise) that the prediction at each level implies."""
        return ((i, *_x0_and_noise(self.schedule, self.alpha[i], self.sigma[i])) for i in range(len(self.t)))

    def table(self, matrices: list[list[np.ndarray]]) -> Steps:
        return _table(list(zip(self.t, self.alpha[:-1], self.sigma[:-1], matrices, strict=True)), self.initial)


def _grid(
    schedule: Schedule,
    count: int,
    spacing: Spacing,
    sigmas: Spacing = None,
    solver: bool = False,
    final_sigma_zero: bool = True,
    begin: int = 0,
) -> _Grid:
    """`solver`: the way of diffusers' DPM-Solver and UniPC, otherwise that of its k-diffusion samplers."""
    if sigmas is not None and not isinstance(sigmas, str):
        k, most = np.array(sigmas, np.float64), schedule.span[1]
        if k[0] > most * _ROUNDED:
            given, most = (level * schedule.data_scale for level in (k[0], most))  # as its users know them
            raise UserError(f"sigmas: {given:g} is above {most:g}, the most noise that the model was trained at")
        t = schedule.time(k[:-1], np.round if solver else None)
        return _Grid(schedule, t[begin:], k[begin:], 1.0 if solver else _alpha_sigma(k[0])[1], ends_exploded=not solver)
    t, k = schedule.levels(count, spacing, solver)
    if sigmas is not None:
        least, most = schedule.span if solver else (k[-1], k[0])
        ramp = np.linspace(0, 1, count)
        if sigmas == "karras":
            k = (most ** (1 / 7) + ramp * (least ** (1 / 7) - most ** (1 / 7))) ** 7
        elif sigmas == "beta":  # Lee et al. 2024
            k = least + special.betaincinv(0.6, 0.6, 1 - ramp) * (most - least)
        else:
            k = most ** (1 - ramp) * least**ramp
        # diffusers' solvers round "karras" and "lu" timesteps and cut others: the first, 998.99..., falls to 998
        t = schedule.time(k, None if not solver else np.round if sigmas in ("karras", "lu") else np.floor)
    # diffusers begins "linspace" and "trailing" with sigma times the noise, as if there were no image in it
    initial = 1.0 if solver or spacing == "leading" else _alpha_sigma(k[0])[1]
    final = 0.0 if final_sigma_zero else schedule.span[0]
    return _Grid(schedule, t[begin:], np.append(k, final)[begin:], initial)


def _trained(schedule: DiscreteSchedule, least: float = 0.0) -> Callable[[float], tuple[float, float]]:
    """Timestep -> (alpha, sigma); below 0 is where the schedule ends. Raises UserError for a continuous schedule."""
    if not isinstance(schedule, DiscreteSchedule):
        raise UserError("this sampler needs discrete timesteps, the model has none: try euler, heun, dpmpp-2m or unipc")
    least = max(least, NEARLY_ZERO if schedule.prediction_type == "epsilon" else 0.0)
    squared = np.maximum(schedule.alphas_cumprod, least)
    final = 1.0 if schedule.set_alpha_to_one else squared[0]

    def at(t: float) -> tuple[float, float]:
        value = final if t < 0 else squared[min(int(t), len(squared) - 1)]
        return np.sqrt(value), np.sqrt(1 - value)

    return at


def _alpha_sigma(k):
    alpha = 1 / np.sqrt(1 + np.square(k))
    return alpha, k * alpha


def _ancestral(k: float, k_to: float) -> tuple[float, float]:
    """How far to step down, and how much fresh noise to add, so that k_to is left."""
    up = np.sqrt(k_to**2 * (k**2 - k_to**2) / k**2)
    return np.sqrt(k_to**2 - up**2), up


def _x0_and_noise(schedule: Schedule, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """The clean latents and the noise that a prediction implies."""
    x0 = schedule.to_x0(PREDICTION, LATENTS, alpha, sigma)
    return x0, (LATENTS - alpha * x0) / sigma


def _clipped(schedule: Schedule, x0: np.ndarray, by_values: bool = True) -> np.ndarray:
    """Clean latents as they are where the schedule clips them; `by_values`: not by dynamic thresholds only."""
    if not isinstance(schedule, DiscreteSchedule):
        return x0
    return x0 + CLIP if schedule.thresholding or (by_values and schedule.clip_sample) else x0


def _table(rows: list[tuple], initial: float = 1.0) -> Steps:
    """Rows (t, alpha, sigma, [new latents, new memory...]); memory that is not given becomes 0."""
    t, alpha, sigma, steps = zip(*rows, strict=True)
    width = len(steps[0][0])
    matrix = np.zeros((len(rows), width - 3, width), np.float32)
    for i, step in enumerate(steps):
        matrix[i, : len(step)] = step
    t, alpha, sigma = (np.asarray(column, np.float32) for column in (t, alpha, sigma))
    row, initial, clip = np.arange(len(rows), dtype=np.int32), np.full(len(rows), initial, np.float32), matrix[..., -1]
    return Steps(row, t, alpha, sigma, initial, matrix[..., :-1], clip if clip.any() else None)
