"""What a run reads of its sets."""

from collections import Counter

import pytest

from bdm_jax.errors import UserError
from bdm_jax.training.sets import DataConfig, Sets


def test_classes_are_alike_often(tmp_path, picture, write_folder):
    rows = [{"image": picture(i, (8, 8)), "text": "灯", "kind": kind} for i, kind in enumerate("aaaab")]
    folder = write_folder(tmp_path / "set", rows)
    (part,) = Sets(DataConfig(folder, balance="kind"), "zh").images()
    assert Counter(part.source[i]["kind"] for i in part.indices) == {"a": 4, "b": 4}
    (part,) = Sets(DataConfig(folder), "zh").images()
    assert list(part.indices) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="has no such field, only captions, key, kind"):
        Sets(DataConfig(folder, balance="class"), "zh")
    with pytest.raises(UserError, match="shares of their own"):
        Sets(DataConfig(folder, balance="kind", scenes=4), "zh")
