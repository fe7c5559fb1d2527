"""Values of a config.json, read with care: it may come from anywhere."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

_MOST_LAYERS = 256
_LARGEST = 2**24


def plain(config: Any) -> dict[str, Any]:
    """A config's fields as JSON has them."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def pick(cls: type, values: Mapping[str, Any]) -> Any:
    """The config of a class whose fields are among the values; None and absent ones keep their defaults.

    Raises:
        ValueError: a value is of another kind, or of a size that no network has (named).
    """
    chosen, kinds = {}, get_type_hints(cls)
    for f in fields(cls):
        value = values.get(f.name, MISSING)
        if value is not MISSING and value is not None:
            chosen[f.name] = _value(f.name, value, kinds[f.name])
    return cls(**chosen)


def check(values: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    """Raise ValueError, by name, for a value that is there and is none of those that the networks implement."""
    for key, accepted in fixed.items():
        if key in values and values[key] not in accepted:
            raise ValueError(f"config.json: {key}={values[key]!r} is not implemented (only {accepted[0]!r})")


def _value(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of its kind and of a size that a network may have."""
    listed = isinstance(value, list | tuple)
    kinds = [kind] if get_origin(kind) is tuple or not get_args(kind) else [k for k in get_args(kind) if k != NoneType]
    kind = next((k for k in kinds if listed == (get_origin(k) is tuple)), None)
    if listed:
        if kind is not None and 0 < len(value) <= _MOST_LAYERS:
            return tuple(_value(name, part, get_args(kind)[0]) for part in value)
    elif kind is float and type(value) in (int, float) and 0 < value < _LARGEST:
        return float(value)
    elif kind is int and type(value) is int:
        least = 0 if name.endswith("_token_id") or name == "transformer_layers" else 1
        most = _MOST_LAYERS if "layers" in name or name.endswith("_blocks") else _LARGEST
        if least <= value <= most:
            return value
    elif kind in (bool, str) and type(value) is kind:
        return value
    raise ValueError(f"config.json: {name}={value!r} is not a valid value")
