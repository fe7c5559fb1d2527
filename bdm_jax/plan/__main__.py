"""What a training costs on a TPU slice, before one is rented: `python -m bdm_jax.plan bdm-sd15 --topology v5e:16x16`.

The run's own step is compiled for the slice on this machine, through libtpu's ahead-of-time path: no TPU, no weights
and no data are needed, only shapes. Read from the compiled program: memory, FLOPs and collectives per chip; reckoned
from them by `costs.roofline`: seconds per step, days, chip-hours. The compiler is asked for its lowest effort, which at
full size takes 3 CPU minutes and 5 GB in place of 20 and 14; a run's own program is scheduled and fused better than
this one. Results are kept on disk: the same program for the same slice is compiled once.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AbstractMesh, AxisType, Mesh

from bdm_jax import command_line, configs
from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.plan.shapes import abstract_job, analytic_flops, lower, state_bytes
from bdm_jax.runtime.costs import CHIPS, Chip, Collective, Roofline, collectives, roofline
from bdm_jax.runtime.sharding import AXES, batch_ways
from bdm_jax.training.config import MeshConfig, TrainConfig
from bdm_jax.training.objectives.remat import Remat

_SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_EFFORT = -1.0  # of the compiler, from -1 to 1
_NEEDED = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm")


@dataclass(frozen=True)
class PlanArgs:
    """Compile a run's step for a TPU slice on this machine and say what it costs per chip."""

    config: tyro.conf.Positional[str]
    """a run of configs/"""
    topology: str = "v5e:16x16"
    """the slice, by the chips along its axes: v5e:4x4, v5p:4x4x8, v6e:16x16"""
    batch_per_chip: int | None = None
    """pictures per chip and step; the run's batch over all chips where left out"""
    accumulate: int | None = None
    """parts that a batch is computed in; the run's own where left out"""
    remat: Remat | None = None
    """the run's own where left out"""
    fsdp: int | None = None
    """chips that the train state is split over; the run's own where left out"""
    tensor: int | None = None
    """chips that layers are split over; the run's own where left out"""
    strategy: Literal["fsdp", "zero1"] | None = None
    """the run's own where left out"""
    size: int = 512
    """pixels on a side"""
    pairs: float = 1e9
    """pictures of the whole training"""
    price: float | None = None
    """of a chip-hour, in any currency"""
    sweep: bool = False
    """a table over batches per chip and meshes, reckoned from this compilation"""
    json: Path | None = None
    """write the figures here"""


