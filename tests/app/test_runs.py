"""Runs over files of prompts: cut off and gone on, shared by processes, never twice, never over another's picture."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app import drawing, runs
from bdm_jax.app.metadata import read_settings, text_chunks
from bdm_jax.app.prompts import read_prompts
from bdm_jax.errors import UserError
from bdm_jax.images.decode import read_image
from bdm_jax.images.pictures import write_png
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling, any_seed

SCRIPT = Path(__file__).resolve().parents[2] / "sample.py"
BDM_870 = Path(__file__).parents[3] / "shared/data/prompts/BDM_870.json"
REQUESTS = [Request("红灯笼", seed=0), Request("猫", seed=0), Request("雪山", seed=4)]
SETTINGS = Sampling(steps=2)


def run(pipeline, out, requests=REQUESTS, settings=SETTINGS, rows=(1, 2, 3), **options):
    """A run to its end: (how many were there, files written)."""
    out.mkdir(exist_ok=True)
    plan = runs.plan(pipeline, requests, settings, out, parts={"model": "tiny"}, rows=rows)
    there, files = runs.draw(pipeline, plan, **options)
    return there, [path.name for path in files]


def log(out):
    lines = (out / runs.LOG).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_whole(out, count):
    """`count` pictures, whole, each with one line in the log that says what the picture does; nothing else."""
    pictures = sorted(path for path in out.glob("*.png") if "sheet" not in path.name)
    assert len(pictures) == count
    lines = {line.pop("file"): line for line in log(out)}
    assert sorted(lines) == [path.name for path in pictures] and len(log(out)) == count
    for path in pictures:
        assert lines[path.name].pop("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
        assert lines[path.name] == read_settings(path)
        read_image(path)
    others = {path.name for path in out.iterdir()} - {path.name for path in pictures} - {runs.LOG}
    assert all(name.startswith("contact-sheet") for name in others), others


def test_any_seed_is_chosen_noted_and_stored(tiny, tmp_path):
    asked = [Request("猫", seed=-1), Request("猫", seed=7), Request("龙", seed=-1)]
    with pytest.warns(UserWarning, match="seed -1 is any") as noted:
        planned = runs.plan(tiny, asked, Sampling(), tmp_path, parts={}).images
    seeds = [image.request.seed for image in planned]
    assert seeds[1] == 7 and seeds[0] != seeds[2] and all(0 <= seed < 2**31 for seed in seeds)
    assert [image.settings["seed"] for image in planned] == seeds
    assert all(f"seed{seed}" in image.name for seed, image in zip(seeds, planned, strict=True))
    assert f"{seeds[0]}, {seeds[2]} chosen" in str(noted[0].message)


@pytest.mark.parametrize("seed", [-1, [-1, 7, -1]])
def test_any_seed_when_a_pipeline_is_called(tiny, monkeypatch, seed):
    drawn = []

    def generate(pipeline, requests, settings, **how):
        drawn.extend(requests)
        return iter([np.zeros((8, 8, 3), np.uint8)] * len(requests))

    monkeypatch.setattr(drawing, "generate", generate)
    with pytest.warns(UserWarning, match="seed -1 is any"):
        output = drawing.draw(tiny, "猫", seed=seed)
    assert [values["seed"] for values in output.settings] == [request.seed for request in drawn]
    assert all(request.seed >= 0 for request in drawn)


def test_any_seed_without_a_folder(tiny):
    with pytest.warns(UserWarning, match="seed -1 is any"):
        generate(tiny, [Request("猫", seed=-1)], Sampling(2))
    with pytest.raises(UserError, match="seed -2 is outside"):
        generate(tiny, [Request("猫", seed=-2)], Sampling(2))
    with pytest.raises(UserError, match="seed -2 is negative; -1 stands for any"):
        any_seed(-2)


NAMES = ["0001-红灯笼-seed0.png", "0002-猫-seed0.png", "0003-雪山-seed4.png"]


def test_what_is_there_is_not_drawn_again(tiny, tmp_path):
    assert run(tiny, tmp_path) == (0, [*NAMES, "contact-sheet.png"])
    check_whole(tmp_path, 3)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("0*.png")}
    assert run(tiny, tmp_path) == (3, ["contact-sheet.png"])
    check_whole(tmp_path, 3)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("0*.png")}


def test_an_older_versions_pictures_are_not_drawn_again(tiny, tmp_path):
    """They say nothing about settings that came later, which are as by default then."""
    run(tiny, tmp_path)
    for name in NAMES:
        settings = read_settings(tmp_path / name)
        del settings["cache_every"], settings["merge_tokens"]
        write_png(tmp_path / name, read_image(tmp_path / name), text_chunks(settings))
    assert run(tiny, tmp_path)[0] == 3
    with pytest.raises(UserError, match="drawn with cache every 1, not 2"):
        run(tiny, tmp_path, settings=replace(SETTINGS, cache_every=2))


@pytest.mark.parametrize(
    "damage", ["gone", "torn", "empty", "line torn", "line gone", "log gone", "line twice", "half"]
)
def test_what_is_damaged_is_mended(tiny, tmp_path, damage):
    run(tiny, tmp_path)
    pictures = {name: (tmp_path / name).read_bytes() for name in NAMES}
    path, lines = tmp_path / NAMES[1], (tmp_path / runs.LOG).read_bytes().splitlines(keepends=True)
    if damage in ("gone", "torn", "empty"):
        path.write_bytes({"gone": b"", "torn": pictures[NAMES[1]][:-100], "empty": b""}[damage])
        if damage == "gone":
            path.unlink()
    elif damage == "half":
        (tmp_path / f".{NAMES[1][:40]}.abc12345.tmp").write_bytes(b"x")
        (tmp_path / runs.PREVIEW).write_bytes(b"x")
    else:
        kept = {
            "line torn": [*lines[:2], lines[2][:-9]],
            "line gone": lines[1:],
            "log gone": [],
            "line twice": lines * 2,
        }
        (tmp_path / runs.LOG).write_bytes(b"".join(kept[damage]))
    drawn = [NAMES[1]] if damage in ("gone", "torn", "empty") else []
    assert run(tiny, tmp_path) == (3 - len(drawn), [*drawn, "contact-sheet.png"])
    check_whole(tmp_path, 3)
    for name in NAMES:
        near = np.abs(read_image(tmp_path / name).astype(int) - decoded(pictures[name]).astype(int))
        assert near.max() <= 1  # another batch size is another program


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_lines_of_other_pictures_stay(tiny, tmp_path):
    other = b'{"file": "0009-x.png", "sha256": "ab"}\n'
    (tmp_path / runs.LOG).write_bytes(other + b'{"file": "00')
    run(tiny, tmp_path)
    assert (tmp_path / runs.LOG).read_bytes().startswith(other) and len(log(tmp_path)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(settings=replace(SETTINGS, steps=3)), "drawn with steps 2, not 3: choose another folder with --out"),
        (dict(settings=replace(SETTINGS, guidance=1.5)), "drawn with guidance 3.0, not 1.5"),
        (dict(requests=[replace(r, negative="低质量") for r in REQUESTS]), 'drawn with negative "", not "低质量"'),
    ],
)
def test_other_settings_are_refused(tiny, tmp_path, change, message):
    run(tiny, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as error:
        run(tiny, tmp_path, **change)
    assert NAMES[0] in str(error.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_strangers_picture_is_not_drawn_over(tiny, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / NAMES[2])
    with pytest.raises(UserError, match="no settings of ours"):
        run(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[2]]


def test_images_are_known_by_their_pixels(tiny, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "m.png")
    requests = [Request("猫", image=tmp_path / "a.png", mask=tmp_path / "m.png")]
    assert run(tiny, tmp_path / "out", requests, rows=(1,)) == (0, ["0001-猫-seed0.png"])
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    with pytest.raises(UserError, match="image"):  # another name: another setting
        run(tiny, tmp_path / "out", [replace(requests[0], image=tmp_path / "b.png")], rows=(1,))
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="image sha256"):
        run(tiny, tmp_path / "out", requests, rows=(1,))


def test_numbers_go_on_without_rows(tiny, tmp_path):
    assert run(tiny, tmp_path, rows=None)[1][0] == NAMES[0]
    assert run(tiny, tmp_path, rows=None) == (
        0,
        [f"000{n + 3}{NAMES[n - 1][4:]}" for n in (1, 2, 3)] + ["0004-contact-sheet.png"],
    )
    assert len(log(tmp_path)) == 6


def test_previews_come_and_go(tiny, tmp_path, monkeypatch):
    seen = []
    real = runs.preview.writer

    def writer(vae, path):
        watch = real(vae, path)
        return lambda done, clean: (watch(done, clean), seen.append((done, path.exists())))

    monkeypatch.setattr(runs.preview, "writer", writer)
    run(tiny, tmp_path, settings=Sampling(steps=5), preview_every=2)
    assert seen == [(2, True), (4, True)]
    check_whole(tmp_path, 3)


def test_sheets_hold_a_hundred_each(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_SHEET", 2)
    assert run(tiny, tmp_path)[1] == [*NAMES, "contact-sheet-1.png", "contact-sheet-2.png"]
    with Image.open(tmp_path / "contact-sheet-2.png") as image:
        values = json.loads(image.text["bdm_jax"])
    assert values["sheet"] == NAMES[2:] and values["settings"]["steps"] == 2 and "prompt" not in values["settings"]


def process(folder, out, prompts, cache, *more, **environment):
    command = [sys.executable, str(SCRIPT), "--prompts", prompts, "--model", folder, "--steps", 2, "--out", out, *more]
    return subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "BDM_JAX_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(*processes):
    for one in processes:
        _, err = one.communicate(timeout=600)
        assert one.returncode == 0, err


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def file_of_64(tmp_path_factory):
    """The first 64 of BDM's own prompts, or made ones in the same form."""
    if BDM_870.is_file():
        rows = json.loads(BDM_870.read_text(encoding="utf-8"))[:64]
    else:
        rows = [[f"{i}.png", f"红灯笼{'一二三四五六七八'[i % 8]}", "", "", "", "", ""] for i in range(64)]
    path = tmp_path_factory.mktemp("prompts") / "BDM_64.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert len(read_prompts(path)) == 64
    return path


