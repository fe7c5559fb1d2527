"""Where compiled programs are kept, and that a command does without where nothing can be."""

import math
import os
import warnings
from pathlib import Path

import jax
import pytest

from bdm_jax.paths import user_cache
from bdm_jax.runtime import compile_cache, programs

SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """As before, afterwards; no folder is named."""
    for name in ("BDM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    names = "jax_compilation_cache_dir", SECONDS, "jax_persistent_cache_min_entry_size_bytes"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    programs.keep(None)
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def homeless(monkeypatch):
    """A user with neither HOME nor an entry in the list of users, as in a container with a bare uid."""

    def fails():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fails)


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be written (whoever runs the tests: root could)."""

    def fails(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compile_cache.tempfile, "TemporaryFile", fails)


def test_the_user_s_folder_and_a_named_one(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert compile_cache.enable() == tmp_path / ".cache" / "bdm_jax" / "jax"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert compile_cache.enable() == tmp_path / "xdg" / "bdm_jax" / "jax"
        monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path / "named"))
        assert compile_cache.enable() == tmp_path / "named"
    assert getattr(jax.config, SECONDS) == 0 and programs._folder == tmp_path / "named" / "programs"


def test_without_a_home_nothing_is_kept_and_one_note_says_so(homeless, monkeypatch, tmp_path):
    assert user_cache() is None
    with pytest.warns(UserWarning, match="no home folder .set BDM_JAX_CACHE") as notes:
        assert compile_cache.enable() is None
    assert len(notes) == 1 and programs._folder is None
    monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path))
    assert compile_cache.enable() == tmp_path


def test_a_folder_that_cannot_be_written_is_read(read_only, monkeypatch, tmp_path):
    monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match=f"{tmp_path} cannot be written .Permission denied") as notes:
        assert compile_cache.enable() == tmp_path
    assert len(notes) == 1 and programs._folder == tmp_path / "programs" and not programs._write
    assert getattr(jax.config, SECONDS) == math.inf


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_what_is_no_folder(kind, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path / "file" / ("x" if kind == "below a file" else "")))
    with pytest.warns(UserWarning, match="not kept for the next start"):
        assert compile_cache.enable() is None
    assert os.listdir(tmp_path) == ["file"]
