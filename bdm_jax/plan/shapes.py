"""A run's step from shapes alone: nothing is loaded, allocated or computed. What it costs can be counted, and it can be
lowered for devices that are not here (`bdm_jax.plan`).
"""

import dataclasses
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json
from bdm_jax.models.config import (
    BDM_BRANCH,
    CHINESE_CLIP_H_TEXT,
    CLIP_L_TEXT,
    SD15_UNET,
    SD15_VAE,
    Config,
    EncoderConfig,
)
from bdm_jax.models.config import from_json as network_sizes
from bdm_jax.models.functional import abstract
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.runtime.costs import flops, pretend_platform
from bdm_jax.runtime.sharding import bytes_per_device
from bdm_jax.systems.components import Component
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.config import TrainConfig
from bdm_jax.training.digests import leaves
from bdm_jax.training.objectives.branch import BackboneJob, BackboneTask, BranchJob, BranchTask, VAEJob, VAETask
from bdm_jax.training.objectives.job import Objective
from bdm_jax.training.state import abstract_state, make_optimizer, make_step, state_sharding

_CHINESE_TOKENS = 52  # where the run's tokenizer is not here: BDM's length


def lower(config: TrainConfig, mesh: Mesh, size: int = 512) -> Any:
    """The run's step, of shapes, as `jax.jit(...).lower` returns it, for a mesh of whatever devices."""
    config = replace(config, compute="bfloat16") if config.compute == "auto" else config
    job, trained, frozen, row = abstract_job(config.task, config.compute_dtype(), size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(trained, optimizer)
    batch = {name: _shape((config.batch_size, *leaf.shape), leaf.dtype) for name, leaf in row.items()}
    with pretend_platform(mesh.devices.flat[0].platform), jax.set_mesh(mesh):
        return make_step(job.loss, optimizer, config, mesh, state).lower(state, frozen, batch)


def analytic_flops(task: Any, size: int = 512) -> int:
    """Convolutions and matrix products that the loss of one picture and its gradient need, without rematerialisation:
    from the jaxpr, with attention by its definition.
    """
    task = replace(task, remat="none") if hasattr(task, "remat") else task
    job, trained, frozen, row = abstract_job(task, jnp.dtype("bfloat16"), size)
    batch = {name: _shape((1, *leaf.shape), leaf.dtype) for name, leaf in row.items()}
    trained = _in(jnp.dtype("bfloat16"), trained)
    return flops(jax.grad(lambda p, f, b: job.loss(p, f, b, jax.random.key(0))[0]), trained, frozen, batch)


def state_bytes(config: TrainConfig, mesh: Mesh | AbstractMesh, size: int = 512) -> int:
    """Of the train state, on each device."""
    trained = abstract_job(config.task, jnp.dtype("bfloat16"), size)[1]
    state = abstract_state(trained, make_optimizer(config.optimizer, config.steps))
    shardings = leaves(state_sharding(mesh, state))
    return sum(bytes_per_device(leaf, shardings[path]) for path, leaf in leaves(state).items())


def abstract_job(task: Any, dtype: jnp.dtype, size: int) -> tuple[Objective, Any, Any, dict[str, jax.ShapeDtypeStruct]]:
    """A job of shapes: its loss can be traced. Networks whose folder is not here are taken to be those of SD1.5, of
    CLIP-L and of the Chinese CLIP-H tower.

    Returns:
        The job, what is trained (fp32), what is left alone (`dtype`), one sample of a batch.

    Raises:
        UserError: a task whose step this command does not know.
    """
    row = {"place": _shape((), jnp.int32)}
    if isinstance(task, VAETask):
        row["image"] = _shape((size, size, 3), jnp.uint8)
        return VAEJob(task, {}, []), {"vae": abstract(task.vae)}, {}, row
    if not isinstance(task, BranchTask | BackboneTask):
        raise UserError(f"{type(task).__name__}: plan knows the steps of branches, backbones and autoencoders")
    if isinstance(task, BackboneTask):
        job = object.__new__(BackboneJob)
        vae, length = _sizes(task.vae, SD15_VAE), task.text_encoder.max_position_embeddings
        trained, frozen = task.shapes()
        job.schedule = DiscreteSchedule(prediction_type=task.prediction_type, rescale_betas_zero_snr=task.zero_snr)
    else:
        job = object.__new__(BranchJob)
        unet, tower = _sizes(task.backbone / "unet", SD15_UNET), _sizes(task.text_encoder, CHINESE_CLIP_H_TEXT)
        vae, english = _sizes(task.backbone / "vae", SD15_VAE), _sizes(task.backbone / "text_encoder", CLIP_L_TEXT)
        here = (task.tokenizer / "tokenizer_config.json").is_file()
        length = Tokenizer.from_pretrained(task.tokenizer).length if here else _CHINESE_TOKENS
        encoder = {one.name: getattr(unet, one.name) for one in dataclasses.fields(EncoderConfig)}
        job.config = replace(BDM_BRANCH, **{**encoder, "cross_attention_dim": tower.hidden_size})
        job.tower, job.schedule = Component(tower, {}), DiscreteSchedule()
        job.backbone = SimpleNamespace(unet=Component(unet, {}))
        tokens = _shape((1, english.max_position_embeddings, unet.cross_attention_dim), jnp.float32)
        trained = {"branch": abstract(job.config)}
        frozen = {"unet": abstract(unet), "tower": abstract(tower), "english": Conditioning(tokens)}
    job.task, job.vae = task, Component(vae, {})
    side = size // 2 ** (len(vae.block_out_channels) - 1)
    row["moments"] = _shape((side, side, 2 * vae.latent_channels), jnp.float32)
    row["ids"] = _shape((length,), jnp.int32)
    return job, trained, _in(dtype, frozen), row


def _sizes(folder: Path, otherwise: Config) -> Config:
    """Of the network in a component folder; no weights are read."""
    path = folder / "config.json"
    return network_sizes(read_json(path)) if path.is_file() else otherwise


def _shape(sizes: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _in(dtype: jnp.dtype, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _shape(leaf.shape, dtype), tree)
