"""What a step costs on a slice: read from the program that is compiled for it, or by arithmetic from another one's."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.paths import user_cache
from bdm_jax.plan.shapes import StepShapes, analytic_flops, lower, state_bytes
from bdm_jax.plan.topology import Slice, described_mesh, parse_topology
from bdm_jax.runtime.costs import Collective, Roofline, collectives, roofline
from bdm_jax.runtime.sharding import AXES, batch_ways
from bdm_jax.training.config import TrainConfig

_SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_SETTING = "jax_exec_time_optimization_effort"
_EFFORT = -1.0  # of the compiler, from -1 to 1
# Two wordings of libtpu.
_NEEDED = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|\(([\d.]+)([KMG])\) exceeds available HBM")


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one chip's part of a step. bytes: of arguments (state, frozen networks, batch), of
    outputs that are not written over arguments, of everything in between, and of instructions. `needed` alone is there
    where it did not fit.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
    seconds: float = 0.0
    needed: int | None = None

    @property
    def total(self) -> int:
        """Bytes of HBM."""
        return sum(self.memory.values()) if self.needed is None else self.needed


@dataclass(frozen=True)
class Plan:
    """One run on one slice. counted: analytic FLOPs per image; state: bytes of the train state per chip."""

    where: Slice
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    counted: int
    state: int
    program: CompiledStep

    @property
    def batch_per_chip(self) -> float:
        """Images per chip and step."""
        return self.batch_size / self.where.chips

    @property
    def fits(self) -> bool:
        """Whether the compiler found room, and in the chip's HBM counted in 10^9 bytes."""
        return self.program.needed is None and self.program.total <= self.where.chip.hbm

    @property
    def time(self) -> Roofline:
        """Of a step. The FLOPs are the larger of both counts: the compiler does not see into kernels."""
        work = max(self.program.flops, self.counted * self.batch_per_chip)
        sent = sum(one.sent for one in self.program.collectives)
        return roofline(self.where.chip, work, self.program.hbm_bytes, sent)

    def images_per_second(self) -> float:
        """Of the whole slice, as planned."""
        return self.batch_size / self.time.planned

    def to_json(self, pairs: float) -> dict[str, Any]:
        """Plain values."""
        hours = pairs / self.images_per_second() / 3600
        return {
            "topology": self.where.name,
            "chips": self.where.chips,
            "mesh": self.mesh,
            "batch_size": self.batch_size,
            "batch_per_chip": self.batch_per_chip,
            "accumulate": self.accumulate,
            "fits": self.fits,
            "analytic_flops_per_image": self.counted,
            "state_bytes": self.state,
            **dataclasses.asdict(self.program),
            "total_bytes": self.program.total,
            "hbm": self.where.chip.hbm,
            "time": dataclasses.asdict(self.time),
            "bound": self.time.bound,
            "images_per_second": self.images_per_second(),
            "pairs": pairs,
            "days": hours / 24,
            "chip_hours": hours * self.where.chips,
        }


def make_plan(config: TrainConfig, where: Slice, shapes: StepShapes) -> Plan:
    """Compile the run's step, of these shapes, for the slice, or look it up.

    config: its `batch_size` is that of the whole slice.

    Raises:
        UserError: libtpu is missing, no such slice, a batch or a mesh that does not fit it.
    """
    mesh = described_mesh(where, config.mesh)
    check_batch(config, mesh)
    counted, state = analytic_flops(shapes), state_bytes(config, mesh, shapes)
    program = _compiled(lower(config, mesh, shapes), where, config.accumulate)
    return Plan(where, dict(mesh.shape), config.batch_size, config.accumulate, counted, state, program)


