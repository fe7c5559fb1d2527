"""What the showcase measures: every plug-in's effect, what the branch keeps of it, clear errors. Pictures come from a
stand-in that knows the artwork.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.evaluate import showcase
from bdm_jax.images.decode import decode_image
from bdm_jax.paths import EMOJI

COUNT, SEEDS = 12, 2


def thumbnails(pictures):
    """A stand-in for the feature network: (N, 9, 3) mean colours of 3 x 3 regions."""
    small = [np.asarray(Image.fromarray(p).resize((3, 3), Image.Resampling.BOX), np.float32) for p in pictures]
    return np.stack(small).reshape(len(pictures), 9, 3)


class Bridge(SimpleNamespace):
    """A pipeline that only knows which plug-ins it has."""

    def but(self, plugin):
        return Bridge(plugins=self.plugins | {plugin})


def with_loras(bridge, specs):
    assert [spec.path.name for spec in specs] == ["emoji-lora.safetensors"]
    return bridge.but("lora")


@pytest.fixture(scope="module")
def artwork():
    """(style, name in either language) -> picture."""
    source, found = open_source(EMOJI), {}
    for style in (showcase.OLD, showcase.NEW):
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
            style = showcase.NEW if plugins & {"style", "lora"} or english == "sks dog face" else showcase.OLD
            name = request.prompt or english.removeprefix("sks ")
            if english == "<stripes>":
                name = "tiger" if "inversion" in plugins else "black cat"
            controlled = controls and not ("controlnet" in deaf and not settings.bare)
            yield controls[0] if controlled else np.roll(artwork[style, name or "black cat"], 5, axis=1)

    plugin_of = {"emoji-style": "style", "emoji-dreambooth": "dreambooth"}

    def from_pretrained(folder, backbone=None):
        return Bridge(plugins={plugin_of[backbone.parent.name]} if backbone else set())

    monkeypatch.setattr(showcase.BridgePipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(showcase, "with_loras", with_loras)
    monkeypatch.setattr(showcase, "with_embeddings", lambda bridge, embeddings: bridge.but("inversion"))
    monkeypatch.setattr(showcase, "with_blend", lambda bridge, path, weight, base: bridge.but("style"))
    monkeypatch.setattr(showcase, "generate", generate)
    monkeypatch.setattr(showcase, "load_component", lambda path, kind: object())
    monkeypatch.setattr(showcase, "load_embeddings", lambda path: [])
    hints = {}  # the picture behind a map

    def canny(picture, make=showcase.canny):
        hint = make(picture)
        hints[hint.tobytes()] = picture
        return hint

    monkeypatch.setattr(showcase, "canny", canny)
    monkeypatch.setattr(showcase, "Control", lambda network, hint, strength: hints[hint.tobytes()])
    monkeypatch.setattr(showcase, "efficientnet_lite0", lambda: thumbnails)
    for path in showcase.FILES.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return SimpleNamespace(runs=tmp_path, deaf=deaf)


def settings(runs, **others):
    return showcase.ShowcaseArgs(runs=runs, count=COUNT, seeds=SEEDS, **others)


def test_plugins_that_work_as_well_with_the_branch(stand_in):
    report, sheets = showcase.show(settings(stand_in.runs), thumbnails)
    figures = report["figures"]
    assert figures.pop("untouched")["accuracy"] == 1.0 and report["concepts"] == COUNT
    assert set(figures) == set(showcase.FILES) and report["not_trained_yet"] == []
    for name, figure in figures.items():
        assert figure["accuracy"] == figure["accuracy_kept"] == 1.0, name
        assert figure["effect_bare"] > 0.05, name
        # A subject's class is drawn from other words in Chinese; everything else is the very same picture.
        assert figure["effect_kept"] == pytest.approx(1.0, abs=0.02), name
    assert set(sheets) == {"untouched", "together", *showcase.FILES}


@pytest.mark.parametrize("plugin", ["style", "lora", "controlnet"])
def test_a_plugin_that_the_branch_silences_has_no_effect_left(stand_in, plugin):
    stand_in.deaf.add(plugin)
    figures = showcase.show(settings(stand_in.runs), thumbnails)[0]["figures"]
    assert figures[plugin]["effect_bare"] > 0.05 and figures[plugin]["effect_kept"] == pytest.approx(0.0, abs=1e-6)


def test_accuracy_counts_what_is_not_the_concept(stand_in, artwork):
    material = showcase.Material(settings(stand_in.runs), thumbnails)
    own = [artwork[showcase.NEW, row["zh"]] for row in material.concepts]
    assert material.accuracy(own) == (1.0, 1.0)
    assert material.accuracy(own[1:] + own[:1]) == (0.0, 0.0)
    assert material.accuracy(own[:9] + own[10:] + own[9:10])[0] == 9 / COUNT


def test_edge_agreement():
    square = np.zeros((64, 64, 3), np.uint8)
    square[16:48, 16:48] = 255
    edges = showcase.canny(square)
    assert showcase.edge_agreement(square, edges) == 1.0
    assert showcase.edge_agreement(np.roll(square, 1, axis=0), edges) > 0.99  # within one pixel
    assert showcase.edge_agreement(np.roll(square, 8, axis=(0, 1)), edges) < 0.2
    assert showcase.edge_agreement(np.zeros_like(square), edges) == 0.0


def test_the_command(stand_in, tmp_path, capsys):
    (stand_in.runs / showcase.FILES["dreambooth"]).unlink()
    out = tmp_path / "out"
    asked = ["--runs", f"{stand_in.runs}", "--out", f"{out}", "--count", f"{COUNT}", "--seeds", f"{SEEDS}"]
    assert showcase.main(asked) == 0
    printed = capsys.readouterr().out
    assert "not trained yet: emoji-dreambooth" in printed and "style" in printed
    report = json.loads((out / "figures.json").read_text())
    assert set(report["figures"]) == {"untouched", "style", "lora", "controlnet", "inversion"}
    assert {path.stem for path in out.glob("*.png")} == set(report["figures"])
    assert np.asarray(Image.open(out / "style.png")).ndim == 3


def test_nothing_trained_is_one_line(tmp_path, capsys):
    assert showcase.main(["--runs", f"{tmp_path}"]) == 2
    assert "no plug-in was trained there" in capsys.readouterr().err
