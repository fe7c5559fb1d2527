"""What the code gave before it was moved into its present layout (issue 20), it gives still: pictures, training, files.

tests/unchanged/record.py recorded it from the commit that recorded.json names. Compilers and processors round in other
places, and attention on a CPU sums in another order since then. The tolerances are fifty times and more what the oldest
instruction set changes on the recording's processor (--xla_cpu_max_isa=SSE4_2, no fused multiply-add: 0.0002 levels,
2e-7 of a loss), a fifth of what the mildest approximation of docs/sampling.md does.
"""

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MEAN_LEVELS, FAR_LEVELS, FAR_SHARE = 0.05, 2, 1e-3  # of 255: mean difference; share of values more than 2 levels off
LOSS, GRADIENT, NORM = 2e-5, 1e-4, 2e-5  # relative


def _load(path):
    """A module from its file: the tests are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _load(Path(__file__).parent / "unchanged" / "runs.py")
RECORDED = json.loads(runs.RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All commands, two at a time as most of each is a compiler on one core: name -> function that waits for it."""
    place = runs.Workplace(ROOT, tmp_path_factory.mktemp("unchanged"))
    for kept in (runs.OLD_PICTURES, runs.OLD_RUN):
        shutil.copytree(kept, place.folder / kept.name)
    copied = {path.name: path.stat().st_mtime_ns for path in (place.folder / runs.OLD_PICTURES.name).iterdir()}
    first, seed = min(runs.OLD_PICTURES.glob("*.png")), RECORDED["drawings"][runs.OLD_PICTURES_OF]["settings"]["seed"]
    again = ("--from", f"{runs.OLD_PICTURES.name}/{first.name}", "--seed", f"{seed}-{seed + 1}", "--out", "again")

    def go_on():
        """Export from the checkpoint of the old version, then train four steps more."""
        exported = place.run("train.py", *runs.OLD_RUN_FLAGS, "--export-only")
        return exported, place.run("train.py", *runs.OLD_RUN_FLAGS, *runs.LEG)

    with ThreadPoolExecutor(2) as pool:

        def start(*call):
            return pool.submit(*call).result

        jobs = {"training": start(place.run, "train.py", *runs.TRAINING, *runs.TRAINING_SINCE)}
        jobs |= {name: start(place.draw, name, name) for name in runs.DRAWINGS}
        jobs["old run"] = start(go_on)
        jobs["again"] = start(place.run, "sample.py", *again)  # after the drawing whose programs it takes
        jobs["continued"] = start(place.draw, runs.OLD_PICTURES_OF, runs.OLD_PICTURES.name)
        yield SimpleNamespace(folder=place.folder, first=first, copied=copied, of=jobs)
        pool.shutdown(cancel_futures=True)


def finished(done, status=0):
    assert done.returncode == status, done.stdout + done.stderr
    return done


def assert_same_pixels(found, recorded, what):
    assert found.shape == recorded.shape, what
    away = np.abs(found.astype(int) - recorded)
    far = np.mean(away > FAR_LEVELS)
    told = f"{what}: {np.sum(away > 0)} of {away.size} values differ, the mean by {away.mean():.2g}, most {away.max()}"
    print(told)
    assert away.mean() < MEAN_LEVELS and far < FAR_SHARE, told


def assert_near(found, recorded, tolerance, what):
    """Floats as hexadecimal strings, by name; the tolerance is relative."""
    assert list(found) == list(recorded), what
    ours, theirs = (np.array([float.fromhex(value) for value in each.values()]) for each in (found, recorded))
    away = np.abs(ours - theirs) / np.abs(theirs)
    print(f"{what}: {np.sum(away > 0)} of {away.size} values differ, most by {away.max():.2g} of it")
    assert away.max() <= tolerance, (what, list(found)[away.argmax()])


def assert_same_metrics(found, recorded):
    assert [list(row) for row in found] == [list(row) for row in recorded]
    for name, tolerance in (("loss", LOSS), ("gradient_norm", GRADIENT)):
        ours, theirs = ({row["step"]: row[name] for row in rows} for rows in (found, recorded))
        assert_near(ours, theirs, tolerance, name)


def test_the_inputs_are_those_of_the_recording(tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets", target_is_directory=True)
    assert runs.make_inputs(tmp_path) == RECORDED["inputs"]


@pytest.mark.parametrize("name", runs.DRAWINGS)
def test_pictures(work, name):
    """Files' names, settings inside, pixels."""
    finished(work.of[name]())
    found, recorded = runs.read_pictures(work.folder / name), RECORDED["drawings"][name]
    assert list(found) == list(recorded["pictures"])
    sheet = runs.untiled(runs.read_sheet(name), len(found))
    for (file, own), before in zip(recorded["pictures"].items(), sheet, strict=True):
        pixels, settings = found[file]
        expected = {**recorded["settings"], **own}
        assert {key: settings.get(key) for key in expected} == expected
        assert_same_pixels(pixels, before, file)


def test_training(work):
    """Loss and gradient norm of every step, the exported weights, the samples."""
    finished(work.of["training"]())
    found, recorded = runs.read_training(work.folder / "training"), RECORDED["training"]
    assert_same_metrics(found["metrics"], recorded["metrics"])
    assert found["files"] == recorded["files"]
    norms = [{name: tensor["norm"] for name, tensor in each["branch"].items()} for each in (found, recorded)]
    assert_near(*norms, NORM, "norms of the exported tensors")
    for name, tensor in found["branch"].items():
        before = recorded["branch"][name]
        assert (tensor["dtype"], tensor["shape"]) == (before["dtype"], before["shape"]), name
    samples, before = found["samples"], recorded["samples"]
    assert samples["name"] == before["name"]
    np.testing.assert_allclose(samples["means"], before["means"], atol=MEAN_LEVELS)


def test_an_old_picture_is_drawn_again(work):
    """A PNG of the old version gives its settings to --from."""
    finished(work.of["again"]())
    again, old = runs.read_pictures(work.folder / "again"), runs.read_pictures(runs.OLD_PICTURES)
    (pixels, settings), (before, told) = again[work.first.name], old[work.first.name]
    assert {key: settings.get(key) for key in told} == told
    assert_same_pixels(pixels, before, work.first.name)


def test_an_old_folder_of_pictures_is_complete(work):
    """The command that made it finds every picture there, and leaves files and log as they are."""
    finished(work.of["continued"]())
    for path in runs.OLD_PICTURES.iterdir():
        copy = work.folder / runs.OLD_PICTURES.name / path.name
        assert copy.read_bytes() == path.read_bytes() and copy.stat().st_mtime_ns == work.copied[path.name], path.name


def test_an_old_run_is_exported_and_goes_on(work):
    """The folder of a run: its config is accepted, its checkpoint restored. No sum is in an export: bits everywhere."""
    exported, trained = work.of["old run"]()
    run = work.folder / runs.OLD_RUN.name
    finished(exported)
    assert runs.read_tensors(run / "export" / runs.EXPORTED_WORD) == RECORDED["old_run"]["word"]
    finished(trained, runs.LEG_OVER)
    assert "compiling the step" in trained.stderr
    metrics = runs.read_metrics(run)
    assert metrics[0] == RECORDED["old_run"]["metrics"][0]
    assert_same_metrics(metrics, RECORDED["old_run"]["metrics"])
