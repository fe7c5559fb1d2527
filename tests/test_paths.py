"""Where the bundled files lie, and what is said where they do not. The writers are tested where they are used."""

import pytest

from bdm_jax import paths
from bdm_jax.data import records
from bdm_jax.errors import FileError


def test_what_is_missing_is_named():
    assert str(paths.no_such("models/x", "model folder")) == "models/x: no such model folder"
    for path in (paths.DEMO, paths.TOKENIZERS / "clip"):
        message = str(paths.no_such(path, "model folder"))
        assert message.startswith(f"{path}: this installation came without the bundled model folder")


def test_a_missing_data_set(tmp_path, monkeypatch):
    for module in (paths, records):
        monkeypatch.setattr(module, "EMOJI", tmp_path / "emoji")
    with pytest.raises(FileError, match="this installation came without the bundled data set; name another"):
        records.open_source(tmp_path / "emoji")
