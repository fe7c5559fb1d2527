"""scheduler_config.json, the file in which diffusers keeps a noise schedule."""

import warnings
from dataclasses import asdict, fields
from typing import Any

from bdm_jax.diffusion.edm import EDMSchedule
from bdm_jax.diffusion.schedule import DiscreteSchedule, Schedule

_EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# What changes the noise or what the network is told, and the one value of it that there is here.
_IMPLEMENTED = {
    "trained_betas": None,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "interpolation_type": "linear",
    "snr_shift_scale": 1.0,
}
# What changes the sampler alone, and its usual values, those of the samplers that are named without an ending.
_USUAL = {
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "algorithm_type": ("dpmsolver++",),
    "predict_x0": (True,),
    "skip_prk_steps": (True,),
    "disable_corrector": ([],),
    "solver_p": (),
    "variance_type": ("fixed_small",),
    "timestep_scaling": (10.0,),
    "original_inference_steps": (50,),
}


def to_json(schedule: Schedule) -> dict[str, Any]:
    """scheduler_config.json, readable by diffusers' DDIMScheduler, DPMSolverMultistepScheduler and others like them or,
    for an `EDMSchedule`, by its EDMEulerScheduler (which divides ln sigma by four, whatever `time_scale`).
    """
    values = asdict(schedule)
    if isinstance(schedule, EDMSchedule):
        called = "epsilon" if schedule.prediction_type == "edm" else schedule.prediction_type  # diffusers' word for F
        return {"_class_name": _EDM_CLASSES[0], **values, "prediction_type": called, "sigma_schedule": "karras"}
    return {"_class_name": "DDIMScheduler", **values}


def from_json(values: dict[str, Any]) -> Schedule:
    """The noise schedule in a scheduler_config.json of any sampler. What concerns only the sampler is not taken over,
    with a note where it is not as usual.

    Raises:
        ValueError: betas, noise levels or a prediction type that are not implemented (named).
    """
    if str(values.get("_class_name", "")).startswith("FlowMatch"):
        raise ValueError(f"scheduler_config.json: {values['_class_name']} (flow matching) is not implemented")
    for name, known in _IMPLEMENTED.items():
        if values.get(name, known) not in (None, known):
            raise ValueError(f"scheduler_config.json: {name}={values[name]!r} is not implemented")
    asked = [f"{name}={values[name]!r}" for name, usual in _USUAL.items() if values.get(name) not in (None, *usual)]
    if asked:
        message = f"{', '.join(asked)} of its {values.get('_class_name', 'scheduler')} is not taken over"
        warnings.warn(f"scheduler_config.json: {message}; choose the sampler by name, see --sampler", stacklevel=2)
    if values.get("_class_name") in _EDM_CLASSES:
        return _edm(values)
    return DiscreteSchedule(**_known(DiscreteSchedule, values))


def _edm(values: dict[str, Any]) -> EDMSchedule:
    if (curve := values.get("sigma_schedule", "karras")) != "karras":
        raise ValueError(f"scheduler_config.json: sigma_schedule={curve!r} is not implemented")
    predicted = values.get("prediction_type", "epsilon")
    predicted = "edm" if predicted == "epsilon" else predicted
    return EDMSchedule(**{"time_scale": 0.25, **_known(EDMSchedule, values), "prediction_type": predicted})


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
