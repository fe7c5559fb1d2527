"""The account of a run's wall time: what counts, over sessions that end well and sessions that are killed."""

import json
from dataclasses import replace

import pytest
import toy
from test_survival import finish, start

from bdm_jax.training import goodput
from bdm_jax.training.goodput import Goodput
from bdm_jax.training.loop import train


def test_steps_that_are_taken_again_are_lost(tmp_path):
    """Three sessions: the second goes on from 15, in the middle of a line's ten steps; the third from 10, before it."""
    first = Goodput(tmp_path, 0)
    assert first.add(10, {"start": 30.0, "compile": 20.0, "step": 50.0}) == pytest.approx(0.5)
    assert first.add(20, {"data": 10.0, "step": 40.0}) == pytest.approx(90 / 150)
    second = Goodput(tmp_path, 15)
    assert second.add(20, {"start": 30.0, "step": 20.0}) == pytest.approx((50 + 20 + 20) / 200)
    third = Goodput(tmp_path, 10)
    third.add(20, {"start": 10.0, "step": 50.0})
    third.add(20, {"checkpoint": 5.0, "step": 1.0})  # after the last step
    assert goodput.read(tmp_path) == pytest.approx(
        {"start": 70, "compile": 20, "data": 10, "checkpoint": 5, "end": 1, "lost": 20 + 20 + 20, "step": 50 + 50}
    )


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path):
    Goodput(tmp_path, 0).add(10, {"step": 4.0})
    with (tmp_path / goodput.FILE).open("a") as file:
        file.write('{"step": 20, "sec')
    Goodput(tmp_path, 10).add(20, {"start": 1.0, "step": 3.0})
    assert goodput.read(tmp_path) == {"start": 1.0, "lost": 0, "step": 7.0}


def test_a_killed_run_accounts_for_both_sessions(tmp_path):
    """Killed at step 8, with the checkpoint of step 4 at most damaged: what it did after the newest one is lost."""
    finish(start(tmp_path, "10", "after 5: SIGKILL"), -9)
    before = [json.loads(line) for line in (tmp_path / goodput.FILE).read_text().splitlines()]
    assert [row.get("from", row.get("step")) for row in before] == [0, 3]
    assert train(replace(toy.config(tmp_path), log_every=2))
    rows = [json.loads(line) for line in (tmp_path / goodput.FILE).read_text().splitlines()]
    assert rows[:2] == before and rows[2]["from"] in (2, 4) and rows[-1]["step"] == 10
    causes = goodput.spent(rows)
    seconds = sum(sum(row.get("seconds", {}).values()) for row in rows)
    assert sum(causes.values()) == pytest.approx(seconds) and causes["start"] > 0 and causes["checkpoint"] > 0
    assert (causes.get("lost", 0) > 0) == (rows[2]["from"] == 2)
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert 0 < speed[-1]["goodput"] < 1 and speed[-1]["goodput"] == pytest.approx(
        goodput.share(goodput.spent(rows[:-1])), abs=1e-4
    )
