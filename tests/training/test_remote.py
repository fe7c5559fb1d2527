"""Run folders in buckets, on servers of the test's own: metrics, samples, checkpoints, export, lock, resuming."""

import json
import os
import threading
import time

import fsspec
import numpy as np
import pytest
import toy
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer
from test_devices import flags, two
from test_survival import finish, metrics, start

from bdm_jax.errors import FileError, UserError
from bdm_jax.runtime import buckets, locks
from bdm_jax.runtime.buckets import Bucket, BucketLock
from bdm_jax.training import remote
from bdm_jax.training.loop import train


@pytest.fixture(scope="module")
def servers():
    """S3 and Google's storage on local ports, each with a bucket `runs`; what clients find them by."""
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    gs = create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
    gs.start()
    settings = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*s3.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gs._api._httpd.server_address[1]}",
        # Neither another server of Google's is asked for, nor a minute long whether this machine is one of theirs.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("runs")
        yield settings
        for kind in ("s3", "gs"):
            fsspec.get_filesystem_class(kind).clear_instance_cache()
    s3.stop()
    gs.stop()


@pytest.fixture(params=["s3", "gs"])
def url(request, servers, tmp_path):
    """A folder of the test's own."""
    return f"{request.param}://runs/{tmp_path.name}/mine"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder of the test's own to be in: toy.py writes what it has seen below a run's path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on a disk that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole")
    finish(start(run, "10"), 0)
    return run


def fetched(url, folder):
    """Everything in the bucket, on a disk."""
    bucket = Bucket(url)
    bucket.get({name: folder / name for name in bucket.names()})
    return folder


def test_two_sessions_are_the_run_on_a_disk(url, whole, tmp_path, monkeypatch, capsys):
    """Metrics and samples of both, the newest two checkpoints, the export; nothing is left on this machine's disk."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    assert not train(toy.config(url, minutes=1e-9))
    assert {name.split("/")[1] for name in Bucket(url).names("checkpoints/")} == {"2", "3", "newest.json"}
    assert train(toy.config(url))
    assert not [*(tmp_path / "scratch").iterdir()] and not [*(tmp_path / "here").iterdir()]
    found = fetched(url, tmp_path / "found")
    assert not (found / "run.lock").exists()
    assert metrics(found) == metrics(whole)
    assert (found / "export" / "params.npz").read_bytes() == (whole / "export" / "params.npz").read_bytes()
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == ["10", "8", "newest.json"]
    assert (found / "samples" / "0000010.png").is_file() and list((found / "tensorboard").iterdir())
    assert [row["from"] for row in map(json.loads, (found / "goodput.jsonl").open()) if "from" in row] == [0, 3]


def test_a_killed_session_goes_on_from_the_bucket(servers, url, whole, tmp_path, monkeypatch):
    """SIGKILL in the middle of a save: its files are there without a sidecar, which is no checkpoint. The dead
    process's lock on this host is no obstacle.
    """
    finish(start(url, "10", "before the folder has its name"), -9)
    bucket = Bucket(url)
    assert bucket.read("run.lock") and bucket.names("checkpoints/6/") and not bucket.read("checkpoints/6/sidecar.json")
    assert json.loads(bucket.read("checkpoints/newest.json")) == {"step": 4}
    assert train(toy.config(url))
    found = fetched(url, tmp_path / "found")
    assert metrics(found) == metrics(whole)
    assert (found / "export" / "params.npz").read_bytes() == (whole / "export" / "params.npz").read_bytes()


def test_a_damaged_checkpoint_is_skipped(servers, tmp_path, capsys):
    """One byte of an array's file, a file that is gone, a sidecar that leads out of the folder."""
    url = f"s3://runs/{tmp_path.name}/mine"
    assert not train(toy.config(url, minutes=1e-9, log_every=4))
    bucket, config = Bucket(url), toy.config(url, export_only=True)
    largest = max(
        (name for name in bucket.names("checkpoints/4/state/")), key=lambda name: len(bucket.read(name) or b"")
    )
    before, sidecar = bucket.read(largest), bucket.read("checkpoints/4/sidecar.json")
    bucket.write(largest, before[:-1] + bytes([before[-1] ^ 1]))
    assert train(config)
    assert "the checkpoint of step 4 is damaged" in (err := capsys.readouterr().err) and "going on from step 2" in err
    bucket.remove([largest])
    assert train(config)
    assert "is missing); trying the one before" in capsys.readouterr().err
    bucket.write(largest, before)
    bucket.write("checkpoints/4/sidecar.json", sidecar.replace(b'"state/', b'"../../state/', 1))
    assert train(config)
    assert "names a file out of its folder" in capsys.readouterr().err


