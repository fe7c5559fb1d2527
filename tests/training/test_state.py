"""The compiled step: what it may change, and that a mesh of several devices computes what one device computes."""

import json
import os
import subprocess
import sys

import pytest

# Runs in a process of its own: the number of devices is fixed when JAX starts.
PROGRAM = """
import json
import jax, numpy as np
from bdm_jax.sharding import make_mesh, place_batch, replicated
from bdm_jax.training.config import OptimizerConfig
from bdm_jax.training.state import make_optimizer, make_state, make_step

rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32) / shape[0] ** 0.5
params = {"net": {"wide.kernel": draw(256, 512), "bias": np.zeros(512, np.float32)}}
frozen = {"net": {"kernel": draw(512, 4)}}
data = [{"x": draw(8, 256), "y": draw(8, 4)} for _ in range(5)]

def loss(params, frozen, batch, key):
    hidden = batch["x"] @ params["net"]["wide.kernel"] + params["net"]["bias"]
    error = hidden @ frozen["net"]["kernel"] - batch["y"] + 0.1 * jax.random.normal(key, (8, 4))
    return (error**2).mean(), {}

mesh = make_mesh(fsdp=jax.device_count() // 2 or 1)
with jax.set_mesh(mesh):
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 5)
    state = make_state(params, optimizer, mesh)
    step = make_step(loss, optimizer, 0.9, 0, mesh, state)
    constant = jax.device_put(frozen, replicated(mesh))
    losses = []
    for batch in data:
        state, metrics = step(state, constant, place_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (256, 512)]
print(json.dumps({
    "devices": jax.device_count(),
    "losses": losses,
    "copies": len(leaves),
    "shards": sorted({leaf.addressable_shards[0].data.size for leaf in leaves}),
    "checksum": float(abs(np.asarray(state.ema["net"]["wide.kernel"])).sum()),
    "frozen": bool((np.asarray(constant["net"]["kernel"]) == frozen["net"]["kernel"]).all()),
}))
"""


def run(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_four_devices_compute_what_one_computes():
    """Weights, their average and both of Adam's moments are split over `fsdp`; sums differ in their order only."""
    one, four = run(1), run(4)
    assert (one["devices"], four["devices"]) == (1, 4)
    assert one["copies"] == four["copies"] == 4
    assert one["shards"] == [256 * 512] and four["shards"] == [256 * 512 // 2]
    assert four["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert four["checksum"] == pytest.approx(one["checksum"], rel=1e-5)
    assert one["losses"][-1] != one["losses"][0]
    assert one["frozen"] and four["frozen"]