@dataclass(frozen=True)
class Slice:
    """name: as libtpu knows it ("v5e:4x4"); sizes: chips along its axes."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Program:
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
    """One run on one slice. counted: analytic FLOPs per picture; state: bytes of the train state per chip."""

    where: Slice
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    counted: int
    state: int
    program: Program

    @property
    def batch_per_chip(self) -> float:
        """Pictures per chip and step."""
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


def parse_topology(text: str) -> Slice:
    """ "v5p:4x4x8" -> a slice.

    Raises:
        UserError: no such chip, or sizes that it cannot have: v5e and v6e have two axes, v5p three.
    """
    name, _, sizes = text.lower().partition(":")
    if name not in CHIPS:
        raise unknown("chip", name, CHIPS)
    axes = 3 if name == "v5p" else 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != axes:
        example = f"{name}:{'x'.join(['4'] * axes)}"
        raise UserError(f"topology {text!r}: {name} slices have {axes} axes, as in {example}")
    return Slice(f"{name}:{sizes}", CHIPS[name], tuple(int(size) for size in sizes.split("x")))


def make_plan(config: TrainConfig, where: Slice, size: int = 512) -> Plan:
    """Compile the run's step for the slice, or look it up.

    config: its `batch_size` is that of the whole slice; `compute` is bfloat16 unless it says otherwise.

    Raises:
        UserError: libtpu is missing, no such slice, a batch or a mesh that does not fit it, an unknown task.
    """
    mesh = Mesh(_devices(where, config.mesh), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    ways = batch_ways(mesh) * config.accumulate
    if config.batch_size % ways:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of {ways} (chips along data and fsdp, times accumulate)"
        )
    counted, state = analytic_flops(config.task, size), state_bytes(config, mesh, size)
    program = _compiled(lower(config, mesh, size), where, config.accumulate)
    return Plan(where, dict(mesh.shape), config.batch_size, config.accumulate, counted, state, program)


def estimate(config: TrainConfig, plan: Plan, where: Slice, fsdp: int, batch: float, size: int = 512) -> Plan:
    """The plan for another slice, mesh or batch per chip, by arithmetic from one that was compiled: the state by its
    shardings, temporaries in proportion to the pictures computed at once, but for one copy of the weights in each type,
    FLOPs and HBM traffic in proportion to the pictures, traffic between chips by the formulas of rings.
    """
    trained = abstract_job(config.task, jnp.dtype("bfloat16"), size)[1]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained))
    mesh = {"data": where.chips // fsdp, "fsdp": fsdp, "tensor": 1}
    state = state_bytes(config, AbstractMesh(tuple(mesh.values()), AXES), size)
    copies = lambda ways: 2 * parameters + 4 * parameters // ways  # noqa: E731
    each = (
        max(plan.program.memory["temporaries"] - copies(plan.mesh["fsdp"]), 0) * plan.accumulate / plan.batch_per_chip
    )
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


def sweep(config: TrainConfig, plan: Plan, size: int = 512) -> Iterator[Plan]:
    """Plans for other batches per chip and meshes, each batch in one part, reckoned from one that was compiled."""
    for fsdp in (1, 2, 4, 8, 16):
        if plan.where.chips % fsdp == 0:
            for batch in _SWEEP_BATCHES:
                yield estimate(replace(config, accumulate=1), plan, plan.where, fsdp, batch, size)


def from_json(values: dict[str, Any]) -> Plan:
    """What `Plan.to_json` made, back."""
    named = {one.name: values[one.name] for one in dataclasses.fields(Program)}
    program = Program(**{**named, "collectives": tuple(Collective(**one) for one in values["collectives"])})
    sizes = values["batch_size"], values["accumulate"], values["analytic_flops_per_image"], values["state_bytes"]
    return Plan(parse_topology(values["topology"]), values["mesh"], *sizes, program)


def report(plan: Plan, pairs: float, price: float | None = None) -> Iterator[str]:
    """Lines for people."""
    where, program, clock = plan.where, plan.program, plan.time
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    yield f"{where.name}: {where.chips} chips {where.chip.name}, {mesh}"
    parts = f", in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    yield f"batch       {plan.batch_size} pictures, {plan.batch_per_chip:g} per chip{parts}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"memory      {_gb(program.total)} of {_gb(where.chip.hbm)} per chip: {verdict}"
    if program.needed is not None:
        return
    for name, size in program.memory.items():
        note = f" (train state {_gb(plan.state)})" if name == "arguments" else ""
        yield f"            {name:12} {_gb(size):>10}{note}"
    per_image = program.flops / plan.batch_per_chip / 1e12
    ratio = per_image * 1e12 / plan.counted
    counted = f"{per_image:.3f} TFLOP per picture by the compiler, {plan.counted / 1e12:.3f} needed"
    yield f"FLOPs       {counted} ({ratio:.1%})"
    yield f"HBM         {_gb(program.hbm_bytes)} moved per step"
    for one in program.collectives:
        if one.sent:
            count = f"{one.count} x {one.kind}"
            yield f"collective  {count:24} of {one.group:4} chips: {_gb(one.bytes):>10}, sent {_gb(one.sent)}"
    ms = lambda seconds: f"{1e3 * seconds:.1f} ms"  # noqa: E731
    yield f"roofline    compute {ms(clock.compute)}, memory {ms(clock.memory)}, between chips {ms(clock.traffic)}"
    planned = f"{ms(clock.planned)} planned at {where.chip.achievable_mfu:.0%}"
    yield f"step        {ms(clock.floor)} at best ({clock.bound}), {planned}"
    speed = plan.images_per_second()
    yield f"speed       {speed:,.0f} pictures/s, {speed / where.chips:.1f} per chip (planned)"
    hours = pairs / speed / 3600
    cost = f", {hours * where.chips * price:,.0f} at {price:g} each" if price else ""
    yield f"{pairs:.3g} pairs   {hours / 24:.1f} days, {hours * where.chips:,.0f} chip-hours{cost}"


def main(args: Sequence[str] | None = None) -> int:
    """Print the plan, write what was asked for; 1 where it does not fit, 2 for bad input."""
    jax.config.update("jax_platforms", "cpu")
    return command_line.run(partial(_plan, args))


def _plan(args: Sequence[str] | None) -> int:
    settings = command_line.parse(PlanArgs, args, prog="python -m bdm_jax.plan", config=(tyro.conf.AvoidSubcommands,))
    where, config = parse_topology(settings.topology), configs.load(settings.config)
    config = _changed(config, settings, where)
    plan = make_plan(config, where, settings.size)
    for line in report(plan, settings.pairs, settings.price):
        print(line)
    values = plan.to_json(settings.pairs)
    if settings.sweep and plan.program.needed is None:
        rows = list(sweep(config, plan, settings.size))
        values["sweep"] = [row.to_json(settings.pairs) for row in rows]
        print("\nreckoned from this compilation (zero1, one part):\nfsdp  per chip  memory     pictures/s      days")
        for row in rows:
            days = settings.pairs / row.images_per_second() / 86400
            speed = f"{row.images_per_second():10,.0f}  {days:8.1f}" if row.fits else "  does not fit"
            print(f"{row.mesh['fsdp']:4}  {row.batch_per_chip:8g}  {_gb(row.program.total):>9}  {speed}")
    if settings.json:
        write_json(settings.json, {"config": settings.config, **values})
    return 0 if plan.fits else 1


def _changed(config: TrainConfig, settings: PlanArgs, where: Slice) -> TrainConfig:
    asked = {name: getattr(settings, name) for name in ("fsdp", "tensor", "strategy")}
    mesh = replace(config.mesh, **{name: value for name, value in asked.items() if value is not None})
    remat = {"task": replace(config.task, remat=settings.remat)} if settings.remat else {}
    accumulate = settings.accumulate or config.accumulate
    batch = settings.batch_per_chip * where.chips if settings.batch_per_chip else config.batch_size
    return replace(config, mesh=mesh, accumulate=accumulate, batch_size=batch, **remat)


def _devices(where: Slice, mesh: MeshConfig) -> np.ndarray:
    """The slice's chips in the mesh's shape."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = where.chips // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != where.chips:
        raise UserError(f"a mesh of {' x '.join(map(str, sizes))} does not fit the {where.chips} chips of {where.name}")
    return np.asarray(_topology(where).devices).reshape(sizes)