def test_two_processes_write_one_checkpoint(servers, whole, tmp_path):
    """Each sends what its four devices hold, neither sees the other's folder. SIGTERM to one ends both; two go on, and
    one process reads what they have written.
    """
    url = f"s3://runs/{tmp_path.name}/mine"
    for process in two(url, "10", "SIGTERM to one"):
        finish(process, 3)
    bucket = Bucket(url)
    stopped = json.loads(bucket.read("checkpoints/newest.json"))["step"]
    (part,) = [name for name in bucket.names(f"checkpoints/{stopped}/") if "part-" in name]
    assert stopped >= 5 and any(name.startswith("state/") for name in json.loads(bucket.read(part)))
    for process in two(url, "10"):
        finish(process, 0)
    theirs = np.load(whole / "export" / "params.npz")
    for folder in ("two", "one"):
        ours = np.load(fetched(url, tmp_path / folder) / "export" / "params.npz")
        for name in {*theirs} - {"step"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
        bucket.remove(bucket.names("export/"))
        if folder == "two":
            assert "going on with 1 processes in place of 2" in finish(start(url, "10", XLA_FLAGS=flags(8)), 0)


def test_a_second_training_is_refused_while_the_first_lives(url, monkeypatch, capsys):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "PATIENCE", 1.0)
    with BucketLock(Bucket(url), "run.lock", "training this run", "choose another --run"):
        with pytest.raises(UserError, match=rf"{url}: process {os.getpid()} on .* has been training this run since 20"):
            train(toy.config(url))
    assert Bucket(url).names() == []


def test_of_several_that_come_at_once_one_gets_the_lock(url, monkeypatch):
    """Five threads find the lock of a holder on another host that is not heard of any more."""
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "PATIENCE", 2.0)
    monkeypatch.setattr(locks, "SETTLED", 0.3)
    bucket, got = Bucket(url), []
    dead = {"host": "elsewhere", "pid": 1, "since": "2026-01-01 00:00:00", "token": "x", "count": 3}
    bucket.write("run.lock", json.dumps(dead).encode())
    over = threading.Event()

    def take(number):
        try:
            with BucketLock(Bucket(url), "run.lock", "training", "wait"):
                got.append(number)
                over.wait(30)
        except UserError:
            pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while sum(thread.is_alive() for thread in threads) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    over.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and bucket.names() == []


def test_who_has_lost_the_lock_writes_no_more(servers, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    bucket = Bucket(f"s3://runs/{tmp_path.name}/mine")
    with BucketLock(bucket, "run.lock", "training", "wait") as lock:
        bucket.write("run.lock", json.dumps({**lock._own, "token": "another's"}).encode())
        lock._counting.join(10)
        with pytest.raises(UserError, match="another process has taken over this run"):
            remote.RemoteRun(bucket, tmp_path, lock).push()
    assert b"another's" in bucket.read("run.lock")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("az://box/run", "az://box/run: buckets are gs://BUCKET/FOLDER and s3://BUCKET/FOLDER"),
        ("s3://runs", "s3://runs: name a bucket and a folder in it, as s3://BUCKET/FOLDER"),
        ("s3://nowhere/run", "s3://nowhere/run/run.lock: The specified bucket does not exist"),
    ],
)
def test_what_is_no_bucket_is_one_line(run, message, servers, tmp_path):
    with pytest.raises(UserError) as error:
        train(toy.config(run))
    assert str(error.value) == message and not list((tmp_path / "here").iterdir())


def test_errors_name_the_bucket_and_a_missing_package_its_extra(servers, tmp_path, monkeypatch):
    url = f"s3://runs/{tmp_path.name}/mine"
    with pytest.raises(UserError, match=r"^steps=0"):
        train(toy.config(url, steps=0))
    assert train(toy.config(url, steps=2))
    with pytest.raises(UserError, match=rf"^{url} holds a run with other settings \(seed\)"):
        train(toy.config(url, steps=2, seed=1))

    def missing(*_, **__):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(buckets.fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"pip install 'bdm_jax\[s3\]'"):
        Bucket(url)


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    """In the memory's file system, which takes such names."""
    memory = fsspec.filesystem("memory")
    bucket = Bucket("memory://hostile/run")
    memory.pipe_file("/hostile/run/a/../../../escaped", b"x")
    with pytest.raises(FileError, match="leads out of the folder"):
        remote.RemoteRun(bucket, tmp_path, None).pull()
    memory.rm("/hostile", recursive=True)
