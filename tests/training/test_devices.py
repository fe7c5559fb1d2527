"""One device, eight, or two processes: the same samples in the same order, the same losses, the same weights."""

import json
import os
import socket

import numpy as np
import pytest
import toy
from test_survival import final_state, finish, metrics, start

SAME = 1e-5  # fp32 sums over another number of devices: another order, measured at 1e-7


def flags(devices: int) -> str:
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def two(run, *arguments, **environment):
    """Two processes of four devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags(4), **environment}
    return [start(run, *arguments, JAX_PROCESS_ID=str(index), **shared) for index in range(2)]


def samples(run, processes=1):
    """Step -> records of the whole batch, in their order."""
    parts = [toy.seen(run, process) for process in range(processes)]
    return {
        step: " ".join(" ".join(row) for row in zip(*(part[step].split() for part in parts), strict=True))
        for step in parts[0]
    }


def same(run, other, processes=1):
    assert [row["step"] for row in metrics(run)] == [row["step"] for row in metrics(other)] == [3, 6, 9, 10]
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert ours == pytest.approx(theirs, rel=SAME)
    assert samples(run, processes) == samples(other)
    for ours, theirs in zip(final_state(run), final_state(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Ten steps on one device."""
    run = tmp_path_factory.mktemp("one")
    finish(start(run, "10", XLA_FLAGS=flags(1)), 0)
    assert metrics(run)[-1]["loss"] != metrics(run)[0]["loss"]
    return run


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices(one, tmp_path, devices):
    """Half of them on the fsdp axis: 8 is a mesh of 2 x 4, the matrix and all that belongs to it in four parts."""
    finish(start(tmp_path, "10", XLA_FLAGS=flags(devices)), 0)
    same(tmp_path, one)


def test_two_processes_and_on_with_one(one, tmp_path):
    """Two processes of four devices until one of them gets SIGTERM: both end with status 3 after the same step; then
    one process goes on, with eight devices, from the sample that comes next.
    """
    for process in two(tmp_path, "10", "SIGTERM to one"):
        finish(process, 3)
    stopped = json.loads((tmp_path / "checkpoints" / "newest.json").read_text())["step"]
    assert stopped >= 5
    before = samples(tmp_path, 2)
    assert list(before) == [str(step) for step in range(1, stopped + 1)]
    (tmp_path / "samples-seen0.txt").unlink()
    err = finish(start(tmp_path, "10", XLA_FLAGS=flags(8)), 0)
    assert f"going on with 1 processes in place of 2, from sample {16 * stopped}" in err
    after = samples(tmp_path)
    assert {**before, **after} == samples(one) and not before.keys() & after.keys()
    for ours, theirs in zip(final_state(tmp_path), final_state(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_two_processes_compute_what_one_does(one, tmp_path):
    for process in two(tmp_path, "10"):
        finish(process, 0)
    same(tmp_path, one, 2)
    assert len(list((tmp_path / "samples").iterdir())) == 1
