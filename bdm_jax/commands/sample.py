"""Pictures from prompts: python sample.py "红灯笼" """

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdm_jax.app.arguments import Arguments, parse
from bdm_jax.command_line import progress_console, run
from bdm_jax.sampling.settings import Request

if TYPE_CHECKING:
    from rich.progress import Progress


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr), 130 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def command() -> None:
        asked = parse(sys.argv[1:] if args is None else args)
        with _progress_bar() as bar:
            files = draw(*asked, bar)
        print(*files, sep="\n")

    return run(command, stopped="stopped; finished pictures are kept")


def draw(arguments: Arguments, requests: list[Request], rows: list[int] | None, bar: "Progress") -> list[Path]:
    """Load the model and draw; returns the files written. JAX is imported here, when it is needed."""
    task, marks = bar.add_task("loading", total=None), [time.perf_counter()]
    from bdm_jax.app import runs
    from bdm_jax.diffusion.samplers import check_sampler
    from bdm_jax.runtime import compile_cache, processes

    settings = arguments.settings
    check_sampler(settings.sampler)
    processes.initialize()
    compile_cache.enable()
    pipeline, controls = arguments.parts.load(settings.dtype), arguments.parts.load_controls()
    names = arguments.parts.names()
    marks.append(time.perf_counter())
    run = runs.plan(pipeline, requests, settings, arguments.out, controls=controls, parts=names, rows=rows)

    def progress(done: int, total: int) -> None:
        doing = "drawing" if done else "compiling (once per size; kept for next time)"
        bar.update(task, description=doing, completed=done, total=total)

    there, drawn = runs.draw(
        pipeline, run, batch_size=arguments.batch_size, progress=progress, preview_every=arguments.preview_every
    )
    if there:
        print(f"note: {there} of {len(run.images)} pictures are there already", file=sys.stderr)
    files = []
    for file in drawn:
        files.append(file)
        marks.append(time.perf_counter())
    if files:
        print(_times(marks), file=sys.stderr)
    return files


def _progress_bar() -> "Progress":
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = progress_console()
    spinner = SpinnerColumn("line" if console.options.ascii_only else "dots")
    columns = spinner, TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _times(marks: list[float]) -> str:
    """marks: when loading began, when it ended, when each picture was done."""
    began, loaded, first, *rest = marks
    then = f", then {(rest[-1] - first) / len(rest):.2f} s each" if rest else ""
    return f"loaded in {loaded - began:.1f} s, first picture after {first - loaded:.1f} s{then}"
