"""Blends of backbones, as the communities merge checkpoints: weighted sums, and differences added."""

from collections.abc import Mapping

import jax.numpy as jnp

from bdm_jax.errors import UserError
from bdm_jax.systems.components import Component


def weighted_sum(one: Component, other: Component, weight: float, name: str = "blend") -> Component:
    """(1 - weight) one + weight other, in fp32, rounded once to the type of `one`. Raises UserError for other sizes."""
    return _combine(name, one, other, lambda a, b: (1 - weight) * a + weight * b)


def add_difference(one: Component, other: Component, base: Component, weight: float, name: str = "blend") -> Component:
    """one + weight (other - base): what was trained into `other`, starting from `base`, added to `one`."""
    difference = _combine(name, other, base, lambda a, b: a - b, keep_type=False)
    return _combine(name, one, difference, lambda a, d: a + weight * d)


def _combine(name: str, one: Component, other: Component, rule, keep_type: bool = True) -> Component:
    if misfit := _misfit(one.params, other.params):
        raise UserError(f"{name}: networks of other sizes cannot be blended ({misfit})")
    tree = {}
    for path, value in one.params.items():
        result = rule(value.astype(jnp.float32), other.params[path].astype(jnp.float32))
        tree[path] = result.astype(value.dtype) if keep_type else result
    return Component(one.config, tree)


def _misfit(one: Mapping, other: Mapping) -> str | None:
    """The first weight of another shape, or how many only one of the two has."""
    if single := sorted(one.keys() ^ other.keys()):
        more = f" and {len(single) - 1} more are" if single[1:] else " is"
        return f"{single[0]}{more} in one of them only"
    path = next((path for path in sorted(one) if one[path].shape != other[path].shape), None)
    return path and f"{path} is {one[path].shape} in one, {other[path].shape} in the other"
