"""The same run on one device and on four: the same losses."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from bdm_jax.training.config import MeshConfig
from bdm_jax.training.loop import train

TOLERANCE = 1e-5  # relative, fp32: what remains is the order of summation across devices


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_losses_do_not_depend_on_the_devices(branch_run, tmp_path, monkeypatch):
    one = replace(branch_run(tmp_path / "one"), steps=3, checkpoint_every=1000)
    four = replace(one, run=tmp_path / "four", mesh=MeshConfig(data=2, fsdp=2))
    spawn = multiprocessing.get_context("spawn")
    for config, devices in ((one, 1), (four, 4)):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
        process = spawn.Process(target=train, args=(config,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert losses(four.run) == pytest.approx(losses(one.run), rel=TOLERANCE)
