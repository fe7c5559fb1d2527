"""scheduler_config.json, the file in which diffusers keeps a noise schedule."""

from dataclasses import asdict, fields
from typing import Any

from bdm_jax.diffusion.edm import EDMSchedule
from bdm_jax.diffusion.schedule import DiscreteSchedule, Schedule

_EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


def to_json(schedule: Schedule) -> dict[str, Any]:
    """scheduler_config.json, readable by diffusers' DDIMScheduler, DPMSolverMultistepScheduler and others like them or,
    for an `EDMSchedule`, by its EDMEulerScheduler (which divides ln sigma by four, whatever `time_scale`).
    """
    values = asdict(schedule)
    if isinstance(schedule, EDMSchedule):
        called = "epsilon" if schedule.prediction_type == "edm" else schedule.prediction_type  # diffusers' word for F
        return {"_class_name": _EDM_CLASSES[0], **values, "prediction_type": called, "sigma_schedule": "karras"}
    return {"_class_name": "DDIMScheduler", **values, "clip_sample": False}


def from_json(values: dict[str, Any]) -> Schedule:
    """The noise schedule in a scheduler_config.json of any sampler; what concerns only the sampler is not read.

    Raises:
        ValueError: betas, noise levels or a prediction type that are not implemented (named).
    """
    if values.get("_class_name") in _EDM_CLASSES:
        return _edm(values)
    if str(values.get("_class_name", "")).startswith("FlowMatch"):
        raise ValueError(f"scheduler_config.json: {values['_class_name']} (flow matching) is not implemented")
    if values.get("trained_betas") is not None:
        raise ValueError("scheduler_config.json: trained_betas is not implemented")
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
