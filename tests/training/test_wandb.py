"""--wandb: the real package without a network (its offline mode), one run there for all sessions of a run here."""

import importlib.util
import json

import pytest
import toy

from bdm_jax.errors import UserError
from bdm_jax.training import wandb as ours
from bdm_jax.training.config import check
from bdm_jax.training.loop import train


def test_two_sessions_are_one_run(tmp_path, monkeypatch):
    """What W&B has written down to be sent: the names of all metrics, the settings, under one id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    assert not train(toy.config(tmp_path, wandb="bridges", minutes=1e-9))
    assert train(toy.config(tmp_path, wandb="bridges"))
    told = json.loads((tmp_path / "wandb.json").read_text())
    assert told["project"] == "bridges" and len(told["id"]) == 8
    logs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and all(log.name == f"run-{told['id']}.wandb" for log in logs)
    for name in (b"loss", b"goodput", b"images_per_second", b"checkpoint_every", b"bridges"):
        assert all(name in log.read_bytes() for log in logs), name
    assert b"samples" in logs[-1].read_bytes()


def test_a_name_that_is_none_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="wandb='a/b': give the name of a project, without"):
        check(toy.config(tmp_path, wandb="a/b"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb=mine: needs the package wandb: pip install 'bdm_jax\[wandb\]'"):
        ours.check_wandb("mine")
