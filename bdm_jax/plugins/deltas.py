"""What the LoRA family adds to one weight: shapes first, then the formula, in PyTorch's layouts and fp32.

Every kind but OFT is linear in its strength m, W' = W + m D(W), so that D is all there is to it:

    LoRA, LoCon   s up @ down                          (convolutions by flattening; Tucker with a core, `mid`)
    LoHa          s (w1_a @ w1_b) * (w2_a @ w2_b)      (elementwise; Tucker with cores t1, t2)
    LoKr          s kron(w1, w2)                       (either may be a product; w2 Tucker with t2)
    DoRA          magnitude (W + D) / |W + D| - W      (D any of the above; the norm per output or per input)
    GLoRA         s (W a1 a2 + b1 b2)                  (its first releases had 1 and 2 the other way round)
    IA3           l W or (l - 1) W                     (LyCORIS' l starts at 0, peft's at 1)
    full, norm    the difference itself
    OFT           R W - W                              (R of rotations (I + Q)(I - Q)^-1, Q = B - B^T, in blocks)

with s = alpha / rank, or alpha / sqrt(rank). Sources: LyCORIS 4.1 and peft 0.21, whose forward passes the tests repeat.
DoRA between strength 0 and 1 is the straight line between both ends, as in ComfyUI and A1111; LyCORIS' own multiplier
scales the magnitude only, and at 0 does not give W back. OFT's R, kohya's and LyCORIS', is one block-diagonal matrix
(oft_blocks of three axes) or a butterfly of several (BOFT, four axes); at strength m each is I + m (R - I), as in
LyCORIS, and `rescale` is 1 + m (rescale - 1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

Array = Any  # NumPy's or JAX's
Shape = tuple[int, ...]

_FACTORS = {
    "lora": ("up", "down", "mid"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "glora": ("a1", "a2", "b1", "b2", "bm"),
    "oft": ("oft_blocks", "rescale"),
    "full": ("diff",),
}


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["kind", "scale", "axis"])
@dataclass(frozen=True)
class Delta:
    """The change of one weight, of any kind.

    Attributes:
      kind: lora, loha, lokr, glora, oft, full or ia3.
      parts: the factors by name, in the file's dtypes.
      scale: of their product, of OFT's Q; what is added to IA3's values.
      axis: of DoRA's magnitude or IA3's values: 0 per output, 1 per input; else None.
    """

    kind: str
    parts: Mapping[str, Array]
    scale: float = 1.0
    axis: int | None = None


def is_nothing(parts: Mapping[str, np.ndarray]) -> bool:
    """Whether they are a pair of rank 0, as trainers that choose ranks leave behind."""
    factors = {name: array for name, array in parts.items() if name not in ("alpha", "scalar", "mid")}
    if factors.keys() != {"up", "down"}:
        return False
    return factors["up"].shape[1:2] == (0,) == factors["down"].shape[:1]


def make(parts: Mapping[str, np.ndarray], shape: Shape, settings: Mapping[str, Any] | None = None) -> Delta:
    """The change of a weight of this shape (PyTorch's order) from the parts that a file has for it.

    `settings`, of a peft config for this module: `alpha`, `r`, `use_rslora`. Raises ValueError, in words that follow a
    module's name, for parts that are incomplete, of several kinds, or do not fit the shape: nothing is multiplied
    before the product is known to have it.
    """
    parts, settings = dict(parts), settings or {}
    alpha, scalar = (_number(name, parts.pop(name, None)) for name in ("alpha", "scalar"))
    marks = [name for name in ("dora_scale", "magnitude") if name in parts]
    magnitude = {name: parts.pop(name) for name in marks}
    kinds = [kind for kind, names in _FACTORS.items() if any(name in parts for name in names)]
    if len(kinds) != 1 or len(marks) > 1:
        raise ValueError(f"has {', '.join(sorted({*parts, *marks})) or 'alpha'}, which make no change")
    kind = kinds[0]
    if strange := sorted({*parts, *(marks if kind in ("glora", "oft") else ())} - set(_FACTORS[kind])):
        raise ValueError(f"has {strange[0]} beside {kind}'s parts")
    if kind == "glora":
        parts = _in_order(parts, shape)
    rank = _CHECKS[kind](parts, _core(shape))
    if kind == "oft":
        return Delta(kind, parts, _constraint(parts["oft_blocks"], alpha, shape))
    if alpha is None or alpha == 0:
        alpha = settings.get("alpha")
    if kind == "full" or rank is None and not settings:
        scale = 1.0
    else:
        rank = rank or settings.get("r") or 1
        scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    scale *= 1.0 if scalar is None else scalar
    if not abs(scale) < 1e9:
        raise ValueError(f"has an alpha that makes its scale {scale:g}")
    axis = None
    for name, array in magnitude.items():
        axis = _magnitude_axis(name, array.shape, shape)
        parts["magnitude"] = array.reshape([shape[axis] if i == axis else 1 for i in range(len(shape))])
    return Delta(kind, parts, scale, axis)


def make_ia3(vector: np.ndarray, shape: Shape, on_input: bool | None, one: bool) -> Delta:
    """IA3's change of a weight, or of a bias: `one` says that the vector starts at 1 (peft's), not at 0 (LyCORIS').

    `on_input` None: its shape tells, (1, in) or (out, 1) for a linear layer, as peft writes it. Raises ValueError.
    """
    if on_input is None and len(shape) == 4 and shape[0] == shape[1]:
        raise ValueError("has IA3 values of which only a peft config says whether they are of inputs or outputs")
    if on_input is None:
        on_input = len(shape) > 1 and vector.ndim > 1 and vector.shape[0] == 1 and vector.shape[1] == shape[1]
    axis = 1 if on_input and len(shape) > 1 else 0
    if vector.size != shape[axis]:
        raise ValueError(f"has {vector.size} IA3 values for {shape[axis]} {'inputs' if axis else 'outputs'}")
    values = vector.reshape([shape[axis] if i == axis else 1 for i in range(len(shape))])
    return Delta("ia3", {"vector": values}, -1.0 if one else 0.0, axis)


def change(delta: Delta, weight: Array, strength: Array | float = 1.0, xp: Any = np) -> Array:
    """strength x D(W) for a weight in fp32 and PyTorch's layout, likewise; `xp` is jax.numpy in a compiled program."""
    parts = {name: xp.asarray(array).astype(np.float32) for name, array in delta.parts.items()}
    if delta.kind == "ia3":
        return weight * ((parts["vector"] + np.float32(delta.scale)) * xp.float32(strength))
    if delta.kind == "oft":
        return _oft(parts, weight, xp.float32(strength), xp.float32(delta.scale), xp)
    if delta.kind == "glora":
        return _glora(parts, weight, xp.float32(delta.scale * strength), xp)
    # Numbers go into a factor, not into the product, which may be a hundred times larger.
    first = next(name for name in _FACTORS[delta.kind] if name in parts)
    parts[first] = parts[first] * xp.float32(delta.scale * (strength if delta.axis is None else 1))
    product = _PRODUCTS[delta.kind](parts, _core(weight.shape), xp).reshape(weight.shape)
    if delta.axis is None:
        return product
    changed = weight + product
    others = tuple(i for i in range(weight.ndim) if i != delta.axis)
    norm = xp.sqrt((changed * changed).sum(others, keepdims=True)) + np.finfo(np.float32).eps
    return (changed * (parts["magnitude"] / norm) - weight) * xp.float32(strength)


def _core(shape: Shape) -> Shape:
    """A shape without a 1x1 window: a linear layer and a 1x1 convolution are the same."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def _number(name: str, array: np.ndarray | None) -> float | None:
    if array is None:
        return None
    if array.size != 1 or not math.isfinite(value := float(array.reshape(()).astype(np.float64))):
        raise ValueError(f"has a {name} that is not one finite number")
    return value


def _need(parts: Mapping[str, np.ndarray], *names: str) -> list[Shape]:
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"lacks {missing[0]}")
    for name in names:
        if parts[name].size == 0 or parts[name].ndim < 2:
            raise ValueError(f"has {name} of shape {parts[name].shape}")
    return [_core(parts[name].shape) for name in names]


def _fits(fit: bool, parts: Mapping[str, np.ndarray], shape: Shape) -> None:
    if not fit:
        found = ", ".join(f"{name} {array.shape}" for name, array in parts.items())
        raise ValueError(f"has {found}, which do not make {shape}")


def _check_lora(parts: Mapping[str, np.ndarray], shape: Shape) -> int:
    up, down = _need(parts, "up", "down")
    rank = down[0]
    if "mid" in parts:
        (mid,) = _need(parts, "mid")
        fit = len(shape) > 2 and up == (shape[0], mid[0]) and mid[2:] == shape[2:] and down == (mid[1], shape[1])
    else:
        fit = len(shape) > 1 and up == (shape[0], rank) and down == (rank, *shape[1:])
    _fits(fit, parts, shape)
    return rank


def _check_loha(parts: Mapping[str, np.ndarray], shape: Shape) -> int:
    factors = _need(parts, *_FACTORS["loha"][:4])
    cores = _need(parts, "hada_t1", "hada_t2") if "hada_t1" in parts or "hada_t2" in parts else [None, None]
    for (a, b), core in zip((factors[:2], factors[2:]), cores, strict=True):
        _fits(len(shape) > 1 and _makes(a, b, core, shape), parts, shape)
    return factors[1][0]


def _makes(a: Shape, b: Shape, core: Shape | None, shape: Shape) -> bool:
    """Whether a @ b, or the Tucker product of both with a core, has the shape."""
    if core is None:
        return len(a) == 2 and a == (shape[0], b[0]) and math.prod(b[1:]) == math.prod(shape[1:])
    return core[2:] == shape[2:] and a == (core[0], shape[0]) and b == (core[1], shape[1])


def _check_lokr(parts: Mapping[str, np.ndarray], shape: Shape) -> int | None:
    """The rank; None where both sides are whole."""
    if len(shape) < 2:
        _fits(False, parts, shape)
    rank = None
    if "lokr_w1" in parts:
        (small,) = _need(parts, "lokr_w1")
    else:
        a, b = _need(parts, "lokr_w1_a", "lokr_w1_b")
        _fits(len(a) == len(b) == 2 and a[1] == b[0], parts, shape)
        small, rank = (a[0], b[1]), b[0]
    flat = len(small) == 2 and _is_flat(parts, small, shape)
    shape = (shape[0], math.prod(shape[1:])) if flat else shape
    _fits(len(small) == 2 and shape[0] % small[0] == 0 and shape[1] % small[1] == 0, parts, shape)
    large = (shape[0] // small[0], shape[1] // small[1], *shape[2:])
    if "lokr_w2" in parts:
        _fits(_need(parts, "lokr_w2")[0] == large, parts, shape)
    else:
        a, b = _need(parts, "lokr_w2_a", "lokr_w2_b")
        core = _need(parts, "lokr_t2")[0] if "lokr_t2" in parts else None
        _fits(_makes(a, b, core, large), parts, shape)
        rank = rank or b[0]
    if both := [name for name in ("lokr_w1", "lokr_w2") if name in parts and f"{name}_a" in parts]:
        raise ValueError(f"has {both[0]} both whole and in factors")
    return rank


def _is_flat(parts: Mapping[str, np.ndarray], small: Shape, shape: Shape) -> bool:
    """Whether the product is of a convolution that is taken for a matrix, as LyCORIS' early files have it."""
    if len(shape) < 3 or "lokr_t2" in parts:
        return False
    return parts["lokr_w2"].ndim == 2 if "lokr_w2" in parts else shape[1] % small[1] != 0


def _in_order(parts: Mapping[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
    """GLoRA's parts as they are called now: a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in)."""
    a1, a2, b1, b2 = _need(parts, "a1", "a2", "b1", "b2")
    turned = len(shape) == 2 and b2 == (shape[0], b1[0]) and a2 == (shape[1], a1[0]) and b1 != (shape[0], b2[0])
    names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"} if turned else {}
    return {name: parts[names.get(name, name)] for name in parts}


def _check_glora(parts: Mapping[str, np.ndarray], shape: Shape) -> int:
    a1, a2, b1, b2 = _need(parts, "a1", "a2", "b1", "b2")
    rank = a2[0]
    fit = len(shape) > 1 and a1 == (shape[1], rank) and a2 == (rank, shape[1]) and b1 == (shape[0], rank)
    _fits(fit and (len(shape) > 2 if "bm" in parts else b2 == (rank, *shape[1:])), parts, shape)
    if "bm" in parts:
        _fits(_need(parts, "bm")[0] == (rank, rank, *shape[2:]) and b2 == (rank, shape[1]), parts, shape)
    return rank


def _check_oft(parts: Mapping[str, np.ndarray], shape: Shape) -> None:
    """No more is in memory than blocks of which the file has all, none larger than the weight is long."""
    _need(parts, "oft_blocks")
    blocks = parts["oft_blocks"].shape
    fit = len(shape) > 1 and len(blocks) in (3, 4) and blocks[-1] == blocks[-2] > 0
    _fits(fit and blocks[-3] * blocks[-1] == shape[0], parts, shape)
    if len(blocks) == 4:  # level i mixes what lies 2^i half blocks apart
        widest = blocks[-1] << min(blocks[0] - 1, 64)
        _fits(blocks[0] > 0 and blocks[-1] % 2 == 0 and shape[0] % widest == 0, parts, shape)
    if "rescale" in parts:
        _fits(parts["rescale"].size == shape[0], parts, shape)


def _constraint(blocks: np.ndarray, alpha: float | None, shape: Shape) -> float:
    """What Q is multiplied by so that its norm is at most alpha times the outputs. No alpha is no constraint."""
    if alpha is None or alpha <= 0:
        return 1.0
    blocks = np.asarray(blocks, np.float32)
    norm = float(np.linalg.norm(blocks - np.swapaxes(blocks, -1, -2))) + 1e-8
    return min(1.0, alpha * shape[0] / norm)


def _check_full(parts: Mapping[str, np.ndarray], shape: Shape) -> None:
    _fits(_core(parts["diff"].shape) == shape, parts, shape)


def _magnitude_axis(name: str, found: Shape, shape: Shape) -> int:
    """LyCORIS writes (out, 1, ..), before 2025 (1, in, ..); peft (out,), for convolutions (1, out, 1, 1)."""
    size, across = math.prod(found), len(found) > 1 and found[0] == 1
    if (
        len(shape) > 1
        and across
        and size == shape[1]
        and not (name == "magnitude" and len(found) == 4 and size == shape[0])
    ):
        return 1
    if size == shape[0] and (not across or name == "magnitude"):
        return 0
    raise ValueError(f"has {name} of shape {found} for a weight of shape {shape}")


def _lora(parts: Mapping[str, Array], shape: Shape, xp: Any) -> Array:
    up, down = _flat(parts["up"]), _flat(parts["down"])
    return _tucker(parts["mid"], up.T, down, xp) if "mid" in parts else _matrix(up, down, shape, xp)


def _loha(parts: Mapping[str, Array], shape: Shape, xp: Any) -> Array:
    first = _pair(parts, "hada_w1_a", "hada_w1_b", "hada_t1", shape, xp)
    return first * _pair(parts, "hada_w2_a", "hada_w2_b", "hada_t2", shape, xp)


def _lokr(parts: Mapping[str, Array], shape: Shape, xp: Any) -> Array:
    small = _flat(parts["lokr_w1"]) if "lokr_w1" in parts else _flat(parts["lokr_w1_a"]) @ _flat(parts["lokr_w1_b"])
    if _is_flat(parts, small.shape, shape):
        shape = (shape[0], math.prod(shape[1:]))
    large = (shape[0] // small.shape[0], shape[1] // small.shape[1], *shape[2:])
    second = parts["lokr_w2"] if "lokr_w2" in parts else _pair(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2", large, xp)
    return xp.kron(small.reshape(*small.shape, *(1,) * (len(shape) - 2)), second.reshape(large))


def _glora(parts: Mapping[str, Array], weight: Array, scale: Any, xp: Any) -> Array:
    shape = _core(weight.shape)
    changed = xp.einsum("oi...,ir->or...", weight, _flat(parts["a1"]) * scale)
    changed = xp.einsum("or...,ri->oi...", changed, _flat(parts["a2"]))
    up, down = _flat(parts["b1"]) * scale, _flat(parts["b2"])
    added = _tucker(parts["bm"], up.T, down, xp) if "bm" in parts else _matrix(up, down, shape, xp)
    return changed + added.reshape(weight.shape)


def _oft(parts: Mapping[str, Array], weight: Array, strength: Any, scale: Any, xp: Any) -> Array:
    blocks = parts["oft_blocks"]
    count, size = blocks.shape[-3:-1]
    q = (blocks - xp.swapaxes(blocks, -1, -2)) * scale
    eye = xp.eye(size, dtype=np.float32)
    turn = (xp.linalg.solve(eye - q, eye + q) - eye) * strength  # both factors commute
    rows = weight.reshape(len(weight), -1)
    if blocks.ndim == 3:
        piled = rows.reshape(count, size, -1)
        rows = (piled + xp.einsum("knm,kni->kmi", turn, piled)).reshape(rows.shape)
    else:
        for level in range(len(blocks)):
            apart = (size // 2) << level
            piled = xp.swapaxes(rows.reshape(-1, 2, apart, rows.shape[1]), 1, 2).reshape(count, size, -1)
            piled = piled + xp.einsum("kij,kjn->kin", turn[level], piled)
            rows = xp.swapaxes(piled.reshape(-1, apart, 2, rows.shape[1]), 1, 2).reshape(rows.shape)
    if "rescale" in parts:
        rows = rows * (1 + strength * (parts["rescale"].reshape(-1, 1) - 1))
    return rows.reshape(weight.shape) - weight


def _full(parts: Mapping[str, Array], shape: Shape, xp: Any) -> Array:
    return parts["diff"]


def _pair(parts: Mapping[str, Array], a: str, b: str, core: str, shape: Shape, xp: Any) -> Array:
    if core in parts:
        return _tucker(parts[core], _flat(parts[a]), _flat(parts[b]), xp).reshape(shape)
    return _matrix(_flat(parts[a]), _flat(parts[b]), shape, xp)


def _matrix(a: Array, b: Array, shape: Shape, xp: Any) -> Array:
    """a @ b in PyTorch's order of axes, but in memory as our weights, outputs innermost: sums of both are fast."""
    return xp.moveaxis((b.T @ a.T).reshape(*shape[1:], shape[0]), -1, 0)


def _flat(array: Array) -> Array:
    return array.reshape(array.shape[0], -1)


def _tucker(core: Array, a: Array, b: Array, xp: Any) -> Array:
    """sum_pq core[p, q, ...] a[p, out] b[q, in], one factor after the other: nothing larger than the result's kind."""
    core = core.reshape(*core.shape[:2], *(core.shape[2:] or (1, 1)))
    return xp.einsum("pihw,po->oihw", xp.einsum("pqhw,qi->pihw", core, b), a)


_CHECKS = {
    "lora": _check_lora,
    "loha": _check_loha,
    "lokr": _check_lokr,
    "glora": _check_glora,
    "oft": _check_oft,
    "full": _check_full,
}
_PRODUCTS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}
