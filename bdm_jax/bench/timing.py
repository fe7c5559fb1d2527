"""What is measured: a compiled program beside others' functions, in turn, and the machine's own peak."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Problem:
    """One measurement: our compiled program and its arguments, what makes the others' functions (by name), the FLOPs of
    one call.
    """

    program: jax.stages.Compiled
    arguments: tuple
    others: dict[str, Callable[[], Callable[[], Any]]]
    flops: float

    def ours(self) -> Any:
        """One call."""
        return self.program(*self.arguments)

    @property
    def memory(self) -> int:
        """Bytes on the device while it runs."""
        stats = self.program.memory_analysis()
        parts = stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes
        return sum(parts) - stats.alias_size_in_bytes


def timed(make: Callable[[], Problem], batch: int, repeats: int, peak: float) -> dict[str, Any]:
    """Make a problem, which compiles it, and time all sides in turn; their first calls do not count."""
    started = time.perf_counter()
    problem = make()
    made = time.perf_counter() - started
    seconds(problem.ours)
    sides, others = [problem.ours], {}
    for name, make_other in problem.others.items():
        before, started = resident(), time.perf_counter()
        sides.append(make_other())
        others[name] = {"made_in": time.perf_counter() - started}
        seconds(sides[-1])
        if before:
            others[name]["memory"] = resident() - before
    times = [[seconds(side) for side in sides] for _ in range(repeats)]
    ours, *theirs = (statistics.median(column) for column in zip(*times, strict=True))
    for other, median in zip(others.values(), theirs, strict=True):
        other |= {"seconds": median, "ratio": ours / median}
    rate = problem.flops / ours
    row = {"made_in": made, "seconds": ours, "per_second": batch / ours, "tflop": problem.flops / 1e12}
    row |= {"tflops": rate / 1e12, "share_of_peak": rate / peak, "memory": problem.memory, "times": times}
    return row | {"others": others}


def resident() -> int:
    """Bytes of this process in the machine's memory; 0 where this system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def matmul_peak(dtype: str, side: int = 2048) -> float:
    """FLOP/s of a square matrix product in a type, summed in fp32: the best of ten."""
    x = jnp.ones((side, side), dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * side**3 / min(seconds(lambda: product(x, x)) for _ in range(11))


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, until its result is there."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def processor() -> str:
    """Its name, where this system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
