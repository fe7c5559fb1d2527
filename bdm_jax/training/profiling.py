"""A profile of a few steps: what the devices and the host did in them, for TensorBoard, XProf and Perfetto."""

import re
import sys
from pathlib import Path
from typing import Any

import jax

from bdm_jax.errors import UserError

_MOST = 100  # steps: of more, a trace is gigabytes that no viewer opens


def parse_steps(text: str, total: int) -> tuple[int, int]:
    """`10:15` -> (10, 15), the first and the last step. Raises UserError for what are no steps of a run of `total`."""
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not found:
        raise UserError(f"profile_steps={text}: give the first and the last step, as --profile-steps 10:15")
    first, last = int(found[1]), int(found[2])
    if not 1 <= first <= last <= total:
        raise UserError(f"profile_steps={text}: the first step must be at least 1, the last at most steps={total}")
    if last - first >= _MOST:
        raise UserError(f"profile_steps={text}: more than {_MOST} steps are too large a trace to look at: choose fewer")
    return first, last


class Profiler:
    """Records the steps first..last into a folder, with the whole calls that these lie in.

    steps: as of `parse_steps`, None for none. `at`: the step that the session begins after.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, at: int):
        self._folder, self._steps, self._began = folder, steps, None
        if steps is not None and at >= steps[0]:
            print(f"note: step {at} is done already: nothing of {steps[0]}:{steps[1]} is profiled", file=sys.stderr)
            self._steps = None

    def before(self, at: int, count: int) -> None:
        """A call of `count` steps comes after step `at`."""
        if self._steps is not None and self._began is None and at + count >= self._steps[0]:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._began = at + 1

    def after(self, at: int, result: Any) -> None:
        """Step `at` has been given to the device, which makes `result` (a pytree) of it."""
        if self._began is not None and at >= self._steps[1]:
            jax.block_until_ready(result)
            self.close(at)

    def close(self, at: int) -> None:
        """Write what has been recorded up to step `at`, if anything is being."""
        if self._began is None:
            return
        jax.profiler.stop_trace()
        print(
            f"profile of steps {self._began} to {at}: tensorboard --logdir {self._folder} (with its profile plug-in), "
            "or perfetto_trace.json.gz in there with ui.perfetto.dev",
            file=sys.stderr,
            flush=True,
        )
        self._steps = self._began = None
