"""What a program costs, read from the program: multiplications in its jaxpr, collectives in its compiled text, and the
time that a chip's three limits leave it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"%?[\w.-]+ = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_WHILE = re.compile(r"\bwhile\(.*\bbody=%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:body|calls|to_apply)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}")  # the axes' sizes, then those of the group
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclass(frozen=True)
class Chip:
    """flops: bf16 per second; hbm: bytes; hbm_speed, ici_speed: bytes per second; achievable_mfu: the share of `flops`
    that training a convolutional network has reached.
    """

    name: str
    flops: float
    hbm: float
    hbm_speed: float
    ici_speed: float
    achievable_mfu: float


# Google's documentation (performance.md, 6.4). Of the documented speed of a chip's links a ring uses one axis in one
# direction, a quarter: on v5p that is what MLPerf's logs show (performance.md, 6.1).
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16e9, 819e9, 100e9, 0.45),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2765e9, 300e9, 0.45),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1638e9, 200e9, 0.35),
}


# Dense bf16 FLOPs per second that makers state, by JAX's name of the device: what MFU is a share of.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True)
class Collective:
    """One kind over groups of one size: how often in a step, the bytes of the whole arrays, the bytes that each chip
    sends in a ring.
    """

    kind: str
    group: int
    count: int
    bytes: int
    sent: int


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step: of computing at the peak, of moving bytes from and to HBM, and between chips; `floor` is the
    longest of them, `planned` has the computing at the chip's `achievable_mfu` (or the memory, where that is slower)
    and no traffic between chips hidden behind it.
    """

    compute: float
    memory: float
    traffic: float
    floor: float
    planned: float

    @property
    def bound(self) -> str:
        """Which of the three is the longest."""
        return max(("compute", "memory", "traffic"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, flops: float, hbm_bytes: float, ici_bytes: float) -> Roofline:
    """Of one chip's part of a step."""
    compute, memory, traffic = flops / chip.flops, hbm_bytes / chip.hbm_speed, ici_bytes / chip.ici_speed
    planned = max(compute / chip.achievable_mfu, memory) + traffic
    return Roofline(compute, memory, traffic, max(compute, memory, traffic), planned)


def flops(function: Callable, *arguments: Any) -> int:
    """Of all convolutions and matrix products of `function` (2 per multiplication), by the sizes in its jaxpr.

    Arguments may be shapes; nothing is computed. Attention counts as by its definition. `function` must not be jitted:
    JAX would keep what is traced here and run it.
    """
    # Of a function of its own: JAX keeps the trace of `function` too, and would compile it where that is jitted later.
    with pretend_platform("none"):
        return 2 * _multiplications(jax.make_jaxpr(lambda *given: function(*given))(*arguments).jaxpr)


@contextmanager
def pretend_platform(platform: str) -> Iterator[None]:
    """What asks JAX for this machine's platform while it is traced gets another one."""
    with mock.patch.object(jax, "default_backend", lambda: platform):
        yield


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program (HLO text), summed by kind and size of group; in loops, as often as these run."""
    found: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    times, seen = _repetitions(text), set()
    for computation, line in _lines(text):
        if not (match := _COLLECTIVE.search(line)):
            continue
        kind, group, size = match[2], _group(line), _size(match[1])
        if channel := _CHANNEL.search(line):  # a fused one is written into every computation that it runs beside
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        if match[3] and kind == "all-gather":  # a started one returns its operand too
            size = size * group // (group + 1)
        elif match[3] and kind == "collective-permute":
            size //= 2
        elif kind == "reduce-scatter":
            size *= group
        elif kind == "all-reduce" and "all-reduce-scatter" in computation:  # the TPU compiler's form of it
            kind = "reduce-scatter"
        share = 1 if kind == "collective-permute" else (group - 1) / group * (2 if kind == "all-reduce" else 1)
        for i, value in enumerate((1, size, int(size * share))):
            found[kind, group][i] += value * times[computation]
    return [Collective(*key, *values) for key, values in sorted(found.items())]


def _multiplications(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval if equation.outvars else None
        if equation.primitive.name == "conv_general_dilated":
            numbers, kernel = equation.params["dimension_numbers"].rhs_spec, equation.invars[1].aval.shape
            places = math.prod(kernel[axis] for axis in numbers[1:])
            # where a gradient dilates its input by a stride, the zeros in between are no work
            total += out.size * places // math.prod(equation.params["lhs_dilation"])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _multiplications(inner) * equation.params.get("length", 1)
    return total


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line with the name of the computation it is in."""
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        else:
            yield computation, line


def _repetitions(text: str) -> dict[str, int]:
    """Computation -> how often it runs: the trips of the loops around it, as far as the compiler knows them."""
    callers: dict[str, tuple[str, int]] = {}
    for computation, line in _lines(text):
        trips = int(match[1]) if _WHILE.search(line) and (match := _TRIPS.search(line)) else 1
        for name in _CALLED.findall(line):
            callers[name] = (computation, trips)
    times: dict[str, int] = defaultdict(lambda: 1)
    for name in callers:
        at, product = name, 1
        while at in callers:
            at, trips = callers[at]
            product *= trips
        times[name] = product
    return times


def _size(shapes: str) -> int:
    arrays = ((kind, sizes) for kind, sizes in _ARRAY.findall(shapes) if kind in _BYTES)
    return sum(_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays)


def _group(line: str) -> int:
    if match := _MESH_GROUPS.search(line):
        sizes = dict(_AXIS.findall(match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2]))
    match = _GROUPS.search(line)
    if not match:
        return 2 if "source_target_pairs" in line else 1
    return int(match[2]) if match[2] else len(match[3].split(","))
