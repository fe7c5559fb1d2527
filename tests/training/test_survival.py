"""Runs that are killed, asked to end, or run into trouble: what they leave; the next session resumes bit for bit."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy

from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.training import checkpoint, feed, sets
from bdm_jax.training.loop import LOCK, train
from bdm_jax.training.sets import select

PATIENCE = 300  # seconds for a process of a few steps, on a busy machine


def start(run: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """toy.py in a process of its own."""
    command = [sys.executable, toy.__file__, str(run), *arguments]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, *statuses: int) -> str:
    """Its stderr, once it has ended with one of these statuses."""
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in statuses, err
    return err


def metrics(run: Path) -> list[dict]:
    """What was logged, speed aside."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def final_state(run: Path, step: int = 10) -> list[np.ndarray]:
    """Parameters, average, optimizer memory and step, as Orbax reads them without our help."""
    reader, folder = ocp.PyTreeCheckpointer(), run / "checkpoints" / str(step) / "state"
    arrays = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
    )
    return jax.tree.leaves(reader.restore(folder, restore_args=arrays))


def same(one: Path, other: Path, steps: int = 10) -> None:
    """Two finished runs are one, bit for bit."""
    assert metrics(one) == metrics(other)
    assert toy.seen(one) == toy.seen(other)
    assert list(toy.seen(one)) == [str(step) for step in range(1, steps + 1)]
    states = (final_state(run, steps) for run in (one, other))
    assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
    assert (one / "export" / "params.npz").read_bytes() == (other / "export" / "params.npz").read_bytes()


@pytest.fixture
def watched(monkeypatch):
    """A function from a run's folder to nothing: train it in this process, writing down the samples."""

    def run(folder, **changes):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(feed, "mix_loader", feed.mix_loader)  # undone after the test
        toy.watch(folder)
        result = train(toy.config(folder, **changes))
        monkeypatch.undo()
        return result

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole")
    finish(start(run, "10"), 0)
    return run


