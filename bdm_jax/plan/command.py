"""The command `python -m bdm_jax.plan`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import tyro

from bdm_jax import command_line, configs
from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.paths import check_output
from bdm_jax.plan.advice import advice
from bdm_jax.plan.estimate import check_batch, make_plan, sweep
from bdm_jax.plan.report import report, shapes_report, sweep_report
from bdm_jax.plan.shapes import StepShapes, memory_by_shapes, parse_networks, step_shapes
from bdm_jax.plan.topology import Slice, abstract_mesh, parse_topology
from bdm_jax.training.config import TrainConfig
from bdm_jax.training.objectives.remat import Remat


@dataclass(frozen=True)
class PlanArgs:
    """Compile a run's step for a TPU slice on this machine, or add up its shapes, and say what it costs per chip."""

    config: tyro.conf.Positional[str]
    """a run of configs/"""
    topology: str = "v5e:16x16"
    """the slice, by the chips along its axes: v5e:4x4, v5p:4x4x8, v6e:16x16"""
    batch_per_chip: int | None = None
    """images per chip and step; the run's batch over all chips where left out"""
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
    frozen: Literal["auto", "split", "whole"] | None = None
    """whether frozen networks are split over fsdp; the run's own where left out"""
    networks: tuple[str, ...] = ()
    """other networks than the run's, NAME=PRESET or NAME=CONFIG.JSON: unet=sdxl-unet"""
    shapes: bool = False
    """compile nothing: bytes per chip, by shapes"""
    size: int | None = None
    """pixels on a side; those of the run's family where left out, 512 or 1024"""
    pairs: float = 1e9
    """images of the whole training"""
    price: float | None = None
    """of a chip-hour, in any currency"""
    sweep: bool = False
    """a table over batches per chip and meshes, estimated from this compilation"""
    json: Path | None = None
    """write the figures here"""


def main(args: Sequence[str] | None = None) -> int:
    """Print the plan, write what was asked for; 1 where it does not fit, 2 for bad input."""
    jax.config.update("jax_platforms", "cpu")
    return command_line.run(partial(_plan, args))


def _plan(args: Sequence[str] | None) -> int:
    settings = command_line.parse(PlanArgs, args, prog="python -m bdm_jax.plan", config=(tyro.conf.AvoidSubcommands,))
    _check(settings)
    where, config = parse_topology(settings.topology), configs.load(settings.config)
    config = _changed(config, settings, where)
    shapes = step_shapes(config.task, config.compute_dtype(), settings.size, parse_networks(settings.networks))
    if settings.shapes:
        mesh = abstract_mesh(where, config.mesh)
        check_batch(config, mesh)
        memory = memory_by_shapes(config, mesh, shapes)
        print(*shapes_report(config, where, dict(mesh.shape), shapes, memory), sep="\n")
        total = sum(memory.values())
        fits, values = total <= where.chip.hbm, {"topology": where.name, "mesh": dict(mesh.shape)}
        values |= {"memory": memory, "total_bytes": total, "fits": fits}
    else:
        plan = make_plan(config, where, shapes)
        print(*report(plan, settings.pairs, settings.price), sep="\n")
        fits, values = plan.fits, plan.to_json(settings.pairs)
        if settings.sweep and plan.program.needed is None:
            rows = list(sweep(config, plan, shapes))
            values["sweep"] = [row.to_json(settings.pairs) for row in rows]
            print(*sweep_report(rows, settings.pairs), sep="\n")
    if not fits:
        values["would_fit"] = list(_advice(config, settings, where, shapes))
        print(*values["would_fit"], sep="\n")
    if settings.json:
        write_json(settings.json, {"config": settings.config, **values})
    return 0 if fits else 1


def _advice(config: TrainConfig, settings: PlanArgs, where: Slice, shapes: StepShapes) -> Iterator[str]:
    rematerialised = None
    if getattr(config.task, "remat", None) == "none":
        task, networks = replace(config.task, remat="blocks"), parse_networks(settings.networks)
        rematerialised = step_shapes(task, config.compute_dtype(), settings.size, networks)
    return advice(config, where, shapes, rematerialised)


def _check(settings: PlanArgs) -> None:
    """Flags that have no effect, and a file that cannot be written: before the work."""
    without = {"sweep": settings.sweep, "price": settings.price is not None, "pairs": settings.pairs != PlanArgs.pairs}
    if settings.shapes and (given := [f"--{name}" for name, there in without.items() if there]):
        raise UserError(f"{', '.join(given)} has no effect with --shapes, which knows no time: leave it out")
    check_output("--json", settings.json)


def _changed(config: TrainConfig, settings: PlanArgs, where: Slice) -> TrainConfig:
    for name in ("batch_per_chip", "accumulate", "fsdp", "tensor", "size"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is less than 1")
    if settings.size is not None and settings.size % 8:
        raise UserError(f"--size {settings.size} is no multiple of 8, an autoencoder's factor")
    asked = {name: getattr(settings, name) for name in ("fsdp", "tensor", "strategy", "frozen")}
    mesh = replace(config.mesh, **{name: value for name, value in asked.items() if value is not None})
    remat = {"task": replace(config.task, remat=settings.remat)} if settings.remat else {}
    accumulate = settings.accumulate or config.accumulate
    batch = settings.batch_per_chip * where.chips if settings.batch_per_chip else config.batch_size
    compute = "bfloat16" if config.compute == "auto" else config.compute
    return replace(config, mesh=mesh, accumulate=accumulate, batch_size=batch, compute=compute, **remat)