def _topology(where: Slice) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    from jax.experimental import topologies

    # No metadata server is asked what machine this is; several processes may compile at once, as none has a TPU.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=where.name)
    except Exception as error:  # libtpu's own, of whatever type the release has
        raise UserError(
            f"topology {where.name}: libtpu does not know it ({' '.join(str(error).split())[:160]})"
        ) from error


def _compiled(lowered: Any, where: Slice, parts: int) -> Program:
    """Compile, or look up what was compiled before."""
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    key = hashlib.sha256("\n".join([lowered.as_text(), where.name, f"{_EFFORT}", *versions]).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("BDM_JAX_CACHE") or home / "bdm_jax") / "plans" / f"{key}.json"
    if path.is_file():
        values = read_json(path)
        values["collectives"] = tuple(Collective(**one) for one in values["collectives"])
        return Program(**values)
    print(f"compiling for {where.name}: minutes at full size, then kept in {path.parent}", file=sys.stderr, flush=True)
    program = _compile(lowered, parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(program))
    return program


def _compile(lowered: Any, parts: int) -> Program:
    """`parts`: how often the loop over the parts of a batch runs, whose work the compiler's costs have once."""
    began, effort = time.monotonic(), jax.config.jax_exec_time_optimization_effort
    try:
        jax.config.update("jax_exec_time_optimization_effort", _EFFORT)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (match := _NEEDED.search(str(error))):
            raise
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
        return Program(needed=int(float(match[1]) * scale), seconds=time.monotonic() - began)
    finally:
        jax.config.update("jax_exec_time_optimization_effort", effort)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Program(
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


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
