"""What is measured: a compiled program beside PyTorch's function, in turn, and the machine's own peak."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Problem:
    """One measurement: our compiled program and its arguments, PyTorch's function (where there is a comparison), the
    FLOPs of one call.
    """

    program: jax.stages.Compiled
    arguments: tuple
    theirs: Callable[[], Any] | None
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
    """Make a problem, which compiles it, and time both sides in turn; their first calls do not count."""
    started = time.perf_counter()
    problem = make()
    made = time.perf_counter() - started
    sides = [side for side in (problem.ours, problem.theirs) if side]
    for side in sides:
        seconds(side)
    times = [[seconds(side) for side in sides] for _ in range(repeats)]
    ours, *theirs = (statistics.median(column) for column in zip(*times, strict=True))
    rate = problem.flops / ours
    row = {"made_in": made, "seconds": ours, "per_second": batch / ours, "tflop": problem.flops / 1e12}
    row |= {"tflops": rate / 1e12, "share_of_peak": rate / peak, "memory": problem.memory, "times": times}
    return row | ({"diffusers": theirs[0], "ratio": ours / theirs[0]} if theirs else {})


def matmul_peak(side: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of ten: in bf16, in fp32 on a CPU."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
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
