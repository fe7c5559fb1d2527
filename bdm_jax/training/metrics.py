"""What a run reports: a JSON line and TensorBoard scalars for programs, a progress bar for people."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from convert.files import atomic_file


class Metrics:
    """Writes run/metrics.jsonl and run/tensorboard; shows loss, images/s and the time left.

    `start` is the step that a resumed run begins at: lines of later steps, written by a leg that was killed, are
    dropped.
    """

    def __init__(self, folder: Path, start: int, total: int, batch_size: int):
        self._path = folder / "metrics.jsonl"
        kept = self._path.read_text().splitlines() if self._path.is_file() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= start]
        with atomic_file(self._path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._batch_size, self._total = batch_size, total
        self._before, self._step_before, self._speed = time.monotonic(), start, 0.0
        console = Console(stderr=True)
        self._lines = None if console.is_terminal else console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} images/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task(folder.name, total=total, completed=start, loss=float("nan"), speed=0.0)
        self._progress.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Values of the steps since the last call, already averaged."""
        now = time.monotonic()
        if step > self._step_before:
            self._speed = (step - self._step_before) * self._batch_size / max(now - self._before, 1e-9)
        self._before, self._step_before, speed = now, step, self._speed
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values, "images_per_second": round(speed, 2)}) + "\n")
        for name, value in {**values, "images_per_second": speed}.items():
            self._tensorboard.add_scalar(name, value, step)
        self._progress.update(self._bar, completed=step, loss=values["loss"], speed=speed)
        if self._lines is not None:
            left = (self._total - step) * self._batch_size / max(speed, 1e-9)
            rate = f"{speed:.1f} images/s  {left / 60:.0f} min left"
            self._lines.print(f"step {step}/{self._total}  loss {values['loss']:.4f}  {rate}", highlight=False)

    def image(self, name: str, step: int, picture) -> None:
        """A picture (H,W,3) uint8 for TensorBoard."""
        self._tensorboard.add_image(name, picture, step, dataformats="HWC")

    def restart_clock(self, step: int) -> None:
        """Leave what took time before `step` but was no training (a checkpoint, samples) out of images/s."""
        self._before, self._step_before = time.monotonic(), step

    def close(self) -> None:
        """Flush everything and leave the terminal clean."""
        self._progress.stop()
        self._tensorboard.close()
