"""Whole sampling trajectories against diffusers' schedulers, around a small nonlinear model and on the same noise."""

import importlib
import itertools
import sys
import types
from functools import partial

import jax
import numpy as np
import pytest
import torch

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.recipes import dpmpp_2m
from bdm_jax.diffusion.samplers import SAMPLERS, check_sampler
from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.diffusion.scheduler_config import to_json
from bdm_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

COUNTS = (1, 2, 5, 20, 50)
MORE_COUNTS = (3, 14, 15, 30)  # fewer than 15 steps end in first order; 3, 14, 15, 30 do not divide 1000
TOLERANCE = 1e-4  # fp32 on both sides, of the largest number in the trajectory
SHAPE = (2, 3, 5, 4)

# name: diffusers' scheduler, its settings, whether it holds latents / alpha ("variance exploding")
SCHEDULERS = {
    "ddim": ("ddim.DDIMScheduler", {}, False),
    "ddpm": ("ddpm.DDPMScheduler", {}, False),
    "pndm": ("pndm.PNDMScheduler", {"skip_prk_steps": True}, False),
    "pndm-prk": ("pndm.PNDMScheduler", {"skip_prk_steps": False}, False),
    "lcm": ("lcm.LCMScheduler", {}, False),
    "euler": ("euler_discrete.EulerDiscreteScheduler", {}, True),
    "euler-a": ("euler_ancestral_discrete.EulerAncestralDiscreteScheduler", {}, True),
    "lms": ("lms_discrete.LMSDiscreteScheduler", {}, True),
    "heun": ("heun_discrete.HeunDiscreteScheduler", {}, True),
    "dpmpp-sde": ("dpmsolver_sde.DPMSolverSDEScheduler", {}, True),
    "dpmpp-2m": ("dpmsolver_multistep.DPMSolverMultistepScheduler", {}, False),
    "dpmpp-2m-sde": (
        "dpmsolver_multistep.DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        False,
    ),
    "unipc": ("unipc_multistep.UniPCMultistepScheduler", {}, False),
}
LEADING = ("ddim", "ddpm", "pndm", "pndm-prk", "lcm")
DEFAULT_SPACING = {name: "leading" if name in LEADING else "linspace" for name in SCHEDULERS}
WITHOUT = {
    ("pndm", "sample"),
    ("pndm-prk", "sample"),
    ("euler-a", "sample"),
    ("dpmpp-sde", "sample"),
}  # diffusers refuses them
TRAJECTORIES = sorted({(n, kind) for n in SCHEDULERS for kind in ("epsilon", "v_prediction", "sample")} - WITHOUT)
ZERO_SNR = ("ddim", "ddpm", "lcm", "euler", "euler-a", "dpmpp-2m", "dpmpp-2m-sde", "unipc")
# There diffusers' pndm leaves out a step (its timesteps lack the doubled one) or most of its Runge-Kutta start, and
# its lms weighs a history that it lacks, of order 4 from the first step on.
NOT_OVER_A_PICTURE = ("pndm", "pndm-prk", "lms")
SIGMAS = [name for name in SAMPLERS if name.endswith(("-karras", "-exponential", "-beta", "-lu"))]


