"""What compatibility measures: every plug-in's effect, what the branch keeps of it, clear errors. Pictures come from a
stand-in that knows the artwork.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.evaluate import __main__ as command
from bdm_jax.evaluate import studio
from bdm_jax.evaluate.claims import compatibility
from bdm_jax.evaluate.studio import EvaluateArgs, Studio
from bdm_jax.images.decode import decode_image
from bdm_jax.paths import EMOJI

COUNT = 12


def thumbnails(pictures):
    """A stand-in for the feature network: (N, 9, 3) mean colours of 3 x 3 regions."""
    small = [np.asarray(Image.fromarray(p).resize((3, 3), Image.Resampling.BOX), np.float32) for p in pictures]
    return np.stack(small).reshape(len(pictures), 9, 3)


class Bridge(SimpleNamespace):
    """A pipeline that only knows which plug-ins it has."""

    branch = "a branch"

    def but(self, plugin):
        return Bridge(plugins=self.plugins | {plugin})


def with_loras(bridge, specs):
    assert [spec.path.name for spec in specs] == ["emoji-lora.safetensors"]
    return bridge.but("lora")


@pytest.fixture(scope="module")
def artwork():
    """(style, name in either language) -> picture."""
    source, found = open_source(EMOJI), {}
    for style in (compatibility.OLD, compatibility.NEW):
        for i in concepts(source, style, language="zh"):
            row = source[int(i)]
            found[style, row["zh"]] = found[style, row["en"]] = decode_image(row["image"])
    return found


@pytest.fixture
def stand_in(artwork, tmp_path, monkeypatch):
    """Runs with all five plug-ins; `deaf` are those that do nothing where the branch speaks."""
    deaf = set()

    def generate(pipeline, requests, settings, *, controls, batch_size):
        for request in requests:
            plugins = pipeline.plugins - (set() if settings.bare else deaf)
            english = request.english.split(",")[0]
            style = compatibility.NEW if plugins & {"style", "lora"} or english == "sks dog face" else compatibility.OLD
            name = request.prompt or english.removeprefix("sks ")
            if english == "<stripes>":
                name = "tiger" if "inversion" in plugins else "black cat"
            controlled = controls and not ("controlnet" in deaf and not settings.bare)
            yield controls[0] if controlled else np.roll(artwork[style, name or "black cat"], 5, axis=1)

    plugin_of = {"emoji-style": "style", "emoji-dreambooth": "dreambooth"}

    def from_pretrained(folder, backbone=None):
        return Bridge(plugins={plugin_of[backbone.parent.name]} if backbone else set())

    monkeypatch.setattr(compatibility.BridgePipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(compatibility, "with_loras", with_loras)
    monkeypatch.setattr(compatibility, "with_embeddings", lambda bridge, embeddings: bridge.but("inversion"))
    monkeypatch.setattr(compatibility, "with_blend", lambda bridge, path, weight, base: bridge.but("style"))
    monkeypatch.setattr(compatibility, "generate", generate)
    monkeypatch.setattr(compatibility, "load_component", lambda path, kind: object())
    monkeypatch.setattr(compatibility, "load_embeddings", lambda path: [])
    hints = {}  # the picture behind a map

    def canny(picture, make=compatibility.canny):
        hint = make(picture)
        hints[hint.tobytes()] = picture
        return hint

    monkeypatch.setattr(compatibility, "canny", canny)
    monkeypatch.setattr(compatibility, "Control", lambda network, hint, strength: hints[hint.tobytes()])
    monkeypatch.setattr(studio, "efficientnet_lite0", lambda: thumbnails)
    monkeypatch.setattr(compatibility, "_TAKES", 2)
    for path in compatibility.FILES.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return SimpleNamespace(runs=tmp_path, deaf=deaf)


def measured(runs, **others):
    return compatibility.measure(Studio(EvaluateArgs(runs=runs, count=COUNT, **others), thumbnails))


def test_plugins_that_work_as_well_with_the_branch(stand_in):
    outcome = measured(stand_in.runs, seeds=2)
    values = {line.name: line.values for line in outcome.lines}
    assert values.pop("untouched") == (1.0, 1.0)
    assert set(values) == {f"{name}_{what}" for name in compatibility.FILES for what in ("effect", "concepts")}
    for name, kept in values.items():
        # A subject's class is drawn from other words in Chinese; everything else is the very same picture.
        assert kept == pytest.approx((1.0, 1.0), abs=0.02 if name.endswith("effect") else 0), name
    for figures in outcome.details["samplings"]:
        assert all(figures[name]["effect_bare"] > 0.05 for name in compatibility.FILES)
    assert set(outcome.sheets) == {f"compatibility-{name}" for name in ("together", *compatibility.FILES)}
    assert outcome.notes == []


@pytest.mark.parametrize("plugin", ["style", "lora", "controlnet"])
def test_a_plugin_that_the_branch_silences_has_no_effect_left(stand_in, plugin):
    stand_in.deaf.add(plugin)
    outcome = measured(stand_in.runs, seeds=1)
    assert outcome.details["samplings"][0][plugin]["effect_bare"] > 0.05
    assert {line.name: line.values for line in outcome.lines}[f"{plugin}_effect"] == pytest.approx((0.0,), abs=1e-6)


def test_accuracy_counts_what_is_not_the_concept(stand_in, artwork):
    material = compatibility.Material(Studio(EvaluateArgs(runs=stand_in.runs, count=COUNT), thumbnails))
    own = [artwork[compatibility.NEW, row["zh"]] for row in material.concepts]
    assert material.accuracy(own) == (1.0, 1.0)
    assert material.accuracy(own[1:] + own[:1]) == (0.0, 0.0)
    assert material.accuracy(own[:9] + own[10:] + own[9:10])[0] == 9 / COUNT


def test_edge_agreement():
    square = np.zeros((64, 64, 3), np.uint8)
    square[16:48, 16:48] = 255
    edges = compatibility.canny(square)
    assert compatibility.edge_agreement(square, edges) == 1.0
    assert compatibility.edge_agreement(np.roll(square, 1, axis=0), edges) > 0.99  # within one pixel
    assert compatibility.edge_agreement(np.roll(square, 8, axis=(0, 1)), edges) < 0.2
    assert compatibility.edge_agreement(np.zeros_like(square), edges) == 0.0


def test_the_command(stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.compile_cache, "enable", lambda: None)
    (stand_in.runs / compatibility.FILES["dreambooth"]).unlink()
    out = tmp_path / "out"
    asked = ["--claim", "compatibility", "--runs", f"{stand_in.runs}", "--count", f"{COUNT}", "--seeds", "1"]
    assert command.main([*asked, "--json", f"{out}/figures.json", "--sheets", f"{out}"]) == 0
    printed = capsys.readouterr().out
    assert "not measured: emoji-dreambooth (python train.py NAME)" in printed and "style_effect" in printed
    claim = json.loads((out / "figures.json").read_text())["claims"]["compatibility"]
    trained = {"style", "lora", "controlnet", "inversion"}
    assert set(claim["details"]["samplings"][0]) == {"untouched", *trained}
    assert {path.stem for path in out.glob("*.png")} == {f"compatibility-{name}" for name in trained}
    assert np.asarray(Image.open(out / "compatibility-style.png")).ndim == 2  # with a palette


def test_nothing_trained_is_said(tmp_path):
    outcome = measured(tmp_path)
    assert not outcome.lines and "emoji-style, emoji-lora, emoji-controlnet" in outcome.notes[0]
