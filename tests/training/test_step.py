"""Every option of the compiled step against its formula, worked in NumPy or by torch, on a network of two arrays."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bdm_jax.runtime.sharding import make_mesh, place_batch
from bdm_jax.training.config import OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.autoencoder import VAETask
from bdm_jax.training.state import make_optimizer, make_state, make_step

STEPS, BATCH = 12, 8
BASE = TrainConfig(task=VAETask(), run=Path("unused"), steps=STEPS, batch_size=BATCH)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, ema_decay=0.9)


def loss(params, frozen, batch, key):
    net = params["net"]
    error = batch["x"] @ net["kernel"] + net["bias"] - batch["y"]
    return jnp.mean(jnp.square(error.astype(jnp.float32))), {"type": jnp.float32(net["kernel"].dtype.itemsize)}


def torch_loss(kernel, bias, batch):
    return torch.mean((torch.from_numpy(batch["x"]) @ kernel + bias - torch.from_numpy(batch["y"])) ** 2)


def gradients(params, batch):
    """Of the mean squared error, by hand: kernel, bias and their common norm."""
    error = batch["x"] @ params[0] + params[1] - batch["y"]
    error = 2 * error / error.size
    found = [batch["x"].T @ error, error.sum(axis=0)]
    return found, np.sqrt(sum(np.sum(g**2) for g in found))


def rate(step):
    """Linear from zero over three steps, then a cosine to zero at the last."""
    if step < 3:
        return 0.05 * step / 3
    return 0.05 * 0.5 * (1 + np.cos(np.pi * (step - 3) / (STEPS - 3)))


@pytest.fixture
def problem(rng):
    """Start values and twelve batches, float64 of fp32 numbers."""

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    start = [draw(160, 130) / 12, draw(130)]
    return start, [{"x": draw(BATCH, 160), "y": draw(BATCH, 130)} for _ in range(STEPS)]


def run(problem, config):
    """Train; the final state and each step's metrics."""
    (kernel, bias), batches = problem
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = make_state({"net": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}, optimizer, mesh)
        step = make_step(loss, optimizer, config, mesh, state, {})
        rows = []
        for batch in batches:
            state, metrics = step(state, {}, place_batch(mesh, batch))
            rows.append(jax.device_get(metrics))
    return state, rows


def close(state, reference, tolerance=1e-5):
    net = state.params["net"]
    np.testing.assert_allclose(net["kernel"], reference[0], rtol=0, atol=tolerance * np.abs(reference[0]).max())
    np.testing.assert_allclose(net["bias"], reference[1], rtol=0, atol=tolerance * np.abs(reference[1]).max())


