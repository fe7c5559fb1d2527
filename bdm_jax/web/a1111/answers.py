"""What the web UI's API answers about a job."""

import json
import time
from typing import Any

from bdm_jax.app.metadata import WEB_UI_SAMPLERS, read_settings, web_ui_parameters
from bdm_jax.app.service import Ticket
from bdm_jax.web import uploads
from bdm_jax.web.a1111.fields import Txt2Img
from bdm_jax.web.asking import Desk


def answer(ticket: Ticket, asked: Txt2Img, notes: list[str]) -> dict[str, Any]:
    """Pictures, the request without them, and `info` as the web UI has it."""
    drawn = [read_settings(path) for path in ticket.pictures]
    requests, settings = ticket.job.requests, ticket.job.settings
    texts = [web_ui_parameters(values) for values in drawn]
    seeds = [values["seed"] for values in drawn] or [request.seed for request in requests]
    first = drawn[0] if drawn else {}
    info = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * len(seeds),
        "english": requests[0].english,
        "english_negative": requests[0].english_negative,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.get("width"),
        "height": first.get("height"),
        "sampler_name": WEB_UI_SAMPLERS.get(first.get("sampler", ""), first.get("sampler")),
        "cfg_scale": first.get("guidance", settings.guidance),
        "steps": first.get("steps", settings.steps),
        "batch_size": asked.batch_size,
        "denoising_strength": asked.denoising_strength,
        "sd_model_name": first.get("model"),
        "clip_skip": settings.clip_skip,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "state": ticket.state,
        "files": [path.name for path in ticket.pictures],
        "warnings": notes,
    }
    images = [uploads.to_base64(path.read_bytes()) for path in ticket.pictures] if asked.send_images else []
    left_out = {*(asked.model_extra or {}), "init_images", "mask", "alwayson_scripts", "override_settings"}
    parameters = asked.model_dump(mode="json", exclude=left_out)
    return {"images": images, "parameters": parameters, "info": json.dumps(info, ensure_ascii=False)}


def progress(desk: Desk, owner: str, without_image: bool) -> dict[str, Any]:
    """Of an owner's job that is being drawn."""
    ticket, waiting = desk.service.current(owner), desk.service.waiting(owner)
    done, total = (ticket.done, max(ticket.total, 1)) if ticket else (0, 1)
    images = len(ticket.job.requests) if ticket else 0
    each = max(total // max(images, 1), 1)
    elapsed = time.monotonic() - ticket.times.get("started", time.monotonic()) if ticket else 0.0
    shown = None
    if ticket is not None and not without_image and (preview := ticket.preview) is not None:
        shown = uploads.to_base64(uploads.png_bytes(preview))
    return {
        "progress": min(done / total, 1.0),
        "eta_relative": elapsed / done * (total - done) if done else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": ticket.id if ticket else "",
            "job_count": waiting + (ticket is not None),
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": done % each if done < total else each,
            "sampling_steps": each if ticket else 0,
        },
        "current_image": shown,
        "textinfo": ticket.state if ticket else None,
    }
