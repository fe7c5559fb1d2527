"""Training LoRAs (Hu et al., arXiv 2106.09685) of a backbone or a branch, written as kohya's files, which all read.

While it is trained, a LoRA stays beside the layer that it changes, as in peft: y = layer(x) + alpha / rank up(down(x)).
In bfloat16 a weight with a small change merged into it would be the weight as it was.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.errors import UserError
from bdm_jax.formats.files import shown, write_safetensors
from bdm_jax.formats.layouts import to_torch
from bdm_jax.models.convolution import Conv
from bdm_jax.models.functional import Params, abstract, bind
from bdm_jax.plugins.deltas import Delta
from bdm_jax.plugins.lora import LoRA, apply
from bdm_jax.systems import families
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.objectives.backbone import sample
from bdm_jax.training.objectives.objective import Sizes, Training, Trees
from bdm_jax.training.objectives.plugin import (
    PREVIEWS,
    PluginTask,
    load_system,
    loaded_objective,
    plugin_captions,
    system_objective,
)
from bdm_jax.training.objectives.preview import draw_records
from bdm_jax.training.objectives.system import TEXT_ENCODER, SystemObjective
from bdm_jax.training.sets import Sets

ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)"
TEXT_ATTENTION = r"self_attn\.(q|k|v|out)_proj|attention\.(self\.(query|key|value)|output\.dense)"


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
        denoiser, text_encoder = "branch" if self.on_branch else "unet", TEXT_ENCODER[self.source]
        return {"unet": (denoiser,), "text": (text_encoder,), "both": (denoiser, text_encoder)}[self.networks]

    @property
    def scale(self) -> float:
        """What the product of the two halves is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def objective(self, sizes: Sizes) -> SystemObjective:
        """The loss."""
        return system_objective(self, sizes, trained_shapes(self, sizes), NetworksWithLoRA(sizes, self.scale))

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """A LoRA without effect; all networks are loaded and frozen."""
        ready = load_system(self, sets, run, dtype)
        objective = loaded_objective(self.objective(ready.sizes), ready)
        rng = np.random.default_rng(seed)
        params = {
            name: {path: _begin(path, leaf.shape, rng) for path, leaf in tree.items()}
            for name, tree in objective.trained.items()
        }
        texts = plugin_captions(self, ready)
        pipeline = partial(merged, ready.drawing({}), self.changed, self.scale)
        return Training(
            objective,
            params,
            ready.frozen,
            ready.parts,
            partial(sample, texts, self.source),
            partial(_export, self),
            partial(draw_records, pipeline, texts, batch_size=PREVIEWS),
        )


@dataclass(frozen=True)
class NetworksWithLoRA:
    """Frozen networks with the trained LoRAs beside their layers."""

    sizes: Sizes
    scale: float

    def __call__(self, name: str, params: Trees, frozen: dict) -> nnx.Module:
        """See `Binding`."""
        bound = bind(self.sizes[name], frozen[name])
        return add_lora(bound, params[f"{name}_lora"], self.scale) if f"{name}_lora" in params else bound


def trained_shapes(task: LoRATask, sizes: Sizes) -> dict[str, Any]:
    """Per network: MODULE.down.kernel (I,r) or (H,W,I,r), MODULE.up.kernel (r,O) or (1,1,r,O)."""
    if task.rank < 1 or not 0 < task.scale < float("inf"):
        raise UserError(f"task.rank={task.rank}, task.alpha={task.alpha}: both must be positive")
    trees = {}
    for name in task.changed:
        shapes = abstract(sizes[name])
        trees[f"{name}_lora"] = tree = {}
        for module in _modules(task, name, shapes):
            *window, inputs, outputs = shapes[f"{module}.kernel"].shape
            down, up = (*window, inputs, task.rank), (*(1 for _ in window), task.rank, outputs)
            tree[f"{module}.down.kernel"] = jax.ShapeDtypeStruct(down, jnp.float32)
            tree[f"{module}.up.kernel"] = jax.ShapeDtypeStruct(up, jnp.float32)
    return trees


def merged(system: BridgePipeline, changed: tuple[str, ...], scale: float, params: Trees) -> BridgePipeline:
    """The system with the LoRA merged in."""
    deltas = {}
    for name in changed:
        tree = params[f"{name}_lora"]
        halves = {module: _halves(module, tree) for module in _modules_of(tree)}
        deltas[name] = {f"{module}.kernel": Delta("lora", both, scale) for module, both in halves.items()}
    networks = {name: system.networks[name].params for name in changed}
    result = apply(networks, [(LoRA(deltas, {}, "trained"), 1.0, 1.0)])
    return system.replace(**{name: Component(system.networks[name].config, result[name]) for name in result})


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


def _modules(task: LoRATask, name: str, shapes: dict[str, Any]) -> list[str]:
    """Paths of the layers that get a LoRA. Raises UserError for an expression that is none, or fits none."""
    text = name.endswith("text_encoder")
    field, pattern = ("text_modules", task.text_modules) if text else ("modules", task.modules)
    try:
        expression = re.compile(rf"(^|\.)({pattern})$")
    except re.error as error:
        raise UserError(f"task.{field}={shown(pattern)}: no regular expression ({error})") from error
    layers = [path.removesuffix(".kernel") for path in shapes if path.endswith(".kernel")]
    if not (found := [layer for layer in layers if expression.search(layer)]):
        raise UserError(f"task.{field}={shown(pattern)}: fits no layer of the {name}, which has {layers[-1]}, ...")
    return found


def _export(task: LoRATask, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """`RUN.safetensors` in kohya's layout, by the name of the run's folder, which is its name in web UIs; fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    name, alpha = folder.absolute().parent.name, task.scale * task.rank
    values = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(task.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": name,
    }
    tensors = {key: array for part in task.changed for key, array in _kohya(part, params, alpha)}
    write_safetensors(folder / f"{name}.safetensors", tensors, {**values, **metadata})


def _kohya(name: str, params: Trees, alpha: float) -> Iterator[tuple[str, np.ndarray]]:
    tree, prefix = params[f"{name}_lora"], families.part(name).lora[0]
    for module in _modules_of(tree):
        halves, key = _halves(module, tree), f"{prefix}{module.replace('.', '_')}"
        yield f"{key}.lora_down.weight", halves["down"]
        yield f"{key}.lora_up.weight", halves["up"]
        yield f"{key}.alpha", np.asarray(alpha, np.float32)


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
