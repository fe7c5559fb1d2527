"""How much one request may ask for, and how long it may take to ask. Knows no web library."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdm_jax.errors import UserError
from bdm_jax.sampling.settings import check, own_steps

if TYPE_CHECKING:
    from bdm_jax.app.service import Job


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_side: int = 2048
    """Pixels of a picture's longer side, after hires."""
    max_images: int = 16
    """Pictures of one request."""
    max_steps: int = 150
    """Sampling steps."""
    max_prompt: int = 10_000
    """Characters of a prompt."""
    max_body: int = 32
    """MiB of a request."""
    max_upload: int = 16
    """Millions of pixels of an uploaded picture."""
    max_waiting: int = 64
    """Requests that may wait to be drawn; more are sent away with status 429."""
    max_seconds: float = 600.0
    """Seconds after which a request that is not drawn is given up."""
    patience: float = 4.0
    """Seconds to wait for a client that sends nothing in the middle of a request."""

    def check(self) -> None:
        """Raises UserError for limits that let nothing through."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not value > 0 or not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: expected more than 0")

    def check_count(self, images: int) -> None:
        """Raises UserError for more pictures than one request may ask for."""
        if images > self.max_images:
            raise UserError(f"{images} pictures are more than the {self.max_images} of one request")

    def check_job(self, job: "Job") -> None:
        """Raises UserError for a job that asks for more."""
        self.check_count(len(job.requests))
        settings = job.settings
        check(settings)  # of what kind everything is, before it is compared
        steps = own_steps(settings) or settings.steps
        if steps > self.max_steps:
            raise UserError(f"steps {steps} are more than the {self.max_steps} that are allowed")
        sides = list(settings.size or ())
        for request in job.requests:
            sides += [] if settings.size or request.image is None else request.image.shape[:2]
            for name in ("prompt", "negative", "english", "english_negative"):
                if len(getattr(request, name)) > self.max_prompt:
                    raise UserError(
                        f"the {name.replace('_', ' ')} has {len(getattr(request, name))} characters, "
                        f"more than the {self.max_prompt} that are allowed"
                    )
        if sides and min(sides) < 1:
            raise UserError(f"size {sides[1]}x{sides[0]}: expected at least one pixel")
        if sides and max(sides) * settings.hires > self.max_side:
            raise UserError(f"{max(sides) * settings.hires:g} pixels a side are more than the {self.max_side} allowed")
