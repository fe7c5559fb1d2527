"""What requests of the web UI's API may hold, and which of it has no effect here."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from bdm_jax.errors import short
from bdm_jax.web.asking import Fields

# Fields without a counterpart, and the values with which they ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "subseed": (-1,),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "do_not_save_samples": (False,),
    "do_not_save_grid": (True, False),
    "save_images": (True, False),  # they always are
    "override_settings_restore_afterwards": (True,),
    "script_name": ("",),
    "script_args": ([],),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "hr_upscaler": ("Lanczos", "Latent"),
    "hr_second_pass_steps": (0,),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("",),
    "hr_sampler_name": ("",),
    "hr_scheduler": ("",),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1,),
    "inpainting_fill": (1,),
    "inpaint_full_res": (False, 0),
    "inpaint_full_res_padding": (0, 32),
    "include_init_images": (False,),
}


class Txt2Img(Fields):
    """Of /txt2img, and of /img2img."""

    prompt: str = ""
    negative_prompt: str = ""
    english: str = ""
    english_negative: str = ""
    seed: int = -1
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    cfg_scale: float | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str = "automatic"
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    denoising_strength: float | None = None
    eta: float | None = None
    enable_hr: bool = False
    hr_scale: float = 2.0
    override_settings: dict[str, Any] = {}
    alwayson_scripts: dict[str, Any] = {}
    send_images: bool = True


class Img2Img(Txt2Img):
    """Of /img2img."""

    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    mask_blur: float = Field(4.0, ge=0, le=256)
    inpainting_mask_invert: int = 0
    resize_mode: int = 0


class ControlUnit(Fields):
    """One unit of the ControlNet extension."""

    enabled: bool = True
    image: str | dict[str, str] = ""
    input_image: str = ""  # its earlier name
    model: str = "None"
    module: str = "none"
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0


class PngInfo(Fields):
    """Of /png-info."""

    image: str


class Options(Fields):
    """Of /options: those that can be set."""

    sd_model_checkpoint: str | None = None


def without_effect(asked: Txt2Img) -> Iterator[str]:
    """What a request asks for in vain."""
    for name, value in (asked.model_extra or {}).items():
        if name not in _NOTHING:
            yield f"{short(name)!r} is unknown and ignored"
        elif name.startswith("inpaint") and getattr(asked, "mask", None) is None:
            continue
        elif value not in _NOTHING[name]:
            yield f"{name} {short(json.dumps(value), 40)} is ignored"
    if isinstance(asked, Img2Img) and asked.resize_mode not in (0, 1):
        yield f"resize_mode {asked.resize_mode} is ignored: pictures are cropped and resized"
