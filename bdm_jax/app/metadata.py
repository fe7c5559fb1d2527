"""What an image's file records about how it was drawn: as JSON, to reproduce it, and as web UIs read it. No JAX."""

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdm_jax.errors import UserError
from bdm_jax.images.decode import MAX_BYTES, MAX_PIXELS
from bdm_jax.sampling.settings import KIND_OF, Request, Sampling
from bdm_jax.systems.families import flags

KEY = "bdm_jax"
PARTS = (
    *("model", "backbone", *flags(), "variant"),
    *("blend", "lora", "branch_lora", "embedding", "branch_embedding", "control", "adapter", "image_prompt"),
    "text_weights",
)
_MAX_JSON = 1 << 20
_OLD_SAMPLER = "dpmpp-2m"  # of images that do not say it: the only default that there was
_TEXTS = ("prompt", "negative", "english", "english_negative")
_PIXELS = ("image", "mask")
WEB_UI_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "lcm": "LCM",
    "euler-a": "Euler a",
    "lms": "LMS",
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "dpmpp-sde": "DPM++ SDE",
    "unipc": "UniPC",
}


def describe(
    request: Request, settings: Sampling, parts: Mapping[str, str], digests: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Everything that an image depends on, as plain JSON values; `restore` is the inverse.

    Args:
      settings: with the size (that of the first pass) and the guidance that were used, if they are to be kept.
      parts: the names of the model and of what was put in place of its own.
      digests: of the pixels of `image` and `mask`, where the request has them; the files are named, not kept.
    """
    values = {name: getattr(request, name) for name in (*_TEXTS, "seed")}
    for name in _PIXELS:
        if digests and name in digests:
            source = getattr(request, name)
            values[name] = "" if isinstance(source, np.ndarray) else Path(source).name
            values[f"{name}_sha256"] = digests[name]
    values |= {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    height, width = values.pop("size") or (None, None)
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {**values, "width": width, "height": height, **parts}


def restore(values: Mapping[str, Any]) -> tuple[Request, Sampling]:
    """The request (without its image and mask, which a file only names) and the settings that `describe` described.

    What is missing is as by default: older images say less. Raises ValueError for values of a wrong kind.
    """
    request = {name: _checked(name, values[name], str) for name in _TEXTS if name in values}
    if "seed" in values:
        request["seed"] = _checked("seed", values["seed"], int)
    settings = {}
    for field in dataclasses.fields(Sampling):
        if field.name in values:
            settings[field.name] = _setting(field.name, values[field.name])
    if values.get("width") is not None and values.get("height") is not None:
        settings["size"] = tuple(_checked(name, values[name], int) for name in ("height", "width"))
    return Request(**{"prompt": "", **request}), Sampling(**settings)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside a PNG that we wrote: what `describe` gave, its values of the right kinds.

    Files are not trusted: no pixel is decoded, and what is read is bounded. Raises UserError for a file that is no
    such image.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB, no image of ours")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                text = image.info.get(KEY)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {_why(error)}") from error
    except Exception as error:  # what a damaged file makes PIL raise is no fixed list
        raise UserError(f"{path}: not a PNG that can be read ({error})") from error
    return _parse(path, text)


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a image with those that it does not say, being older, as by default (but for its size)."""
    known = describe(Request(""), Sampling(sampler=_OLD_SAMPLER), {})
    return {field.name: known[field.name] for field in dataclasses.fields(Sampling) if field.name != "size"} | {
        **values
    }


def complete_settings(path: Path) -> dict[str, Any] | None:
    """The settings of a image that opens down to its last row; None of one that does not.

    Raises UserError for a whole image that is not ours.
    """
    try:
        data = path.read_bytes()
        if not data.endswith(b"IEND\xaeB`\x82"):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                image.load()
    except Exception:  # whatever PIL finds wrong with it
        return None
    return read_settings(path)


def digest(pixels: np.ndarray) -> str:
    """SHA-256 of an image's or mask's shape and pixels: the same image in another format is the same."""
    shape = "x".join(map(str, pixels.shape))
    return hashlib.sha256(shape.encode() + b"\n" + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def text_chunks(values: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks of a PNG that carries these settings (see `images.pictures.write_png`).

    `bdm_jax` as JSON and, where they are those of one image (see `describe`), `parameters` as web UIs read them.
    """
    web_ui = {"parameters": web_ui_parameters(values)} if "prompt" in values else {}
    return {**web_ui, KEY: json.dumps(values, ensure_ascii=False)}


def web_ui_parameters(values: Mapping[str, Any]) -> str:
    """The settings of a image as web UIs write them: prompt, negative prompt, one line of named values.

    Settings that are as by default, and those without effect, are left out.
    """
    _, settings = restore(values)
    hires = settings.hires > 1
    names = {
        "Steps": settings.steps,
        "Sampler": _web_ui_sampler(settings.sampler or _OLD_SAMPLER),
        "CFG scale": settings.guidance,
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model": values.get("model"),
        "VAE": values.get("vae"),
        "Clip skip": _unless(settings, "clip_skip"),
        "Denoising strength": settings.strength if "image" in values else settings.hires_strength if hires else None,
        "Hires upscale": settings.hires if hires else None,
        "Hires upscaler": "Lanczos" if hires else None,
        "Hires strength": settings.hires_strength if hires and "image" in values else None,
        "English prompt": values["english"],
        "English negative prompt": values["english_negative"],
    }
    ours = {f.name for f in dataclasses.fields(Sampling)} - {*_NAMED_BY_WEB_UIS}
    names |= {name.replace("_", " ").capitalize(): _unless(settings, name) for name in sorted(ours)}
    names |= {name.replace("_", " ").capitalize(): values.get(name) for name in PARTS[1:] if name != "vae"}
    lines = [values["prompt"], f"Negative prompt: {values['negative']}" if values["negative"] else ""]
    shown = [f"{name}: {_quoted(_plain(value))}" for name, value in names.items() if value not in ("", None)]
    return "\n".join(filter(None, [*lines, ", ".join(shown)]))


_NAMED_BY_WEB_UIS = ("steps", "sampler", "guidance", "size", "clip_skip", "strength", "hires", "hires_strength")


def _unless(settings: Sampling, name: str) -> Any:
    """None where the setting is as by default."""
    value = getattr(settings, name)
    return None if value == getattr(Sampling, name) else value


def _web_ui_sampler(name: str) -> str:
    """`dpmpp-2m-karras` -> `DPM++ 2M Karras`; a name that web UIs do not know stays as it is."""
    from bdm_jax.diffusion.samplers import canonical  # here, so that settings can be read before JAX is loaded

    ours = canonical(name)
    for end, suffix in {"": "", "-karras": " Karras", "-exponential": " Exponential", "-beta": " Beta"}.items():
        if ours.endswith(end) and ours.removesuffix(end) in WEB_UI_SAMPLERS:
            return WEB_UI_SAMPLERS[ours.removesuffix(end)] + suffix
    return name


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,\n:\"]", text) else text


def _parse(path: Path, text: Any) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > _MAX_JSON:
        raise UserError(f"{path}: has no settings of ours inside")
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or "prompt" not in values:
            raise ValueError("they are not those of one image")
        restore(values)
        for name in (*PARTS, *_PIXELS, *(f"{pixels}_sha256" for pixels in _PIXELS)):
            if values.get(name) is not None:
                _checked(name, values[name], str)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the settings inside cannot be read ({error})") from error
    return values


def _setting(name: str, value: Any) -> Any:
    """A value of the kind that the setting of this name has. Raises ValueError."""
    default = getattr(Sampling, name)
    if isinstance(default, tuple):
        if not isinstance(value, list) or len(value) > 1000:
            raise ValueError(f"{name} is no list")
        return tuple(_checked(name, item, KIND_OF.get(name, float)) for item in value)
    if default is None and value is None:
        return None
    return _checked(name, value, KIND_OF.get(name, float) if default is None else type(default))


def _checked(name: str, value: Any, kind: type) -> Any:
    numbers = {int: int, float: (int, float)}
    good = isinstance(value, numbers.get(kind, kind)) and (kind is bool or not isinstance(value, bool))
    if not good or (kind in numbers and not math.isfinite(value)):
        raise ValueError(f"{name} is not of the kind {kind.__name__}")
    return kind(value)


def _why(error: OSError) -> str:
    return "not a PNG that can be read" if error.strerror is None else f"cannot be read ({error.strerror})"
