"""How many steps fit into a time: what a cosine has to know before it begins, measured where the run will train."""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax

from bdm_jax.errors import UserError
from bdm_jax.training.config import TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.metrics import SPEED_LOG

_SHARE = 0.05  # of the time goes to the measurement, but for loading and compiling, which may take longer
_A_LINE = {"cpu": 1}  # how many steps a line of the metrics takes; elsewhere
_OTHERWISE = 32
_NEVER = 2**20 * _OTHERWISE  # a multiple of both: no samples and no checkpoints but the last


def steps_within(config: TrainConfig, seconds: float) -> int:
    """About as many steps as end within `seconds` on this machine, loading and compiling included.

    The run's first steps are taken, in a folder that does not stay, for a twentieth of it. What loading and compiling
    took is taken off the rest of the time once more, and that is divided by the time of a step. Samples, checkpoints
    and a machine that is busier later make it longer.

    Raises:
        UserError: the time is too short for a step, and what `train` raises.
    """
    began, line = time.monotonic(), _A_LINE.get(jax.default_backend(), _OTHERWISE)
    with tempfile.TemporaryDirectory() as folder:
        run, minutes = Path(folder) / config.run.name, _SHARE * seconds / 60
        intervals = {"log_every": line, "sample_every": _NEVER, "checkpoint_every": _NEVER}
        train(replace(config, run=run, minutes=minutes, **intervals))
        lines = [json.loads(text) for text in (run / SPEED_LOG).read_text("utf-8").splitlines()]
    busy = max(sum(one["seconds"]["step"] + one["seconds"].get("data", 0.0) for one in lines), 1e-3)
    spent = time.monotonic() - began
    steps = int((seconds - spent - (spent - busy)) / busy * lines[-1]["step"])
    if steps < 1:
        raise UserError(
            f"{config.run.name}: {seconds:.0f} s are too short: loading, compiling and a step take {spent:.0f} s here"
        )
    return steps