def check_batch(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError for a batch that the chips do not share evenly."""
    ways = batch_ways(mesh) * config.accumulate
    if config.batch_size % ways:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of {ways} (chips along data and fsdp, times accumulate)"
        )


def estimate(config: TrainConfig, plan: Plan, where: Slice, fsdp: int, batch: float, shapes: StepShapes) -> Plan:
    """The plan for another slice, mesh or batch per chip, by arithmetic from one that was compiled: the state by its
    shardings, temporaries in proportion to the images computed at once, but for one copy of the weights in each type,
    FLOPs and HBM traffic in proportion to the images, traffic between chips by the formulas of rings.
    """
    parameters = shapes.parameters
    mesh = {"data": where.chips // fsdp, "fsdp": fsdp, "tensor": 1}
    state = state_bytes(config, AbstractMesh(tuple(mesh.values()), AXES), shapes)

    def copies(ways: int) -> int:
        return 2 * parameters + 4 * parameters // ways

    activations = max(plan.program.memory["temporaries"] - copies(plan.mesh["fsdp"]), 0)
    each = activations * plan.accumulate / plan.batch_per_chip
    memory = dict(plan.program.memory)
    memory["arguments"] += state - plan.state
    memory["temporaries"] = int(copies(fsdp) + each * batch / config.accumulate)
    scale = batch / plan.batch_per_chip
    program = replace(
        plan.program,
        flops=plan.program.flops * scale,
        hbm_bytes=plan.program.hbm_bytes * scale,
        memory=memory,
        collectives=tuple(_zero1_traffic(parameters, mesh["data"], fsdp)),
    )
    return Plan(where, mesh, round(batch * where.chips), config.accumulate, plan.counted, state, program)


def sweep(config: TrainConfig, plan: Plan, shapes: StepShapes) -> Iterator[Plan]:
    """Plans for other batches per chip and meshes, each batch in one part, estimated from one that was compiled."""
    for fsdp in (1, 2, 4, 8, 16):
        if plan.where.chips % fsdp == 0:
            for batch in _SWEEP_BATCHES:
                yield estimate(replace(config, accumulate=1), plan, plan.where, fsdp, batch, shapes)


def from_json(values: dict[str, Any]) -> Plan:
    """What `Plan.to_json` made, back."""
    named = {one.name: values[one.name] for one in dataclasses.fields(CompiledStep)}
    program = CompiledStep(**{**named, "collectives": tuple(Collective(**one) for one in values["collectives"])})
    sizes = values["batch_size"], values["accumulate"], values["analytic_flops_per_image"], values["state_bytes"]
    return Plan(parse_topology(values["topology"]), values["mesh"], *sizes, program)


def _compiled(lowered: Any, where: Slice, parts: int) -> CompiledStep:
    """Compile, or look up what was compiled before."""
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    key = hashlib.sha256("\n".join([lowered.as_text(), where.name, f"{_EFFORT}", *versions]).encode()).hexdigest()[:32]
    named, home = os.environ.get("BDM_JAX_CACHE"), user_cache()
    folder = Path(named) if named else home
    path = folder and folder / "plans" / f"{key}.json"
    if path and os.path.isfile(path) and os.access(path, os.R_OK):
        values = read_json(path)
        values["collectives"] = tuple(Collective(**one) for one in values["collectives"])
        return CompiledStep(**values)
    kept = f", then kept in {path.parent}" if path else ""
    print(f"compiling for {where.name}: minutes at full size{kept}", file=sys.stderr, flush=True)
    program = _compile(lowered, parts)
    try:
        if path:
            write_json(path, dataclasses.asdict(program))
    except FileError as error:
        warnings.warn(f"the plan is not kept for the next time: {error}", stacklevel=2)
    return program


@contextlib.contextmanager
def _least_effort() -> Iterator[None]:
    """The compiler at its lowest effort, in versions of JAX that have the setting (0.12 has not)."""
    usual = getattr(jax.config, _SETTING, None)
    if usual is None:
        yield
        return
    jax.config.update(_SETTING, _EFFORT)
    try:
        yield
    finally:
        jax.config.update(_SETTING, usual)


def _compile(lowered: Any, parts: int) -> CompiledStep:
    """`parts`: how often the loop over the parts of a batch runs, whose work the compiler's costs have once."""
    began = time.monotonic()
    try:
        with _least_effort():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (match := _NEEDED.search(str(error))):
            raise
        amount, unit = filter(None, match.groups())
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}[unit]
        return CompiledStep(needed=int(float(amount) * scale), seconds=time.monotonic() - began)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return CompiledStep(
        flops=parts * float(cost["flops"]),
        hbm_bytes=parts * float(cost["bytes accessed"]),
        memory={
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "instructions": memory.generated_code_size_in_bytes,
        },
        collectives=tuple(collectives(compiled.as_text())),
        seconds=time.monotonic() - began,
    )


def _zero1_traffic(parameters: int, data: int, fsdp: int) -> Iterator[Collective]:
    """As the compiled programs have it, all in bf16: weights gathered, gradients scattered over fsdp, then summed over
    data.
    """
    for kind, group, size, rounds in (
        ("all-gather", fsdp, 2 * parameters, 1),
        ("reduce-scatter", fsdp, 2 * parameters, 1),
        ("all-reduce", data, 2 * parameters // fsdp, 2),
    ):
        yield Collective(kind, group, 1, size, int(rounds * size * (group - 1) / group))
