"""PyTorch's side of one training step: diffusers' and transformers' networks of a pipeline folder, the same draws."""

from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from bdm_jax.runtime.sharding import make_mesh, place_batch
from bdm_jax.training.config import OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.autoencoder import VAETask
from bdm_jax.training.objectives.objective import draw
from bdm_jax.training.sets import Sets
from bdm_jax.training.state import make_optimizer, make_state, make_step

BATCH = 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.05)
# fp32 on both sides, sums in another order: measured at 2e-6 to 7e-6.
STEP = 1e-5


class System:
    """The networks of a backbone, in fp32, nothing trained yet."""

    def __init__(self, folder: Path):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.schedule = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        for network in (self.unet, self.text):
            network.requires_grad_(False).eval()

    def loss(self, moments, ids, scaling, key, residuals=None, text=None):
        """The mean squared error of v, with the draws that our loss makes of `key`."""
        noisy, t, target = self.noised(moments, scaling, key)
        states = self.text(torch.from_numpy(np.asarray(ids)).long()).last_hidden_state if text is None else text
        extra = {} if residuals is None else residuals(noisy, t, states)
        predicted = self.unet(noisy, t, encoder_hidden_states=states, **extra).sample
        return torch.nn.functional.mse_loss(predicted, target)

    def noised(self, moments, scaling, key):
        """Noisy latents, timesteps, targets: of what the schedule's network predicts."""
        mean, logvar = np.split(np.asarray(moments), 2, axis=-1)
        keys, places = jax.random.split(key, 3), np.arange(len(mean))

        def normal(k):
            return np.asarray(draw(k, places, lambda one: jax.random.normal(one, mean.shape[1:])))

        t = draw(keys[2], places, lambda k: jax.random.randint(k, (), 0, 1000))
        latents = nchw((mean + np.exp(0.5 * logvar) * normal(keys[0])) * scaling)
        noise, t = nchw(normal(keys[1])), torch.from_numpy(np.array(t)).long()
        targets = {"v_prediction": self.schedule.get_velocity(latents, noise, t), "epsilon": noise}
        return self.schedule.add_noise(latents, noise, t), t, targets[self.schedule.config.prediction_type]


class SystemXL(System):
    """The networks of an SDXL backbone that the loss of a branch needs: its prompt is "", which are zeros."""

    def __init__(self, folder: Path):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.unet.requires_grad_(False).eval()
        self.schedule = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")

    def loss(self, moments, scaling, key, length, factor, residuals):
        """The mean squared error, with the draws that our loss makes of `key`.

        residuals: of noisy latents, timesteps and sizes (B,6), as the UNet's keywords.
        """
        noisy, t, target = self.noised(moments, scaling, key)
        height, width = (factor * side for side in noisy.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(noisy), dtype=torch.float32)
        config = self.unet.config
        states = torch.zeros(len(noisy), length, config.cross_attention_dim)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(len(noisy), pooled), "time_ids": sizes}
        predicted = self.unet(noisy, t, states, added_cond_kwargs=added, **residuals(noisy, t, sizes)).sample
        return torch.nn.functional.mse_loss(predicted, target)


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array, np.float32), -1, 1)))


def start(task, run, data, dtype="float32"):
    """A training made ready, and one batch."""
    run.mkdir(exist_ok=True)
    job = task.start(Sets(data, task.language, getattr(task, "only", ())), run, 0, jnp.dtype(dtype))
    source = job.parts[0].source
    rows = [job.sample(source[n % len(source)], np.random.default_rng(n)) for n in range(BATCH)]
    batch = jax.tree.map(lambda *values: np.stack(values), *rows)
    return job, {**batch, "place": np.arange(BATCH, dtype=np.int32)}


def scaling(job):
    """Of the latents that it is trained on."""
    return getattr(job.objective, "system", job.objective).denoising.vae.scaling_factor


def key_of(step=0, seed=0):
    """What the compiled step hands to the loss."""
    return jax.random.fold_in(jax.random.key(seed), step)


def step(job, batch, params):
    """Gradients, and the parameters after one compiled step; both as NumPy trees."""
    config = TrainConfig(task=VAETask(), run=Path("unused"), steps=10, batch_size=BATCH, optimizer=OPTIMIZER)
    mesh = make_mesh()
    kept = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, *_: (g, g))
    with jax.set_mesh(mesh):
        optimizer = optax.chain(kept, make_optimizer(config.optimizer, config.steps))
        state = make_state(jax.tree.map(jnp.array, params), optimizer, mesh)
        one = make_step(job.objective.loss, optimizer, config, mesh, state, job.frozen)
        state, _ = one(state, job.frozen, place_batch(mesh, batch))
    return jax.device_get(state.optimizer[0]), jax.device_get(state.params)


def adamw(parameters):
    """torch's AdamW over these parameters with our settings, gradients clipped; one step."""
    parameters = list(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
    decays = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": decays, "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=(0.9, 0.999), eps=1e-8).step()


def assert_same_gradients(pairs, tolerance=STEP):
    """`pairs`: (name, our gradient, torch's), in one layout. Returns the largest element of all.

    The whole gradient agrees to `tolerance`, as vectors do. Of each tensor, the largest difference is within ten times
    that of its largest element (of a thousandth of the network's largest where all of a tensor's vanish): group norm's
    statistics are one pass here and two in torch, which its scales' small gradients show.
    """
    pairs = [(name, *(np.asarray(array, np.float64) for array in arrays)) for name, *arrays in pairs]
    largest = max(np.abs(theirs).max() for _, _, theirs in pairs)
    off = {n: np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-3 * largest) for n, ours, theirs in pairs}

    def norm(arrays):
        return np.sqrt(sum(np.sum(np.square(array)) for array in arrays))

    whole = norm(ours - theirs for _, ours, theirs in pairs) / norm(theirs for _, _, theirs in pairs)
    worst = max(off, key=off.get)
    print(f"gradients: {whole:.1e} as one vector, {off[worst]:.1e} of {worst}'s largest")
    assert whole <= tolerance and off[worst] <= 10 * tolerance
    return largest


def assert_same_step(pairs, tolerance=STEP):
    """`pairs`: (name, our gradient, torch's, our parameter after the step, torch's), all in one layout.

    The gradients agree (`assert_same_gradients`). AdamW's first step is nearly the gradient's sign: it is compared
    where the gradient is large enough to have one, more than 1e-4 of the largest.
    """
    pairs = [(name, *(np.asarray(array, np.float64) for array in arrays)) for name, *arrays in pairs]
    largest = assert_same_gradients([pair[:3] for pair in pairs], tolerance)
    seen = total = 0
    for name, ours, theirs, after, wanted in pairs:
        sure = (np.abs(theirs) > 1e-4 * largest) | ((theirs == 0) & (ours == 0))  # words that are in no caption
        difference = np.abs(after[sure] - wanted[sure])
        assert np.all(difference <= tolerance * np.abs(wanted[sure]) + 2e-4 * OPTIMIZER.learning_rate), name
        seen, total = seen + sure.sum(), total + sure.size
    print(f"{seen / total:.1%} of {total} parameters compared after the step")
    assert seen > 0.5 * total