class Theirs:
    """A scheduler of diffusers whose noise is given."""

    def __init__(self, name, schedule, monkeypatch, spacing=None, **settings):
        base = name if name in SCHEDULERS else name.rpartition("-")[0]
        where, fixed, self.exploding = SCHEDULERS[base]
        module, cls = where.split(".")
        if base == "dpmpp-sde":  # it needs torchsde only to draw the Brownian path that the test draws itself
            monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(self.noise))
        if base == "dpmpp-sde":
            monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_, **__: BrownianPath(self))
        spacing = {"timestep_spacing": spacing or DEFAULT_SPACING[base]}
        way = name.rpartition("-")[2]
        sigmas = {f"use_{way}_lambdas" if way == "lu" else f"use_{way}_sigmas": True} if name != base else {}
        config = {**to_json(schedule), **spacing, **fixed, **sigmas, **settings}
        del config["_class_name"]
        self.scheduler, self.more = getattr(module, cls).from_config(config), {}

    def trajectory(self, model, noise, count, noises, begin=0, clean=None):
        """Timesteps, and latents of unit variance after each evaluation; from `begin` on where `clean` is given.

        `count` may be a dict, what `set_timesteps` takes in its place.
        """
        scheduler = self.scheduler
        scheduler.set_timesteps(**count) if isinstance(count, dict) else scheduler.set_timesteps(count)
        cut = scheduler.config.get("use_exponential_sigmas") or scheduler.config.get("use_beta_sigmas")
        if cut and not self.exploding:
            assert 998 <= scheduler.timesteps[0] <= 999  # 999 - 1e-5, cut: the only timestep that is not diffusers'
            scheduler.timesteps[0] = 999
        x, latents, timesteps = torch.from_numpy(noise) * scheduler.init_noise_sigma, [], scheduler.timesteps
        if clean is not None:  # as diffusers' img2img pipelines
            begin *= scheduler.order
            timesteps = timesteps[begin:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            x = scheduler.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), timesteps[:1])
        for i, t in enumerate(timesteps):
            self.noise = noises[i]
            scaled = scheduler.scale_model_input(x, t)
            prediction = torch.from_numpy(model(scaled.numpy().astype(np.float32), float(t)))
            x = scheduler.step(prediction, t, x, **self.more).prev_sample.float()
            latents.append(x.numpy() * (self._alpha(scheduler.step_index) if self.exploding else 1.0))
        return timesteps.numpy(), np.stack(latents)

    def _alpha(self, index):
        sigma = float(self.scheduler.sigmas[index])
        middle = getattr(self.scheduler, "mid_point_sigma", None)
        return (float(middle if middle is not None else sigma) ** 2 + 1) ** -0.5


class BrownianPath:
    """W(to) - W(from), in units of its deviation, where each new place adds the noise of the row."""

    def __init__(self, theirs):
        self.theirs, self.path = theirs, {}

    def __call__(self, begin, end):
        begin, end = float(begin), float(end)
        key, last = round(end, 5), min(self.path, default=None)
        if last is None:
            last = round(begin, 5)
            self.path[last] = np.zeros_like(self.theirs.noise)
        self.path[key] = self.path[last] + np.sqrt(last - end) * self.theirs.noise
        return torch.from_numpy((self.path[key] - self.path[round(begin, 5)]) / np.float32(np.sqrt(begin - end)))


def our_trajectory(sampler, schedule, model, noise, count, noises, begin=0, clean=None):
    steps = sampler(schedule, count, begin=begin)
    state, latents = samplers.start(noise, steps, clean), []
    for i in range(len(steps.t)):
        row = jax.tree.map(lambda column, i=i: column[i], steps)
        state = _advance(schedule, state, model(np.asarray(state.latents), float(row.t)), row, noises[i])
        latents.append(np.asarray(state.latents))
    return steps.t, np.stack(latents)


@partial(jax.jit, static_argnums=0)
def _advance(schedule, state, prediction, row, noise):
    x0 = schedule.to_x0(prediction, state.latents, row.alpha, row.sigma)
    return samplers.advance(state, prediction, row, noise, lambda: schedule.clipped(x0) - x0)


def model(x, t):
    """Bounded, nonlinear in the latents, mixing channels, different at every timestep."""
    gain = np.float32(np.cos(t / 300))
    return (np.tanh(x + np.float32(0.3) * np.roll(x, 1, axis=-1)) * gain + np.float32(0.4) * np.sin(2 * x)).astype(
        np.float32
    )


