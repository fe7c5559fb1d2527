"""What a run reports: JSON lines, TensorBoard scalars and W&B for programs, a progress bar for people."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from bdm_jax.command_line import progress_console
from bdm_jax.paths import atomic_file
from bdm_jax.training.goodput import Goodput
from bdm_jax.training.wandb import WandB

SPEED_LOG = "speed.jsonl"


class Clock:
    """Where the host's time goes. What happens outside `of` is the steps themselves: on an accelerator these go on
    while the next batch is made, so that "data" is an upper bound of the time lost by waiting.

    `began`: when the session did (time.monotonic); what was before now is its "start".
    """

    def __init__(self, began: float | None = None):
        now = time.monotonic()
        self._began, self._spent = now if began is None else began, defaultdict(float)
        if began is not None:
            self._spent["start"] = now - began

    @contextmanager
    def of(self, cause: str) -> Iterator[None]:
        """What happens in here is for this cause."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._spent[cause] += time.monotonic() - before

    def take(self) -> dict[str, float]:
        """Cause -> seconds since the last call, "step" for all that had no other."""
        now = time.monotonic()
        spent = {**self._spent, "step": max(now - self._began - sum(self._spent.values()), 0.0)}
        self._began, self._spent = now, defaultdict(float)
        return spent


class Metrics:
    """Writes run/metrics.jsonl (what was computed), run/speed.jsonl (how fast), run/goodput.jsonl (see `goodput`) and
    run/tensorboard, and the same to W&B where it is given; shows loss, images/s and the time left.

    `start` is the step that a resumed run begins at: lines of later steps, written by a session that was killed, are
    dropped. `work`, to be set: seconds that an image would take on all devices at their stated peak, for the share of
    it that is used (MFU); None where that is unknown.
    """

    work: float | None = None

    def __init__(self, folder: Path, start: int, total: int, batch_size: int, wandb: WandB | None = None):
        self._path, self._speed_path = folder / "metrics.jsonl", folder / SPEED_LOG
        for path in (self._path, self._speed_path):
            _drop_after(path, start)
        self._goodput, self._wandb = Goodput(folder, start), wandb
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._batch_size, self._total = batch_size, total
        self._before, self._step_before, self._speed = time.monotonic(), start, 0.0
        console = progress_console()
        self._lines = None if console.is_terminal else console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task(folder.name, total=total, completed=start, said="")
        self._progress.start()

    def log(
        self, step: int, values: dict[str, float], seconds: dict[str, float] | None = None, left_out: int = 0
    ) -> None:
        """Values of the steps since the last call, already averaged, where the time has gone since, and how many
        records this session has left out.
        """
        now, seconds = time.monotonic(), seconds or {}
        if step > self._step_before:
            self._speed = (step - self._step_before) * self._batch_size / max(now - self._before, 1e-9)
        self._before, self._step_before, speed = now, step, self._speed
        goodput = self._goodput.add(step, seconds)
        timing = {"images_per_second": round(speed, 2), "left_out": left_out, "goodput": round(goodput, 4)}
        if self.work is not None:
            timing["mfu"] = round(speed * self.work, 4)
        _append(self._path, {"step": step, **values, "images_per_second": timing["images_per_second"]})
        rounded = {cause: round(value, 3) for cause, value in seconds.items()}
        _append(self._speed_path, {"step": step, **timing, "seconds": rounded})
        scalars = {**values, **timing, **{f"seconds/{cause}": s for cause, s in seconds.items()}}
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(step, scalars)
        rate = _rate(speed, timing.get("mfu"), seconds, left_out)
        said = f"loss {values['loss']:.4f}  {rate}"
        self._progress.update(self._bar, completed=step, said=said)
        if self._lines is not None:
            left = (self._total - step) * self._batch_size / max(speed, 1e-9)
            self._lines.print(f"step {step}/{self._total}  {said}  {left / 60:.0f} min left", highlight=False)

    def image(self, name: str, step: int, image) -> None:
        """An image (H,W,3) uint8 for TensorBoard."""
        self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.image(name, step, image)

    def restart_clock(self, step: int) -> None:
        """Leave what took time before `step` but was no training (a checkpoint, samples) out of images/s."""
        self._before, self._step_before = time.monotonic(), step

    def close(self, step: int, seconds: dict[str, float]) -> None:
        """Flush everything and leave the terminal clean. `seconds`: where the time has gone since the last line."""
        self._progress.stop()
        self._goodput.add(step, seconds)
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


def _rate(speed: float, mfu: float | None, seconds: dict[str, float], left_out: int) -> str:
    """ "55.0 images/s  41% of peak  12% waiting for data  left out: 3": what is known, and what is not as it
    should be.
    """
    parts = [f"{speed:.1f} images/s"]
    if mfu is not None:
        parts.append(f"{mfu:.0%} of peak")
    waiting = seconds.get("data", 0.0) / max(sum(seconds.values()), 1e-9)
    if waiting >= 0.05:
        parts.append(f"{waiting:.0%} waiting for data")
    if left_out:
        parts.append(f"left out: {left_out}")
    return "  ".join(parts)


def _append(path: Path, values: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _drop_after(path: Path, step: int) -> None:
    """Leave the lines up to this step, of those that were written whole."""
    kept = path.read_text("utf-8").splitlines() if path.is_file() else []
    kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_file(path) as file:
        file.write("".join(line + "\n" for line in kept).encode("utf-8"))