@pytest.fixture(scope="module")
def whole_run(tiny_folder, file_of_64, cache, tmp_path_factory):
    """All 64, by one process, never disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(process(tiny_folder, out, file_of_64, cache))
    check_whole(out, 64)
    return out


def assert_same_pictures(out, other):
    """Up to the rounding of programs of different sizes."""
    names = [sorted(path.name for path in folder.glob("*-seed*.png")) for folder in (out, other)]
    assert names[0] == names[1]
    pixels = [np.stack([read_image(folder / name) for name in names[0]]).astype(int) for folder in (out, other)]
    difference = np.abs(pixels[0] - pixels[1])
    print(f"largest difference {difference.max()}, in {(difference > 0).mean():.2%} of the values")
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_killed_and_started_again(tiny_folder, file_of_64, cache, whole_run, tmp_path):
    """SIGKILL, three times, wherever it is."""
    out = tmp_path / "out"
    reached = Counter()
    for goal in (8, 20, 41):
        one = process(tiny_folder, out, file_of_64, cache, "--batch-size", 4, "--preview-every", 1)
        deadline = time.monotonic() + 300
        while len(list(out.glob("*-seed*.png"))) < goal and one.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        one.send_signal(signal.SIGKILL)
        one.communicate()
        assert one.returncode == -signal.SIGKILL
        reached[goal] = len(list(out.glob("*-seed*.png")))
    assert max(reached.values()) < 64
    finish(process(tiny_folder, out, file_of_64, cache, "--batch-size", 4))
    check_whole(out, 64)
    assert_same_pictures(out, whole_run)


def test_two_processes_share_a_run(tiny_folder, file_of_64, cache, whole_run, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}

    def start(index):
        return process(tiny_folder, tmp_path / "out", file_of_64, cache, **job, JAX_PROCESS_ID=str(index))

    finish(start(0), start(1))
    check_whole(tmp_path / "out", 64)
    assert (tmp_path / "out" / "contact-sheet.png").exists()
    assert_same_pictures(tmp_path / "out", whole_run)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_change_no_picture(tiny_folder, file_of_64, cache, whole_run, tmp_path, devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    finish(process(tiny_folder, tmp_path / "out", file_of_64, cache, XLA_FLAGS=flags))
    check_whole(tmp_path / "out", 64)
    assert_same_pictures(tmp_path / "out", whole_run)
