"""The table of approximations: its rows, clear errors. Pictures come from a stand-in."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bdm_jax.evaluate import approximations
from bdm_jax.sampling.settings import Request, Sampling


class Model:
    def with_int8_text(self):
        return "int8"

    def __eq__(self, other):
        return isinstance(other, Model)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Three concepts; exact pictures are all right, every other setting makes them darker and one of them wrong."""
    artwork = [np.full((16, 16, 3), value, np.uint8) for value in (50, 100, 150)]
    asked = []

    def generate(pipeline, requests, settings, *, batch_size):
        asked.append((pipeline, settings, batch_size))
        changed = settings != Sampling() or pipeline == "int8"
        return (artwork[request.seed] - np.uint8(5 * changed) for request in requests)

    def search(wanted, pictures):
        right = [np.abs(artwork[i].astype(int) - p).max() < (3 if i == 0 else 9) for i, p in zip(wanted, pictures)]  # noqa: B905
        return SimpleNamespace(right=np.array(right))

    gallery = SimpleNamespace(rows=[{"zh": "猫"}] * 3, search=search)
    monkeypatch.setattr(approximations.BridgePipeline, "from_pretrained", lambda folder: Model())
    monkeypatch.setattr(approximations, "open_gallery", lambda *_, **__: (gallery, [0, 1, 2], "fluent", False))
    monkeypatch.setattr(approximations, "request", lambda row, language, phrased, seed: Request(row["zh"], seed=seed))
    monkeypatch.setattr(approximations, "generate", generate)
    monkeypatch.setattr(approximations.compile_cache, "enable", lambda: None)
    return asked


def test_rows(stand_in, tmp_path, capsys):
    arguments = ["cache-every=3", "steps=8,text-weights=int8", "--json", str(tmp_path / "x.json"), "--batch-size", "2"]
    assert approximations.main(arguments) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == ["exact", "cache-every=3", "steps=8,text-weights=int8"]
    assert [row["right"] for row in rows] == pytest.approx([1.0, 2 / 3, 2 / 3])
    assert [row["difference"] for row in rows] == [0.0, 5.0, 5.0]
    assert all(row["seconds"] > 0 and row["count"] == 3 for row in rows)
    expected = [(Model(), Sampling()), (Model(), Sampling(cache_every=3)), ("int8", Sampling(steps=8))]
    assert stand_in == [(*given, 2) for given in expected]
    assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cache-every=0"], "cache every 0 is less than 1"),
        (["cach-every=2"], "--cach-every"),
        (["--count", "0"], "count 0 is less than 1"),
    ],
)
def test_bad_input_gives_one_line(capsys, given, message):
    assert approximations.main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
