"""A lock in a file: the living hold it, the dead are in nobody's way, on whatever file system."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from bdm_jax.errors import UserError
from bdm_jax.runtime import locks
from bdm_jax.runtime.locks import held

LOCK = "run.lock"


@pytest.fixture
def quick(monkeypatch):
    """Counts and patience of a moment."""
    for name, seconds in {"BEAT": 0.05, "PATIENCE": 0.5, "SETTLED": 0.05}.items():
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture
def no_locks(monkeypatch, quick):
    """A file system that has none."""

    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)


def hold(path):
    return held(path, "training this run", "choose another --run")


def of_another(path, host="elsewhere", pid=1):
    path.write_text(json.dumps({"host": host, "pid": pid, "since": "2026-01-01 00:00:00", "count": 3}).ljust(512))


def test_another_hosts_lock_holds_while_it_counts(quick, tmp_path, capsys):
    """Where the system's lock does not reach it; when it counts no more, it is dead."""
    path, done = tmp_path / LOCK, threading.Event()

    def count():
        number = 3
        while not done.wait(0.05):
            number += 1
            values = {"host": "elsewhere", "pid": 1, "since": "2026-01-01 00:00:00", "count": number}
            path.write_text(json.dumps(values).ljust(512))

    of_another(path)
    other = threading.Thread(target=count)
    other.start()
    with (
        pytest.raises(UserError, match="process 1 on elsewhere has been training this run since 2026-01-01"),
        hold(path),
    ):
        pass
    done.set()
    other.join()
    assert "for a sign of life" in capsys.readouterr().err
    with hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_without_locks_the_living_are_refused_and_the_dead_are_not(no_locks, tmp_path):
    path = tmp_path / LOCK
    with hold(path), pytest.raises(UserError, match=f"process {os.getpid()} on"), hold(path):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    of_another(path, socket.gethostname(), gone.pid)
    with hold(path):
        pass
    of_another(path, socket.gethostname(), os.getppid())  # alive, but it does not count: another program's number
    with hold(path):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"host": 1, "pid": "x", "since": 0, "count": []}', b"[" * 999]
)
def test_a_file_that_says_nothing_is_no_lock(content, quick, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    with hold(tmp_path / LOCK):
        assert json.loads((tmp_path / LOCK).read_bytes()[: locks._SIZE])["pid"] == os.getpid()


def test_one_of_many_at_once(tmp_path):
    """Threads that take turns as fast as they can: never two inside."""
    inside, most, refused = [], [], []

    def work():
        for _ in range(100):
            try:
                with hold(tmp_path / LOCK):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except UserError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert max(most) == 1 and len(most) + len(refused) == 400