def test_adamw_clipping_warm_up_and_cosine_are_torch_s(problem):
    state, rows = run(problem, replace(BASE, optimizer=OPTIMIZER))
    start, batches = problem
    with torch.enable_grad():
        kernel, bias = (torch.from_numpy(value.copy()).requires_grad_() for value in start)
        groups = [{"params": [kernel], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            value = torch_loss(kernel, bias, batch)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_([kernel, bias], 0.5)
            optimizer.step()
            assert rows[step]["loss"] == pytest.approx(float(value), rel=1e-4)
            assert rows[step]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert max(row["gradient_norm"] for row in rows) > 0.5, "nothing was clipped"
    close(state, [kernel.detach().numpy(), bias.detach().numpy()], 1e-4)


def by_hand(problem, direction):
    """Parameters after all steps: clip, direction(gradient, memory), decay, rate."""
    params, batches = [value.astype(np.float64) for value in problem[0]], problem[1]
    memory = [{}, {}]
    for step, batch in enumerate(batches):
        found, norm = gradients(params, batch)
        for i, gradient in enumerate(found):
            gradient = gradient * min(1.0, 0.5 / norm)
            update = direction(step, gradient, memory[i]) + (0.1 * params[i] if params[i].ndim > 1 else 0.0)
            params[i] = params[i] - rate(step) * update
    return params


def test_lion(problem):
    """Chen et al., arXiv 2302.06675, algorithm 2. A sign can turn with the last bit: rare elements are left out."""

    def direction(step, gradient, memory):
        m = memory.get("m", np.zeros_like(gradient))
        memory["m"] = 0.99 * m + 0.01 * gradient
        return np.sign(0.9 * m + 0.1 * gradient)

    optimizer = replace(OPTIMIZER, name="lion", b2=0.99, learning_rate=0.05)
    state, _ = run(problem, replace(BASE, optimizer=optimizer))
    kernel, bias = by_hand(problem, direction)
    off = np.abs(np.asarray(state.params["net"]["kernel"]) - kernel) > 1e-4
    assert off.mean() < 1e-3 and np.abs(np.asarray(state.params["net"]["bias"]) - bias).max() < 1e-4


def test_adafactor(problem):
    """Shazeer & Stern, arXiv 1804.04235: algorithm 4 for the matrix, 5 for the vector, d = 1, decay 1 - t^-0.8."""

    def direction(step, gradient, memory):
        decay = 1.0 - (step + 1.0) ** -0.8
        square = gradient**2 + 1e-30
        if gradient.ndim > 1:
            memory["r"] = decay * memory.get("r", 0.0) + (1 - decay) * square.mean(axis=1)
            memory["c"] = decay * memory.get("c", 0.0) + (1 - decay) * square.mean(axis=0)
            second = np.outer(memory["r"], memory["c"]) / memory["r"].mean()
        else:
            memory["v"] = second = decay * memory.get("v", 0.0) + (1 - decay) * square
        update = gradient / np.sqrt(second)
        return update / max(1.0, np.sqrt(np.mean(update**2)))

    state, _ = run(problem, replace(BASE, optimizer=replace(OPTIMIZER, name="adafactor")))
    close(state, by_hand(problem, direction), 1e-4)
    memory = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    assert memory < 0.1 * 160 * 130, "rows and columns, not the matrix"


def test_ema_warms_up(problem):
    """average += (1 - min(0.9, (1 + step) / (10 + step))) (parameters - average), after every step."""
    short = replace(BASE, steps=STEPS, optimizer=OPTIMIZER)
    average = problem[0][0].astype(np.float64)
    for count in range(1, STEPS + 1):
        state, _ = run((problem[0], problem[1][:count]), short)
        decay = min(0.9, count / (9 + count))
        average += (1 - decay) * (np.asarray(state.params["net"]["kernel"]) - average)
    np.testing.assert_allclose(state.ema["net"]["kernel"], average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_the_whole_batch(problem, parts):
    whole, rows = run(problem, replace(BASE, optimizer=OPTIMIZER))
    state, others = run(problem, replace(BASE, optimizer=OPTIMIZER, accumulate=parts))
    close(state, [np.asarray(whole.params["net"][name]) for name in ("kernel", "bias")])
    assert [float(row["loss"]) for row in others] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-5)


def test_bfloat16_computes_with_fp32_masters(problem):
    """The loss sees two bytes per number, the state keeps four; one step's gradient is that of the rounded weights."""
    config = replace(
        BASE, optimizer=replace(OPTIMIZER, clip_norm=1e9, weight_decay=0.0, name="lion"), compute="bfloat16"
    )
    state, rows = run(problem, config)
    assert all(row["type"] == 2 for row in rows)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.ema, state.optimizer))} == {
        "float32",
        "int32",
    }
    rounded = [np.asarray(jnp.asarray(value, jnp.bfloat16), np.float64) for value in problem[0]]
    _, norm = gradients(rounded, problem[1][0])
    assert rows[0]["gradient_norm"] == pytest.approx(norm, rel=1e-2)
    steps = np.asarray(state.params["net"]["kernel"]) - problem[0][0]
    assert (
        np.abs(steps).max() > 0
        and (
            np.asarray(state.params["net"]["kernel"].astype(jnp.bfloat16)) != np.asarray(state.params["net"]["kernel"])
        ).mean()
        > 0.9
    )
    assert replace(BASE, compute="auto").compute_dtype() == jnp.float32, "on a CPU, unless asked"