CASES = {
    "between saves": 4,
    "while Orbax writes": 4,
    "before the sidecar": 4,
    "before the folder has its name": 4,
    "before the old one is removed": 6,
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(case, whole, watched, tmp_path):
    """SIGKILL between two saves and at every stage of one (a checkpoint after every second step, at step 5 or 6)."""
    finish(start(tmp_path, "10", case), -9)
    left = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(map(int, left)) == CASES[case]
    assert not (tmp_path / "export").exists()
    assert (tmp_path / LOCK).exists() and not (whole / LOCK).exists()
    assert watched(tmp_path)
    same(tmp_path, whole)


def test_the_second_is_refused_and_the_first_is_as_if_alone(whole, tmp_path):
    """The second tries while the first is in the middle of its steps and of its checkpoints."""
    program = f"""
import sys
sys.path[:0] = {[str(Path(toy.__file__).parent), str(Path(__file__).parents[2])]!r}
import toy
step = toy.loop._Session._step
def waiting(self):
    if self.at == 5:
        print("here", flush=True)
        sys.stdin.readline()
    step(self)
toy.loop._Session._step = waiting
sys.exit(toy.main({str(tmp_path)!r}, "10"))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", program], **pipes)
    assert first.stdout.readline() == "here\n"
    for changes in ({}, {"export_only": True}):
        with pytest.raises(UserError) as error:
            train(toy.config(tmp_path, **changes))
        who = f"process {first.pid} on {socket.gethostname()} has been training this run since 20"
        assert str(error.value).startswith(f"{tmp_path}: {who}") and "choose another --run" in str(error.value)
    _, err = first.communicate("\n", timeout=300)
    assert first.returncode == 0, err
    same(tmp_path, whole)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_and_repeat_no_sample(tmp_path, rng):
    """As in two hours with a failure every six minutes. A kill comes at the start or up to eight steps later, wherever
    the process then is. Every step, however often it is taken, has the samples that it has without kills.
    """
    steps, kills, whole, run = 150, 20, tmp_path / "whole", tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])  # imports take longer than a session

    def begin(folder):
        process = context.Process(target=toy.session, args=(str(folder), str(steps)))
        process.start()
        return process

    def finished(process):
        process.join(PATIENCE)
        return process.exitcode == 0

    assert finished(begin(whole))

    def lines():
        return path.read_text().splitlines() if path.is_file() else []

    path, saving = run / "samples-seen0.txt", 0
    for _ in range(kills):
        process, target = begin(run), len(lines()) + int(rng.integers(9))
        deadline = time.monotonic() + PATIENCE
        while len(lines()) < target:
            assert process.is_alive() and time.monotonic() < deadline, "the session to be killed did not get that far"
            time.sleep(0.002)
        time.sleep(rng.exponential(0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        saving += any((run / "checkpoints").glob(".saving-*"))
    print(f"{kills} kills, {saving} in the middle of a save; {len(lines())} steps taken before the last session")
    assert finished(begin(run))
    same(run, whole, steps)
    expected = toy.seen(whole)
    assert all(expected[step] == samples for step, samples in (line.split(": ") for line in lines()))


def test_sigterm_saves_after_the_step_and_ends_with_status_3(whole, watched, tmp_path):
    """Asked during step 5, between two logged steps: step 5 is saved, and its part of the next logged mean is kept."""
    finish(start(tmp_path, "10", "SIGTERM"), 3)
    assert json.loads((tmp_path / "checkpoints" / "newest.json").read_text()) == {"step": 5}
    assert [row["step"] for row in metrics(tmp_path)] == [3]
    assert watched(tmp_path)
    same(tmp_path, whole)


def test_a_loss_that_is_not_finite_names_step_samples_and_checkpoint(watched, tmp_path, monkeypatch):
    """Step 6, found at the save after it: nothing of it is kept. The file names the sixteen records of its batch."""
    original = toy.ToyObjective.loss

    def loss(self, params, frozen, batch, key):
        value, more = original(self, params, frozen, batch, key)
        return value + jax.numpy.where(batch["x"][0, 0] == bad, jax.numpy.nan, 0.0), more

    watched(tmp_path / "before", steps=6)
    sixth = toy.seen(tmp_path / "before")["6"]
    data = toy.config(tmp_path).data
    source = open_source(data.folder)
    records = [source[int(i)] for i in select(source, data, "zh")]
    names = [f"{records[i]['style']}/{records[i]['id']}" for i in (int(one.split("/")[1]) for one in sixth.split())]

    batches = iter(range(1, 11))
    place = feed.place_batch

    def spoil(mesh, batch, stacked):
        if next(batches) == 6:
            batch["x"][0, 0] = bad
        return place(mesh, batch, stacked)

    bad = np.float32(12345.0)
    monkeypatch.setattr(toy.ToyObjective, "loss", loss)
    monkeypatch.setattr(feed, "place_batch", spoil)
    with pytest.raises(UserError, match=rf"step 6: loss nan.*checkpoint is of step 4.*{names[0]}"):
        train(toy.config(tmp_path / "run", steps=6))
    told = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert told["step"] == 6 and told["checkpoint"] == 4 and told["samples"] == names
    assert not (tmp_path / "run" / "checkpoints" / "6").exists()


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(whole, watched, tmp_path):
    """No file may grow beyond 64 kB from the second save on (RLIMIT_FSIZE: a real write error, as of a full disk)."""
    program = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(toy.__file__).parent), str(Path(__file__).parents[2])]!r}
import toy
from bdm_jax.training.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpoints.save
def limited(self, step, *arguments):
    self.wait()
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    save(self, step, *arguments)
Checkpoints.save = limited
sys.exit(toy.main({str(tmp_path)!r}, "10"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # TensorStore logs more
    assert "the checkpoint of step 4 could not be written" in line and "File too large" in line
    assert "the one of step 2 is good" in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "newest.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 65536
    assert watched(tmp_path)
    same(tmp_path, whole)


def test_a_sidecar_that_cannot_be_written_is_told_too(tmp_path, monkeypatch):
    """The state is on disk, its proof is not: it does not get its name."""

    def full(path, value):
        if path.name == "sidecar.json" and ".saving-4" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, value)

    write = checkpoint.write_json
    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match=r"step 4 could not be written \(.*No space left.*step 2 is good"):
        train(toy.config(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "newest.json"]


def test_other_data_are_refused(watched, tmp_path, monkeypatch):
    """The config's digest leaves folders out; what lies in them is noted with the position."""
    config = toy.config(tmp_path, steps=10)
    finish(start(tmp_path, "10", "SIGTERM"), 3)
    for change, message in (
        (lambda indices: indices[:-1], r"records was \[50\], is \[49\]"),
        (lambda indices: indices[::-1], r"the fingerprint of RecordSource.* was [0-9a-f]{16}, is [0-9a-f]{16}"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(sets, "select", lambda *arguments, change=change: change(select(*arguments)))
            train(config)
