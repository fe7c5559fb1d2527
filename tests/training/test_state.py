"""The compiled step: what it may change, and that a mesh of several devices computes what one device computes."""

import json
import os
import subprocess
import sys

import pytest

# Runs in a process of its own: the number of devices is fixed when JAX starts.
PROGRAM = """
import json, sys
from pathlib import Path
import jax, numpy as np
from bdm_jax.runtime.sharding import make_mesh, place, place_batch
from bdm_jax.training.config import MeshConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.state import frozen_sharding, make_optimizer, make_state, make_step
from bdm_jax.training.objectives.autoencoder import VAETask

rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32) / shape[0] ** 0.5
params = {"net": {"attn.to_q.kernel": draw(256, 512), "bias": np.zeros(512, np.float32)}}
frozen = {"net": {"attn.to_out.0.kernel": draw(512, 256)}}
data = [{"x": draw(8, 256), "y": draw(8, 256)} for _ in range(5)]

def loss(params, frozen, batch, key):
    hidden = batch["x"] @ params["net"]["attn.to_q.kernel"] + params["net"]["bias"]
    error = hidden @ frozen["net"]["attn.to_out.0.kernel"] - batch["y"] + 0.1 * jax.random.normal(key, (256,))
    return (error**2).mean(), {}

axes, strategy, where = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
parts = 8 // (jax.device_count() // axes.get("tensor", 1))
config = TrainConfig(
    task=VAETask(), run=Path("unused"), steps=5, batch_size=8, accumulate=parts,
    optimizer=OptimizerConfig(warmup_steps=1, ema_decay=0.9), mesh=MeshConfig(**axes, strategy=strategy, frozen=where),
)
mesh = make_mesh(**axes)
with jax.set_mesh(mesh):
    optimizer = make_optimizer(config.optimizer, 5)
    state = make_state(params, optimizer, mesh)
    step = make_step(loss, optimizer, config, mesh, state, frozen)
    constant = place(frozen, frozen_sharding(mesh, config.mesh, frozen))
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
    "checksum": float(abs(np.asarray(state.ema["net"]["attn.to_q.kernel"])).sum()),
    "frozen": bool(all((np.asarray(constant["net"][name]) == value).all() for name, value in frozen["net"].items())),
    "frozen_bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(constant)),
}))
"""


def run(devices, strategy="fsdp", frozen="auto", **axes):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(axes), strategy, frozen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one():
    """One device, the batch in eight parts."""
    result = run(1)
    assert result["devices"] == 1 and result["copies"] == 4 and result["shards"] == [256 * 512]
    assert result["losses"][-1] != result["losses"][0] and result["frozen"]
    return result


@pytest.mark.parametrize(
    ("devices", "strategy", "frozen", "axes", "split", "frozen_split"),
    [
        (4, "fsdp", "auto", {"fsdp": 2}, 2, 2),
        (8, "zero1", "auto", {"fsdp": 4}, 4, 1),
        (8, "zero1", "split", {"fsdp": 8}, 8, 8),
        (8, "fsdp", "auto", {"fsdp": 2, "tensor": 2}, 4, 4),
        (8, "fsdp", "whole", {"fsdp": 2, "tensor": 2}, 4, 2),
    ],
)
def test_a_mesh_computes_what_one_device_computes(one, devices, strategy, frozen, axes, split, frozen_split):
    """Weights, their average and both of Adam's moments are split, and so are frozen ones; sums differ in their order
    only.
    """
    many = run(devices, strategy, frozen, **axes)
    assert many["frozen_bytes"] == one["frozen_bytes"] // frozen_split
    assert many["devices"] == devices and many["copies"] == 4
    assert many["shards"] == [256 * 512 // split]
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert many["checksum"] == pytest.approx(one["checksum"], rel=1e-5)
    assert many["frozen"]
