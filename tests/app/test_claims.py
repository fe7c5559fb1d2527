"""Two programs that draw into one folder: no number twice, no finished picture replaced, no line lost."""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app import claims, runs
from bdm_jax.app.drawing import PipelineOutput
from bdm_jax.app.metadata import describe, read_settings
from bdm_jax.images.pictures import file_name
from bdm_jax.paths import atomic_file, remove_leftovers
from bdm_jax.sampling.settings import Request, Sampling

THREADS, PICTURES = 8, 200
PROMPTS = ("红灯笼", "猫", "雪山")


def described(pipeline, requests, settings, parts, controls=()):
    return [describe(request, Sampling(size=(8, 8)), {}) for request in requests]


def drawn(pipeline, requests, settings, **options):
    """Pictures that say whose they are: the seed in their pixels."""
    for request in requests:
        yield np.full((8, 8, 3), [request.seed % 256, request.seed // 256, 7], np.uint8)


@pytest.fixture
def stub(monkeypatch):
    """Drawing takes no time and no network."""
    monkeypatch.setattr(runs, "describe_all", described)
    monkeypatch.setattr(runs, "generate", drawn)


def draw(out, requests, rows=None):
    """A run to its end: the names of what it wrote."""
    plan = runs.plan(None, requests, Sampling(), Path(out), parts={}, rows=rows)
    return [path.name for path in runs.draw(None, plan)[1]]


def draw_many(out, process):
    """What one of two processes draws in eight threads, in runs of one to four pictures."""

    def thread(number):
        seeds = iter(range(number, PICTURES, 2 * THREADS))
        for size in itertools.cycle((1, 3, 2, 4)):
            requests = [Request(PROMPTS[seed % 3], seed=seed) for seed in itertools.islice(seeds, size)]
            if not requests:
                return
            draw(out, requests)

    threads = [threading.Thread(target=thread, args=(2 * i + process,)) for i in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


def lines(out):
    return [json.loads(line) for line in (out / runs.LOG).read_text(encoding="utf-8").splitlines()]


def test_two_processes_and_eight_threads_draw_200_pictures_into_one_folder(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_claims as t; "
        "t.runs.describe_all, t.runs.generate = t.described, t.drawn; t.draw_many(sys.argv[1], int(sys.argv[2]))"
    )
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out"), str(i)]) for i in range(2)]
    assert [one.wait(300) for one in both] == [0, 0]
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*-seed*.png"))
    numbers = Counter(name[:4] for name in pictures)
    assert len(pictures) == len(numbers) == PICTURES  # two that try at once may both leave a number out
    assert Counter(line["file"] for line in lines(tmp_path / "out")) == Counter(pictures)
    for line in lines(tmp_path / "out"):
        path = tmp_path / "out" / line["file"]
        with Image.open(path) as image:
            assert image.getpixel((0, 0)) == (line["seed"], 0, 7), "the line is of this picture"
    rest = [path for path in (tmp_path / "out").iterdir() if path.name not in pictures and path.name != runs.LOG]
    shown = []
    for path in rest:
        assert path.name.endswith("-contact-sheet.png"), path
        with Image.open(path) as image:
            shown += json.loads(image.text["bdm_jax"])["sheet"]
    assert len(shown) == len({*shown}) and {*shown} <= {*pictures}, "every run of several has its sheet"


def test_numbers_are_taken_when_a_run_is_planned(stub, tmp_path):
    """In whatever order two runs then draw."""
    plans = [
        runs.plan(None, [Request(text), Request(text, seed=1)], Sampling(), tmp_path / "out", parts={})
        for text in PROMPTS[:2]
    ]
    for plan in reversed(plans):
        list(runs.draw(None, plan)[1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0001-contact-sheet.png",
        "0001-红灯笼-seed0.png",
        "0002-红灯笼-seed1.png",
        "0003-contact-sheet.png",
        "0003-猫-seed0.png",
        "0004-猫-seed1.png",
        runs.LOG,
    ]


def test_a_killed_run_blocks_nothing_and_is_no_picture(stub, tmp_path):
    program = (
        f"import os; from bdm_jax.app import claims; from pathlib import Path; "
        f"claims.claim(Path({str(tmp_path)!r}), 3); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name == ".0001.claim"
    other = tmp_path / ".0007.claim"  # of another host: nobody here knows whether it is alive
    other.write_text(json.dumps({"count": 2, "host": "elsewhere", "pid": 1, "time": 0}))
    assert draw(tmp_path, [Request("猫")]) == ["0009-猫-seed0.png"]
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "0009-猫-seed0.png", runs.LOG}
    os.utime(other, (0, 0))
    draw(tmp_path, [Request("猫")])
    assert not other.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"count": 1e99, "host": 1, "pid": 1}', b"[" * 9999])
def test_a_claim_that_says_nothing_is_one_number(content, tmp_path):
    (tmp_path / ".0004.claim").write_bytes(content)
    assert claims.claim(tmp_path, 1).first == 5


def test_a_folder_that_a_failed_run_made_is_gone(stub, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no memory")

    monkeypatch.setattr(runs, "generate", fail)
    with pytest.raises(ValueError, match="no memory"):
        draw(tmp_path / "out", [Request("猫")])
    assert not (tmp_path / "out").exists()


def test_what_appears_under_a_name_meanwhile_stays(stub, tmp_path):
    """A stranger's file under a number of ours: the picture gets the next one, on its sheet too."""
    plan = runs.plan(None, [Request("猫"), Request("猫", seed=1)], Sampling(), tmp_path, parts={})
    _, files = runs.draw(None, plan)
    stranger = tmp_path / plan.images[1].name
    stranger.write_bytes(b"copied here")
    names = [path.name for path in files]
    assert names == ["0001-猫-seed0.png", "0003-猫-seed1.png", "0001-contact-sheet.png"]
    assert stranger.read_bytes() == b"copied here"
    assert [line["file"] for line in lines(tmp_path)] == names[:2]


def test_two_runs_of_one_file_of_prompts_share_it(stub, tmp_path):
    """Both draw what neither had: each picture is written once, and has one line."""
    requests = [Request(text, seed=3) for text in PROMPTS]
    plans = [runs.plan(None, requests, Sampling(), tmp_path, parts={}, rows=(1, 2, 3)) for _ in range(2)]
    (_, first), (_, second) = (runs.draw(None, plan) for plan in plans)
    next(first)
    before = {path: path.stat().st_ino for path in tmp_path.glob("0*.png")}
    for _ in itertools.zip_longest(second, first):
        pass
    assert {path: path.stat().st_ino for path in before} == before
    assert Counter(line["file"] for line in lines(tmp_path)) == {image.name: 1 for image in plans[0].images}
    assert {path.name for path in tmp_path.iterdir()} == {
        *(image.name for image in plans[0].images),
        "contact-sheet.png",
        runs.LOG,
    }


def test_the_sheet_of_other_prompts_stays(stub, tmp_path):
    """A longer file of the same prompts makes a new sheet of the old one."""
    first, other = [[Request(f"{text}{i}") for i in range(2)] for text in PROMPTS[:2]]
    assert draw(tmp_path, first, rows=(1, 2))[-1] == "contact-sheet.png"
    kept = (tmp_path / "contact-sheet.png").read_bytes()
    for _ in range(2):
        assert draw(tmp_path, other, rows=(1, 2))[-1] == "contact-sheet (2).png"
    assert (tmp_path / "contact-sheet.png").read_bytes() == kept
    assert draw(tmp_path, [*first, Request("雪山")], rows=(1, 2, 3))[-1] == "contact-sheet.png"
    assert (tmp_path / "contact-sheet.png").read_bytes() != kept


def test_a_pipelines_output_is_saved_beside_that_of_others(tmp_path):
    settings = [describe(Request("猫", seed=seed), Sampling(size=(8, 8)), {}) for seed in range(5)]
    output = PipelineOutput([Image.new("RGB", (8, 8))] * 5, settings)
    threads = [threading.Thread(target=output.save, args=(tmp_path,)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == [f"{number:04d}" for number in range(1, 21)]
    assert read_settings(tmp_path / file_name(1, "猫", 0))["prompt"] == "猫"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_there_is_not_replaced(links, tmp_path, monkeypatch):
    """Also where the file system has no hard links."""
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")), raising=False)
    for content in (b"first", b"second"):
        try:
            with atomic_file(tmp_path / "x", replace=False) as file:
                file.write(content)
        except FileExistsError:
            assert content == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_leftovers_are_removed_and_files_being_written_are_not(tmp_path):
    (tmp_path / ".x.png.abc12345.tmp").write_bytes(b"of a killed process")
    (tmp_path / ".y.png.abc12345.tmp").write_bytes(b"not ours")
    with atomic_file(tmp_path / "x.png") as file:
        file.write(b"whole")
        remove_leftovers(tmp_path, {"x.png"})
    assert (tmp_path / "x.png").read_bytes() == b"whole"
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", ".y.png.abc12345.tmp"}