def worst(sampler, theirs, schedule, counts, rng, begins=(0,)):
    """Largest difference over the counts, of the largest latent; a `begin` above 0 draws over a picture."""
    found = []
    for count, begin in itertools.product(counts, begins):
        noise = rng.standard_normal(SHAPE, dtype=np.float32)
        noises = rng.standard_normal((2 * count + 10, *SHAPE), dtype=np.float32)
        clean = rng.standard_normal(SHAPE, dtype=np.float32) if begin else None
        expected_t, expected = theirs.trajectory(model, noise, count, noises, begin, clean)
        t, actual = our_trajectory(sampler, schedule, model, noise, count, noises, begin, clean)
        np.testing.assert_allclose(t, expected_t, atol=2e-3)  # k-diffusion's are interpolated in fp32
        assert np.isfinite(actual).all() and actual.shape == expected.shape
        found.append(np.abs(actual - expected).max() / np.abs(expected).max())
    print(", ".join(f"{value:.1e}" for value in found))
    return max(found)


@pytest.mark.parametrize(("name", "prediction_type"), TRAJECTORIES)
def test_trajectory_equals_diffusers(name, prediction_type, rng, monkeypatch):
    schedule = DiscreteSchedule(prediction_type=prediction_type)
    theirs = Theirs(name, schedule, monkeypatch)
    counts = [count for count in COUNTS + MORE_COUNTS if count >= 4 or name != "pndm-prk"]
    # lcm goes on from nothing but the image of the step before, whose rounding 1 / alpha enlarges, up to 15 times
    tolerance = 5 * TOLERANCE if name == "lcm" else TOLERANCE
    assert worst(SAMPLERS[name], theirs, schedule, counts, rng) <= tolerance


@pytest.mark.parametrize("name", SIGMAS)
def test_noise_levels_equal_diffusers(name, rng, monkeypatch):
    schedule = DiscreteSchedule()
    # diffusers keeps its levels in fp32: of the first two of 50 with beta, 14.61 and 14.57, the difference has an error
    # of 2e-5 (karras: 1e-6), and the scale of the fresh noise is made of such differences and their halves
    tolerance = 5 * TOLERANCE if name == "dpmpp-sde-beta" else TOLERANCE
    assert worst(SAMPLERS[name], Theirs(name, schedule, monkeypatch), schedule, COUNTS, rng) <= tolerance


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lcm"])
def test_timestep_spacings_equal_diffusers(name, spacing, rng, monkeypatch):
    schedule = DiscreteSchedule()
    theirs = Theirs(name, schedule, monkeypatch, spacing)
    counts = (4, 7, 20) if name == "pndm-prk" else (1, 2, 7, 20)
    assert worst(SAMPLERS[f"{name}-{spacing}"], theirs, schedule, counts, rng) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in NOT_OVER_A_PICTURE])
def test_drawing_over_a_picture_equals_diffusers(name, rng, monkeypatch):
    schedule = DiscreteSchedule()
    theirs = Theirs(name, schedule, monkeypatch)
    assert worst(SAMPLERS[name], theirs, schedule, (7, 20), rng, begins=(1, 3, 6)) <= TOLERANCE


@pytest.mark.parametrize("name", (*NOT_OVER_A_PICTURE, "lcm"))
def test_drawing_over_a_picture_keeps_to_its_path_where_that_is_foreseen(name, rng):
    """A model that always foresees the picture sees it with ever less of the same noise; lcm draws the noise anew."""
    clean, noise = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    schedule = DiscreteSchedule(prediction_type="sample")
    nothing = np.zeros((20, *SHAPE), np.float32)
    _, latents = our_trajectory(SAMPLERS[name], schedule, lambda x, t: clean, noise, 9, nothing, 4, clean)
    squared = (
        schedule.alphas_cumprod[0] if name.startswith("pndm") else 1.0
    )  # it ends at the schedule's own last timestep
    expected = np.sqrt(squared) * clean + np.sqrt(1 - squared) * noise
    np.testing.assert_allclose(latents[-1], expected, atol=1e-3)


