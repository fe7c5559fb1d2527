"""Lines for people."""

from collections.abc import Iterator

from bdm_jax.plan.estimate import Plan
from bdm_jax.plan.shapes import StepShapes
from bdm_jax.plan.topology import Slice
from bdm_jax.training.config import TrainConfig


def report(plan: Plan, pairs: float, price: float | None = None) -> Iterator[str]:
    """Of a plan, with the days, and the cost at `price` a chip-hour, of a training of `pairs` images."""
    where, program, clock = plan.where, plan.program, plan.time
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    yield f"{where.name}: {where.chips} chips {where.chip.name}, {mesh}"
    parts = f", in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    yield f"batch       {plan.batch_size} images, {plan.batch_per_chip:g} per chip{parts}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"memory      {gb(program.total)} of {gb(where.chip.hbm)} per chip: {verdict}"
    if program.needed is not None:
        return
    for name, size in program.memory.items():
        note = f" (train state {gb(plan.state)})" if name == "arguments" else ""
        yield f"            {name:12} {gb(size):>10}{note}"
    per_image = program.flops / plan.batch_per_chip / 1e12
    ratio = per_image * 1e12 / plan.counted
    counted = f"{per_image:.3f} TFLOP per image by the compiler, {plan.counted / 1e12:.3f} needed"
    yield f"FLOPs       {counted} ({ratio:.1%})"
    yield f"HBM         {gb(program.hbm_bytes)} moved per step"
    for one in program.collectives:
        if one.sent:
            count = f"{one.count} x {one.kind}"
            yield f"collective  {count:24} of {one.group:4} chips: {gb(one.bytes):>10}, sent {gb(one.sent)}"
    yield f"roofline    compute {_ms(clock.compute)}, memory {_ms(clock.memory)}, between chips {_ms(clock.traffic)}"
    planned = f"{_ms(clock.planned)} planned at {where.chip.achievable_mfu:.0%}"
    yield f"step        {_ms(clock.floor)} at best ({clock.bound}), {planned}"
    speed = plan.images_per_second()
    yield f"speed       {speed:,.0f} images/s, {speed / where.chips:.1f} per chip (planned)"
    hours = pairs / speed / 3600
    cost = f", {hours * where.chips * price:,.0f} at {price:g} each" if price else ""
    yield f"{pairs:.3g} pairs   {hours / 24:.1f} days, {hours * where.chips:,.0f} chip-hours{cost}"


def sweep_report(rows: list[Plan], pairs: float) -> Iterator[str]:
    """A table of estimated plans."""
    yield "\nestimated from this compilation (zero1, one part):"
    yield "fsdp  per chip  memory     images/s        days"
    for row in rows:
        days = pairs / row.images_per_second() / 86400
        speed = f"{row.images_per_second():10,.0f}  {days:8.1f}" if row.fits else "  does not fit"
        yield f"{row.mesh['fsdp']:4}  {row.batch_per_chip:8g}  {gb(row.program.total):>9}  {speed}"


def shapes_report(
    config: TrainConfig, where: Slice, mesh: dict[str, int], shapes: StepShapes, memory: dict[str, int]
) -> Iterator[str]:
    """Bytes per chip by shapes; see `shapes.memory_by_shapes`."""
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
    yield f"{where.name}: {where.chips} chips {where.chip.name}, {sizes}, {config.mesh.strategy}, not compiled"
    for kind, trees in (("trained", shapes.trained), ("frozen", shapes.frozen)):
        for name, tree in trees.items():
            if isinstance(tree, dict):
                yield f"{kind:11} {name:20} {sum(leaf.size for leaf in tree.values()):>14,} parameters"
    per_chip = config.batch_size / where.chips
    parts = f", in {config.accumulate} parts" if config.accumulate > 1 else ""
    yield f"batch       {config.batch_size} images, {per_chip:g} per chip{parts}"
    total = sum(memory.values())
    verdict = "fits" if total <= where.chip.hbm else "DOES NOT FIT"
    if total > where.chip.hbm >= total - memory["activations"]:
        verdict = "may not fit (activations are an upper bound: compile the step to know, or lower --batch-per-chip)"
    yield f"memory      {gb(total)} of {gb(where.chip.hbm)} per chip: {verdict}"
    for name, size in memory.items():
        yield f"            {name:12} {gb(size):>10}{' at most' if name == 'activations' else ''}"


def gb(size: float) -> str:
    """Bytes in 10^9."""
    return f"{size / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
