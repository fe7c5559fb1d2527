"""What would fit in place of a plan that does not: by shapes, so that nothing is compiled for it."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bdm_jax.errors import UserError
from bdm_jax.plan.report import gb
from bdm_jax.plan.shapes import StepShapes, activation_bytes, memory_by_shapes
from bdm_jax.plan.topology import Slice, abstract_mesh
from bdm_jax.runtime.sharding import batch_ways
from bdm_jax.training.config import TrainConfig

# Flags of the command -> a change of the run.
Flags = dict[str, Any]


def advice(config: TrainConfig, where: Slice, shapes: StepShapes, rematerialised: StepShapes | None) -> Iterator[str]:
    """A line for each single change with which the run fits, the smallest of its kind: more parts, fewer images, more
    sharding, rematerialisation (`rematerialised`: the step's shapes with it; None where it has it, or cannot). Where
    none is enough, all of them at once; else a larger slice.
    """
    dtype = config.compute_dtype()
    kept = {False: activation_bytes(shapes, dtype)}
    if rematerialised is not None:
        kept[True] = activation_bytes(rematerialised, dtype)
    chips, per_chip = where.chips, max(config.batch_size // where.chips, 1)
    powers = [2**n for n in range(1, 13)]

    def needed(flags: Flags) -> float:
        """Bytes on a chip; infinite for what the slice cannot do."""
        mesh = replace(config.mesh, data=-1, fsdp=flags.get("fsdp", config.mesh.fsdp))
        batch = flags.get("batch-per-chip", per_chip) * chips if "batch-per-chip" in flags else config.batch_size
        changed = replace(config, mesh=mesh, batch_size=batch, accumulate=flags.get("accumulate", config.accumulate))
        try:
            placed = abstract_mesh(where, mesh)
        except UserError:
            return float("inf")
        if batch % (batch_ways(placed) * changed.accumulate):
            return float("inf")
        remat = "remat" in flags
        return sum(memory_by_shapes(changed, placed, rematerialised if remat else shapes, kept[remat]).values())

    def within(candidates: list[Flags]) -> Iterator[tuple[Flags, float]]:
        return ((flags, size) for flags in candidates if (size := needed(flags)) <= where.chip.hbm)

    kinds: list[list[Flags]] = [
        [{"accumulate": config.accumulate * n} for n in powers if config.accumulate * n <= per_chip],
        [{"batch-per-chip": per_chip // n} for n in powers if per_chip // n],
        [{"fsdp": config.mesh.fsdp * n} for n in powers if config.mesh.fsdp * n <= chips],
        [{"remat": "blocks"}] if True in kept else [],
    ]
    fitting = []
    for kind in kinds:
        fitting += itertools.islice(within(kind), 1)
    if not fitting:
        remat = kinds[3][0] if kinds[3] else {}
        parts, splits = kinds[0] or [{}], kinds[2] or [{}]
        joint = [{**one, **other, **remat} for one in splits for other in parts]
        joint.append({"batch-per-chip": 1, "accumulate": 1, **splits[-1], **remat})
        fitting = [*itertools.islice(within(joint), 1)]
    for flags, size in fitting:
        written = " ".join(f"--{name} {value}" for name, value in flags.items())
        yield f"would fit   {written}: {gb(size)} by shapes"
    if not fitting:
        yield f"would fit   nothing on {where.name}: take a larger slice, or chips with more memory"
