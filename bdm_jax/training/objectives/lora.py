"""Training LoRAs (Hu et al., arXiv 2106.09685) of a backbone or a branch, written as kohya's files, which all read.

While it is trained, a LoRA stays beside the layer that it changes, as in peft: y = layer(x) + alpha / rank up(down(x)).
In bfloat16 a weight with a small change merged into it would be the weight as it was.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.errors import UserError
from bdm_jax.formats.files import shown, write_safetensors
from bdm_jax.formats.layouts import to_torch
from bdm_jax.models.config import Config
from bdm_jax.models.convolution import Conv
from bdm_jax.models.functional import Params, abstract, bind
from bdm_jax.plugins.deltas import Delta
from bdm_jax.plugins.lora import LoRA, apply
from bdm_jax.systems.components import Component
from bdm_jax.training.objectives.job import Trees
from bdm_jax.training.objectives.plugin import LoadedSystem, PluginJob, PluginTask
from bdm_jax.training.objectives.remat import rematerialise

ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)"
TEXT_ATTENTION = r"self_attn\.(q|k|v|out)_proj|attention\.(self\.(query|key|value)|output\.dense)"

_PREFIXES = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "branch": "lora_branch",
    "branch_text_encoder": "lora_branch_te",
}
_CHANGED = {
    ("backbone", "unet"): ("unet",),
    ("backbone", "text"): ("text_encoder",),
    ("backbone", "both"): ("unet", "text_encoder"),
    ("branch", "unet"): ("branch",),
    ("branch", "text"): ("branch_text_encoder",),
    ("branch", "both"): ("branch", "branch_text_encoder"),
}


@dataclass(frozen=True)
class LoRATask(PluginTask):
    """Train a LoRA of the backbone, or, for target=branch, of the branch.

    networks: the UNet (the branch), its text tower, or both. rank; alpha: the change is alpha / rank times the product,
    None for alpha = rank. modules, text_modules: regular expressions that the end of a layer's path must match; by
    default the projections of all attentions. Convolutions and other linear layers can be named too.
    """

    target: Literal["backbone", "branch"] = "backbone"
    networks: Literal["unet", "text", "both"] = "unet"
    rank: int = 16
    alpha: float | None = None
    modules: str = ATTENTION
    text_modules: str = TEXT_ATTENTION

    @property
    def on_branch(self) -> bool:
        return self.target == "branch"

    @property
    def changed(self) -> tuple[str, ...]:
        """The networks that get a LoRA."""
        return _CHANGED[self.target, self.networks]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def trained_shapes(self, configs: dict[str, Config]) -> dict[str, Any]:
        """Per network: MODULE.down.kernel (I,r) or (H,W,I,r), MODULE.up.kernel (r,O) or (1,1,r,O)."""
        if self.rank < 1 or not 0 < self.scale < float("inf"):
            raise UserError(f"task.rank={self.rank}, task.alpha={self.alpha}: both must be positive")
        trees = {}
        for part in self.changed:
            shapes = abstract(configs[part])
            trees[f"{part}_lora"] = tree = {}
            for module in self._modules(part, shapes):
                *window, inputs, outputs = shapes[f"{module}.kernel"].shape
                down, up = (*window, inputs, self.rank), (*(1 for _ in window), self.rank, outputs)
                tree[f"{module}.down.kernel"] = jax.ShapeDtypeStruct(down, jnp.float32)
                tree[f"{module}.up.kernel"] = jax.ShapeDtypeStruct(up, jnp.float32)
        return trees

    def make(self, ready: LoadedSystem) -> "LoRAJob":
        configs = {part: getattr(ready.system, part).config for part in self.changed}
        rng = np.random.default_rng(ready.seed)
        draw = lambda path, leaf: _begin(path, leaf.shape, rng)  # noqa: E731
        trees = self.trained_shapes(configs)
        return LoRAJob(
            self, ready, {part: {p: draw(p, leaf) for p, leaf in tree.items()} for part, tree in trees.items()}
        )

    def _modules(self, part: str, shapes: dict[str, Any]) -> list[str]:
        """Paths of the layers that get a LoRA. Raises UserError for an expression that is none, or fits none."""
        text = part.endswith("text_encoder")
        field, pattern = ("text_modules", self.text_modules) if text else ("modules", self.modules)
        try:
            expression = re.compile(rf"(^|\.)({pattern})$")
        except re.error as error:
            raise UserError(f"task.{field}={shown(pattern)}: no regular expression ({error})") from error
        layers = [path.removesuffix(".kernel") for path in shapes if path.endswith(".kernel")]
        if not (found := [layer for layer in layers if expression.search(layer)]):
            raise UserError(f"task.{field}={shown(pattern)}: fits no layer of the {part}, which has {layers[-1]}, ...")
        return found


class LoRAJob(PluginJob):
    """`LoRATask` made ready."""

    def network(self, part, params, frozen):
        if f"{part}_lora" not in params:
            return super().network(part, params, frozen)
        bound = add_lora(bind(self.configs[part], frozen[part]), params[f"{part}_lora"], self.task.scale)
        return rematerialise(bound, "none" if part.endswith("text_encoder") else self.task.remat)

    def pipeline(self, params):
        """With the LoRA merged in."""
        deltas = {}
        for part in self.task.changed:
            tree = params[f"{part}_lora"]
            parts = {module: _halves(module, tree) for module in _modules_of(tree)}
            deltas[part] = {f"{m}.kernel": Delta("lora", halves, self.task.scale) for m, halves in parts.items()}
        networks = {part: getattr(self.system, part).params for part in self.task.changed}
        changed = apply(networks, [(LoRA(deltas, {}, "trained"), 1.0, 1.0)])
        return replace(self.system, **{part: Component(self.configs[part], changed[part]) for part in changed})

    def export(self, params, folder, metadata):
        """`RUN.safetensors` in kohya's layout, by the name of the run's folder, which is its name in web UIs; fp32."""
        folder.mkdir(parents=True, exist_ok=True)
        name, alpha = folder.absolute().parent.name, self.task.scale * self.task.rank
        told = {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.task.rank),
            "ss_network_alpha": f"{alpha:g}",
            "ss_output_name": name,
        }
        tensors = {key: array for part in self.task.changed for key, array in self._kohya(part, params, alpha)}
        write_safetensors(folder / f"{name}.safetensors", tensors, {**told, **metadata})

    def _kohya(self, part: str, params: Trees, alpha: float):
        tree = params[f"{part}_lora"]
        for module in _modules_of(tree):
            halves, key = _halves(module, tree), f"{_PREFIXES[part]}_{module.replace('.', '_')}"
            yield f"{key}.lora_down.weight", halves["down"]
            yield f"{key}.lora_up.weight", halves["up"]
            yield f"{key}.alpha", np.asarray(alpha, np.float32)


def add_lora(bound: nnx.Module, tree: Params, scale: float) -> nnx.Module:
    """The network with LoRAs beside its layers: MODULE.down.kernel and MODULE.up.kernel of `tree`."""
    for module in _modules_of(tree):
        *parents, last = module.split(".")
        holder = bound
        for step in parents:
            holder = holder[int(step)] if step.isdecimal() else getattr(holder, step)
        layer = holder[int(last)] if last.isdecimal() else getattr(holder, last)
        beside = _Beside(layer, tree[f"{module}.down.kernel"], tree[f"{module}.up.kernel"], scale)
        if last.isdecimal():
            holder[int(last)] = beside
        else:
            setattr(holder, last, beside)
    return bound


class _Beside(nnx.Module):
    """A layer and its LoRA; a convolution's first half has its window and stride, the second none."""

    def __init__(self, layer: nnx.Module, down: jax.Array, up: jax.Array, scale: float):
        self.layer, self.scale = layer, scale
        self.down, self.up = nnx.Param(down), nnx.Param(up)

    def __call__(self, x):
        down, up = self.down[...], self.up[...]
        if isinstance(self.layer, Conv):
            stride, padding = (self.layer.stride,) * 2, (self.layer.padding,) * 2
            numbers = ("NHWC", "HWIO", "NHWC")
            narrow, up = jax.lax.conv_general_dilated(x, down, stride, padding, dimension_numbers=numbers), up[0, 0]
        else:
            narrow = x @ down
        return self.layer(x) + (narrow @ up) * self.scale


def _begin(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """As peft and kohya begin: down uniform within 1 / sqrt(fan-in) (torch's own layers), up zero."""
    if path.endswith(".up.kernel"):
        return jnp.zeros(shape, jnp.float32)
    bound = 1 / np.sqrt(np.prod(shape[:-1]))
    return jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32)


def _modules_of(tree: Params) -> list[str]:
    return [path.removesuffix(".down.kernel") for path in tree if path.endswith(".down.kernel")]


def _halves(module: str, tree: Params) -> dict[str, np.ndarray]:
    """In PyTorch's layout: down (r,I[,H,W]), up (O,r[,1,1])."""
    return {
        half: to_torch(f"{module}.kernel", np.asarray(tree[f"{module}.{half}.kernel"]))[1] for half in ("down", "up")
    }
