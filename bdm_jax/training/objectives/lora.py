"""Training LoRAs (Hu et al., arXiv 2106.09685) of a backbone or a branch, written as kohya's files, which all read.

While it is trained, a LoRA stays beside the layer that it changes, as in peft: y = layer(x) + alpha / rank up(down(x)).
In bfloat16 a weight with a small change merged into it would be the weight as it was.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.command_line import OptionalModelPath
from bdm_jax.errors import UserError
from bdm_jax.formats.files import shown, write_safetensors
from bdm_jax.formats.layouts import to_jax, to_torch
from bdm_jax.models.convolution import Conv
from bdm_jax.models.functional import Params, abstract, bind
from bdm_jax.plugins.deltas import Delta
from bdm_jax.plugins.lora import LoRA, apply, load_lora
from bdm_jax.systems import families
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.inputs import of_params
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
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.starting import FRESH, Start, check_finite, is_there
from bdm_jax.training.objectives.system import SystemObjective
from bdm_jax.training.sets import Sets

ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)"
TEXT_ATTENTION = r"self_attn\.(q|k|v|out)_proj|attention\.(self\.(query|key|value)|output\.dense)"


@dataclass(frozen=True)
class LoRATask(PluginTask):
    """Train a LoRA of the backbone, or, for target=branch, of the branch.

    networks: the UNet (the branch), its text towers, or both. rank; alpha: the change is alpha / rank times the
    product, None for alpha = rank. modules, text_modules: regular expressions that the end of a layer's path must
    match; by default the projections of all attentions. Convolutions and other linear layers can be named too.
    start_from: a LoRA of this rank, alpha and these layers to train on, in any layout that is read.
    """

    target: Literal["backbone", "branch"] = "backbone"
    networks: Literal["unet", "text", "both"] = "unet"
    rank: int = 16
    alpha: float | None = None
    modules: str = ATTENTION
    text_modules: str = TEXT_ATTENTION
    start_from: OptionalModelPath = None

    @property
    def on_branch(self) -> bool:
        return self.target == "branch"

    @property
    def changed(self) -> tuple[str, ...]:
        """The networks that get a LoRA."""
        denoiser = "branch" if self.on_branch else "unet"
        return {"unet": (denoiser,), "text": self.encoders, "both": (denoiser, *self.encoders)}[self.networks]

    @property
    def scale(self) -> float:
        """What the product of the two halves is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def objective(self, sizes: Sizes) -> SystemObjective:
        """The loss."""
        return system_objective(self, sizes, trained_shapes(self, sizes), NetworksWithLoRA(sizes, self.scale))

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """A LoRA without effect, or the one that it starts from; all networks are loaded and frozen."""
        ready = load_system(self, sets, run, dtype)
        objective = loaded_objective(self.objective(ready.sizes), ready)
        rng = np.random.default_rng(seed)
        begun = _from_file(self, ready.sizes, objective.trained, run)
        params = begun.params or {
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
            Sample(read_moments, texts, self.source),
            partial(_export, self),
            partial(draw_records, pipeline, texts, batch_size=PREVIEWS),
            {**ready.inputs, **begun.inputs},
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

    @property
    def kernel(self):
        """The layer's own, whose type its readers ask for."""
        return self.layer.kernel

    def __call__(self, x):
        down, up = (half[...].astype(x.dtype) for half in (self.down, self.up))
        if isinstance(self.layer, Conv):
            stride, padding = (self.layer.stride,) * 2, (self.layer.padding,) * 2
            numbers = ("NHWC", "HWIO", "NHWC")
            narrow, up = jax.lax.conv_general_dilated(x, down, stride, padding, dimension_numbers=numbers), up[0, 0]
        else:
            narrow = x @ down
        return self.layer(x) + (narrow @ up) * self.scale


def _modules(task: LoRATask, name: str, shapes: dict[str, Any]) -> list[str]:
    """Paths of the layers that get a LoRA. Raises UserError for an expression that is none, or fits none."""
    text = families.tokenizer_of(name) is not None
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
    prefixes = {part: task.row.parts[part].lora[0] for part in task.changed}
    tensors = {key: array for part, front in prefixes.items() for key, array in _kohya(part, front, params, alpha)}
    write_safetensors(folder / f"{name}.safetensors", tensors, {**values, **metadata})


def _kohya(name: str, prefix: str, params: Trees, alpha: float) -> Iterator[tuple[str, np.ndarray]]:
    tree = params[f"{name}_lora"]
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


def _from_file(task: LoRATask, sizes: Sizes, trained: dict[str, Any], run: Path) -> Start:
    """The LoRA that it starts from, which must be what the task trains: its kind, rank, alpha and layers.

    Raises UserError that says where it is not, `load_lora`'s among them.
    """
    path = task.start_from
    if not is_there(path, run):
        return FRESH
    found = load_lora(path, {name: abstract(sizes[name]) for name in task.changed})
    params: Trees = {}
    for name in task.changed:
        tree: Params = {}
        for kernel, delta in found.deltas.get(name, {}).items():
            module = kernel.removesuffix(".kernel")
            if delta.kind != "lora" or delta.axis is not None or delta.parts.keys() != {"up", "down"}:
                raise UserError(f"{path}: {module}: no plain LoRA of two matrices, which alone is trained here")
            if (rank := len(delta.parts["down"])) != task.rank:
                raise UserError(f"{path}: {module} is of rank {rank}, task.rank={task.rank}: give --task.rank {rank}")
            if not np.isclose(delta.scale, task.scale):
                alpha = f"{delta.scale * rank:g}"
                raise UserError(f"{path}: its alpha is {alpha}, the task's {task.scale * rank:g}: --task.alpha {alpha}")
            for half, array in delta.parts.items():
                tree[f"{module}.{half}.kernel"] = jnp.asarray(to_jax(f"{half}.weight", array)[1], jnp.float32)
        wanted = trained[f"{name}_lora"]
        if odd := sorted(_modules_of({**tree, **wanted}.keys() - (tree.keys() & wanted.keys()))):
            field = "text_modules" if families.tokenizer_of(name) else "modules"
            has = "trains" if f"{odd[0]}.down.kernel" in wanted else "does not train"
            raise UserError(f"{path}: {len(odd)} layers of the {name} differ: task.{field} {has} {odd[0]}")
        params[f"{name}_lora"] = {path: tree[path].reshape(leaf.shape) for path, leaf in wanted.items()}
    check_finite(path, params)
    digests = {f"start_from.{name}": of_params(tree, path) for name, tree in params.items()}
    return Start(params, digests)


def _modules_of(tree: Iterable[str]) -> list[str]:
    return [path.removesuffix(".down.kernel") for path in tree if path.endswith(".down.kernel")]


def _halves(module: str, tree: Params) -> dict[str, np.ndarray]:
    """In PyTorch's layout: down (r,I[,H,W]), up (O,r[,1,1])."""
    return {
        half: to_torch(f"{module}.kernel", np.asarray(tree[f"{module}.{half}.kernel"]))[1] for half in ("down", "up")
    }