@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr_equals_diffusers(name, rng, monkeypatch):
    """1e-3 where diffusers holds latents / alpha: 4096 times the latents, of which fp32 keeps 5e-4."""
    schedule = DiscreteSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    spacing = None if name == "lcm" else "trailing"
    theirs = Theirs(name, schedule, monkeypatch, spacing)
    sampler = SAMPLERS[name if spacing is None else f"{name}-{spacing}"]
    assert worst(sampler, theirs, schedule, (1, 2, 5, 20), rng) <= (1e-3 if theirs.exploding else TOLERANCE)


def test_dpmpp_2m_as_in_diffusers_0_24(rng, monkeypatch):
    schedule = DiscreteSchedule()
    theirs = Theirs("dpmpp-2m", schedule, monkeypatch, final_sigmas_type="sigma_min")
    ours = partial(dpmpp_2m, final_sigma_zero=False)
    assert worst(ours, theirs, schedule, COUNTS + MORE_COUNTS, rng) <= TOLERANCE


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-2m-sde", "unipc"])
@pytest.mark.parametrize(
    ("ending", "settings"),
    [
        ("-sigma-min", {"final_sigmas_type": "sigma_min"}),
        ("-sigma-min-full-order", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ],
)
def test_other_ends_equal_diffusers(name, ending, settings, rng, monkeypatch):
    schedule = DiscreteSchedule()
    theirs = Theirs(name, schedule, monkeypatch, **settings)
    assert worst(SAMPLERS[name + ending], theirs, schedule, (1, 2, 3, 7, 14, 20), rng) <= TOLERANCE
    karras = Theirs(f"{name}-karras", schedule, monkeypatch, **settings)
    assert worst(SAMPLERS[f"{name}-karras{ending}"], karras, schedule, (2, 7, 20), rng) <= TOLERANCE


def test_at_no_noise_the_last_step_is_of_first_order_anyway():
    """There diffusers' unipc divides by zero, its dpmpp-2m is as ours."""
    for name in ("dpmpp-2m", "unipc"):
        low, full = (SAMPLERS[name + ending](DiscreteSchedule(), 7) for ending in ("", "-full-order"))
        np.testing.assert_array_equal(low.matrix[-1], full.matrix[-1])


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_with_fresh_noise_equals_diffusers(eta, spacing, rng, monkeypatch):
    schedule = DiscreteSchedule(prediction_type="v_prediction")
    theirs = Theirs("ddim", schedule, monkeypatch, spacing)
    theirs.more = {"eta": eta}
    ours = partial(SAMPLERS["ddim"], spacing=spacing, eta=eta)
    assert worst(ours, theirs, schedule, (2, 7, 20), rng) <= TOLERANCE


TIMES = (987, 701, 700, 333, 50, 3)


@pytest.mark.parametrize("name", ["ddpm", "lcm", "euler", "heun", "dpmpp-2m", "dpmpp-2m-sde"])
def test_own_timesteps_equal_diffusers(name, rng, monkeypatch):
    """Of the schedulers that take them."""
    schedule = DiscreteSchedule()
    theirs = Theirs(name, schedule, monkeypatch)
    noise, *noises = rng.standard_normal((13, *SHAPE), dtype=np.float32)
    _, expected = theirs.trajectory(model, noise, {"timesteps": list(TIMES)}, noises)
    _, actual = our_trajectory(partial(SAMPLERS[name], spacing=TIMES), schedule, model, noise, len(TIMES), noises)
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", ["ddim", "euler-a", "lms", "dpmpp-sde", "unipc"])
def test_own_timesteps_are_those_of_a_spacing(name):
    """Of samplers whose diffusers scheduler takes none: its usual ones, given by hand, are the same table."""
    schedule = DiscreteSchedule()
    spaced = SAMPLERS[f"{name}-leading"](schedule, 8)
    own = SAMPLERS[name](schedule, 8, spacing=tuple(spaced.t[np.append(True, np.diff(spaced.t) < 0)]))
    if name == "dpmpp-sde":  # it has evaluations between them
        own = SAMPLERS[name](schedule, 8, spacing=tuple(schedule.timesteps(8, "leading")))
    np.testing.assert_allclose(own.matrix, spaced.matrix, atol=1e-6)


@pytest.mark.parametrize("last", [0.0, 0.03])
def test_own_noise_levels_equal_diffusers(last, rng, monkeypatch):
    schedule, levels = DiscreteSchedule(), (14.0, 6.0, 2.5, 1.1, 0.4, 0.05, last)
    theirs = Theirs("euler", schedule, monkeypatch)
    noise, *noises = rng.standard_normal((8, *SHAPE), dtype=np.float32)
    t, expected = theirs.trajectory(model, noise, {"sigmas": list(levels)}, noises)
    our_t, actual = our_trajectory(partial(SAMPLERS["euler"], sigmas=levels), schedule, model, noise, 6, noises)
    np.testing.assert_allclose(our_t, t, atol=2e-3)
    expected[-1] *= np.sqrt(1 + last**2)  # diffusers' own result
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()
    for name in ("euler-a", "heun", "lms", "dpmpp-sde", "dpmpp-2m", "dpmpp-2m-sde", "unipc"):
        steps = SAMPLERS[name](schedule, 6, sigmas=levels)
        assert (steps.sigma / steps.alpha)[0] == pytest.approx(14.0) and np.isfinite(steps.matrix).all()


CLIPPED = [
    *((name, {"clip_sample": True, "clip_sample_range": 0.8}) for name in ("ddim", "ddpm", "lcm")),
    *(
        (name, {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5})
        for name in ("ddim", "ddpm", "lcm", "dpmpp-2m", "dpmpp-2m-sde", "unipc")
    ),
]


@pytest.mark.parametrize(("name", "settings"), CLIPPED)
def test_clipping_of_pixels_equals_diffusers(name, settings, rng, monkeypatch):
    schedule = DiscreteSchedule(**settings)
    theirs = Theirs(name, schedule, monkeypatch)
    assert theirs.scheduler.config.get("thresholding") == schedule.thresholding
    assert worst(SAMPLERS[name], theirs, schedule, (2, 7, 20), rng) <= TOLERANCE
    plain = SAMPLERS[name](DiscreteSchedule(), 7)
    assert plain.clip is None and SAMPLERS[name](schedule, 7).clip is not None


@pytest.mark.parametrize("name", ["ddim", "pndm"])
@pytest.mark.parametrize("settings", [{"set_alpha_to_one": True}, {"steps_offset": 0}])
def test_the_schedules_end_is_followed(name, settings, rng, monkeypatch):
    schedule = DiscreteSchedule(**settings)
    assert worst(SAMPLERS[name], Theirs(name, schedule, monkeypatch), schedule, (7, 20), rng) <= TOLERANCE


def test_reference_timesteps_and_final_sigma():
    """bdm.md section 4: 999, 979, ... 40, 20, ending at sigma(t=0) = 0.02917, second order on the last step."""
    schedule = DiscreteSchedule()
    steps = dpmpp_2m(schedule, 50, final_sigma_zero=False)
    assert list(steps.t[:3]) == [999, 979, 959] and list(steps.t[-2:]) == [40, 20]
    sigma = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    assert sigma[999] == pytest.approx(14.6147, abs=1e-4)
    assert sigma[0] == pytest.approx(0.02917, abs=5e-6)
    previous_x0 = steps.matrix[:, 0, 1]
    assert previous_x0[0] == 0 and previous_x0[-1] != 0


@pytest.mark.parametrize("name", ["pndm", "dpmpp-sde", "unipc"])
def test_a_compiled_loop_takes_the_same_steps(name, rng):
    """The sampler is used inside one compiled program: rows of the table are what lax.scan walks over."""
    schedule = DiscreteSchedule()
    noise = rng.standard_normal((2, 4, 4, 4), dtype=np.float32)
    steps = SAMPLERS[name](schedule, 6)
    seeds = np.array([3, 4], np.uint32)

    @jax.jit
    def advance(state, row):
        fresh = samplers.row_noise(seeds, row.row, noise.shape[1:])
        return samplers.advance(state, 0.5 * state.latents, row, fresh), None

    scanned, _ = jax.jit(lambda x: jax.lax.scan(advance, samplers.start(x, steps), steps))(noise)
    state = samplers.start(noise, steps)
    for index in range(len(steps.t)):
        state, _ = advance(state, jax.tree.map(lambda column, index=index: column[index], steps))
    np.testing.assert_allclose(scanned.latents, state.latents, rtol=1e-4, atol=1e-5)


def test_tables_of_all_samplers_have_one_shape():
    """One compiled loop for all: columns differ in their length only."""
    kinds = {
        tuple((column.dtype, column.shape[1:]) for column in jax.tree.leaves(SAMPLERS[name](DiscreteSchedule(), 4)))
        for name in SAMPLERS
        if name != "pndm-prk"  # which remembers more
    }
    assert len(kinds) == 1


def test_noise_is_a_function_of_seed_and_row():
    shape = (16, 16, 4)
    draw = jax.jit(lambda seeds, row: samplers.row_noise(seeds, row, shape))
    both = np.asarray(draw(np.array([5, 6], np.uint32), 2))
    np.testing.assert_array_equal(draw(np.array([6, 5], np.uint32), 2), both[::-1])
    np.testing.assert_array_equal(draw(np.array([6], np.uint32), 2), both[1:])
    beginning = jax.jit(lambda: jax.random.normal(jax.random.key(5), shape))()
    others = [*both, *draw(np.array([5, 6], np.uint32), 3), beginning]
    assert len({np.asarray(noise).tobytes() for noise in others}) == 5
    assert abs(both.mean()) < 0.1 and abs(both.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("DPM++ 2M", "dpmpp-2m"),
        ("dpm++ 2m karras", "dpmpp-2m-karras"),
        ("DPM++ 2M SDE Karras", "dpmpp-2m-sde-karras"),
        ("DPM++ SDE Exponential", "dpmpp-sde-exponential"),
        ("dpmpp_2m_sde_gpu", "dpmpp-2m-sde"),
        ("k_euler", "euler"),
        ("Euler a", "euler-a"),
        ("euler_a", "euler-a"),
        ("k_euler_ancestral", "euler-a"),
        ("k_dpmpp_2m", "dpmpp-2m"),
        ("dpmsolver++", "dpmpp-2m"),
        ("PLMS", "pndm"),
        ("uni_pc", "unipc"),
        ("k_lms", "lms"),
        ("LMS Karras", "lms-karras"),
        (" DDIM ", "ddim"),
        ("DPM++ 2M Beta", "dpmpp-2m-beta"),
    ],
)
def test_names_of_other_programs(name, plain):
    assert name in SAMPLERS and SAMPLERS[name] is SAMPLERS[plain]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "dpmpp-3m",
            "euler-a-karras",
            "ddim-karras",
            "lcm-trailing",
            "ddim-sideways",
            "",
            "euler-sigma-min",
            "euler-lu",
        ),
        *("ddim-trailing-leading", "heun-full-order", "pndm-karras"),
    ],
)
def test_names_that_are_none(name):
    assert name not in SAMPLERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPM++ 2M full-order", "-full-order has no effect, without -sigma-min"),
        ("euler-lu", "euler has no ending -lu"),
        ("k_euler-a-karras", "euler-a has no ending -karras"),
        ("ddim-trailing-leading", "ddim has no ending -trailing-leading"),
        ("dppm-2m", "unknown sampler 'dppm-2m': did you mean 'dpmpp-2m'"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        check_sampler(name)


def test_lcm_takes_no_more_steps_than_it_was_distilled_at():
    with pytest.raises(UserError, match="lcm takes at most 50 steps"):
        SAMPLERS["lcm"](DiscreteSchedule(), 51)
