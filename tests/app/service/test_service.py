"""The queue and the thread that draws: batches that jobs share, progress, previews, stop, what a kill leaves behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app import runs
from bdm_jax.app.metadata import read_settings
from bdm_jax.app.parts import Parts
from bdm_jax.app.service import Job, ModelsFolder, QueueFull, Service, stem
from bdm_jax.app.service.kept import KeptSystems
from bdm_jax.app.service.notes import collected
from bdm_jax.errors import UserError
from bdm_jax.images.decode import read_image
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling

SETTINGS = Sampling(steps=2, size=(32, 32))


@pytest.fixture
def start(tiny_folder, tmp_path):
    """A function that starts a service on the tiny bridge."""
    started = []

    def make(out=tmp_path / "out", **options):
        started.append(Service(out, ModelsFolder(), parts=Parts(model=tiny_folder), **{"batch_size": 4, **options}))
        return started[-1]

    yield make
    for service in started:
        service.close()


def job(*seeds, prompt="红灯笼", settings=SETTINGS, **more):
    return Job(tuple(Request(prompt, seed=seed) for seed in seeds), settings, **more)


def finished(*tickets):
    for ticket in tickets:
        assert ticket.wait(300), ticket.state
    return tickets


def check_folder(out, count):
    """`count` whole pictures with one line each in the log, and nothing else."""
    pictures = sorted(path.name for path in out.glob("*.png"))
    lines = [json.loads(line) for line in (out / runs.LOG).read_text("utf-8").splitlines()]
    assert len(pictures) == count and sorted(line["file"] for line in lines) == pictures
    for line in lines:
        path = out / line["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == line["sha256"]
        read_image(path)
    assert {path.name for path in out.iterdir() if path.is_file()} == {*pictures, runs.LOG}


class Paused:
    """Holds the drawing thread at its next call of `generate` until it is let go."""

    def __init__(self, monkeypatch):
        self.reached, self.go_on, self.sizes = threading.Event(), threading.Event(), []

        def slow(pipeline, requests, settings, **options):
            self.sizes.append(len(requests))
            self.reached.set()
            assert self.go_on.wait(300)
            return generate(pipeline, requests, settings, **options)

        monkeypatch.setattr("bdm_jax.app.service.service.generate", slow)


def test_a_picture_is_as_sample_py_draws_it(start, tiny, tmp_path):
    ticket = start().submit(job(3, 4, -1))
    states = [one.state for one in ticket.changes()]
    assert states[-1] == "done" and "drawing" in states
    assert ticket.done == ticket.total == 3 * 2
    seeds = [request.seed for request in ticket.job.requests]
    assert seeds[:2] == [3, 4] and seeds[2] >= 0 and ticket.notes == []
    assert [path.name for path in ticket.pictures] == [f"000{n}-红灯笼-seed{seeds[n - 1]}.png" for n in (1, 2, 3)]
    alone = generate(tiny, list(ticket.job.requests), SETTINGS, batch_size=1)
    for path, pixels in zip(ticket.pictures, alone, strict=True):
        assert np.abs(read_image(path).astype(int) - pixels).max() <= 1  # another batch size is another program
        assert read_settings(path)["width"] == 32
    check_folder(tmp_path / "out", 3)


def test_jobs_of_equal_settings_share_batches(start, monkeypatch, tmp_path):
    pause, service = Paused(monkeypatch), start()
    first = service.submit(job(0))
    assert pause.reached.wait(300)
    others = [service.submit(job(seed, prompt=f"猫{seed}")) for seed in (1, 2)]
    other = service.submit(job(9, settings=Sampling(steps=3, size=(32, 32))))
    more = service.submit(job(3, 4, prompt="猫"))
    assert [one.position for one in (first, *others, other, more)] == [0, 1, 2, 3, 4]
    assert service.waiting() == 4 and service.current() is first
    pause.go_on.set()
    finished(first, *others, other, more)
    assert pause.sizes == [1, 4, 1]
    assert [len(one.pictures) for one in (first, *others, other, more)] == [1, 1, 1, 1, 2]
    texts = [read_settings(path)["prompt"] for one in (*others, more) for path in one.pictures]
    assert texts == ["猫1", "猫2", "猫", "猫"]
    check_folder(tmp_path / "out", 6)


def test_stop_in_the_middle_leaves_nothing_half_written(start, tmp_path):
    service = start(preview_every=1)
    long = service.submit(job(*range(12), settings=Sampling(steps=40, size=(32, 32))))
    waiting = service.submit(job(7))
    waiting_too = service.submit(job(8))
    for ticket in long.changes():
        if ticket.preview is not None and ticket.pictures:
            assert ticket.preview.dtype == np.uint8 and ticket.preview.shape[2] == 3 and ticket.preview.shape[0] >= 256
            service.stop()
    assert long.state == "stopped" and 1 <= len(long.pictures) < 12 and long.wait(0)
    waiting.stop()
    finished(waiting_too)
    assert waiting.state in ("stopped", "done") and waiting_too.state == "done"
    service.close()
    check_folder(tmp_path / "out", len(long.pictures) + len(waiting.pictures) + 1)


def test_skip_goes_on_with_the_next_pictures(start, monkeypatch):
    pause, service = Paused(monkeypatch), start(batch_size=1)
    ticket = service.submit(job(0, 1, 2))
    assert pause.reached.wait(300)
    service.skip()
    pause.go_on.set()
    finished(ticket)
    assert ticket.state == "done" and [read_settings(path)["seed"] for path in ticket.pictures] == [1, 2]


def test_one_job_that_fails_takes_no_other_with_it(start, monkeypatch):
    pause, service = Paused(monkeypatch), start()
    first = service.submit(job(0))
    assert pause.reached.wait(300)
    good, bad = service.submit(job(1)), service.submit(job(2, prompt="坏"))
    drawn = generate

    def spoilt(pipeline, requests, settings, **options):
        if any(request.prompt == "坏" for request in requests):
            raise UserError("came out as NaN")
        return drawn(pipeline, requests, settings, **options)

    monkeypatch.setattr("bdm_jax.app.service.service.generate", spoilt)
    pause.go_on.set()
    finished(first, good, bad)
    assert (first.state, good.state, bad.state, bad.error) == ("done", "done", "failed", "came out as NaN")
    with pytest.raises(UserError, match="NaN"):
        bad.future.result()


def test_what_can_be_checked_is_checked_at_once(start, tmp_path):
    service = start()
    image = np.zeros((32, 32, 3), np.uint8)
    for wrong, message in [
        (Job(()), "no prompts"),
        (job(0, prompt=" "), "no prompt"),
        (job(2**32), "seed 4294967296"),
        (job(0, settings=Sampling(steps=0)), "steps 0"),
        (job(0, settings=Sampling(sampler="dpm9")), "unknown sampler"),
        (job(0, parts=Parts(model=tmp_path / "none")), "none"),
        (Job((Request("猫", negative="a AND b"),)), "AND"),
        (job(0, prompt="<lora:none:1> 猫"), "unknown lora 'none'"),
        (job(0, prompt="\ud800"), "no UTF-8"),
        (job(0, owner="../x"), "owner"),
        (Job((Request("猫", mask=image[..., 0]),)), "a mask without an image"),
        (Job((Request("猫", image=image, mask=image[:16, :, 0]),)), "they must be of one size"),
        (Job((Request("猫", image=image.astype(np.int64)),)), "array of int64"),
    ]:
        with pytest.raises(UserError, match=message):
            service.submit(wrong)
    failed = service.submit(job(0, settings=Sampling(steps=2, size=(33, 32))))
    finished(failed, good := service.submit(job(1)))
    assert failed.error.startswith("size 32x33") and "\n" not in failed.error and good.state == "done"


def test_a_full_queue_takes_no_more(start, monkeypatch):
    pause, service = Paused(monkeypatch), start(max_waiting=2)
    tickets = [service.submit(job(0))]
    assert pause.reached.wait(300)
    tickets += [service.submit(job(seed)) for seed in (1, 2)]
    with pytest.raises(QueueFull, match="2 jobs are waiting"):
        service.submit(job(3))
    tickets[1].stop()
    tickets.append(service.submit(job(3)))
    assert tickets[-1].position == 2
    for ticket in tickets:
        ticket.stop()
    pause.go_on.set()
    service.close()
    with pytest.raises(QueueFull, match="closed"):
        service.submit(job(4))
    assert all(one.finished for one in tickets)


def test_pictures_of_an_owner_are_that_owners(start, tmp_path):
    service = start()
    ann, bob = finished(service.submit(job(1, 2, 3, owner="ann")), service.submit(job(3, owner="bob")))
    assert [path.name for path in service.pictures("ann")] == [f"000{n}-红灯笼-seed{n}.png" for n in (3, 2, 1)]
    assert service.pictures("ann", limit=1, before="0002-红灯笼-seed2.png")[0].name == "0001-红灯笼-seed1.png"
    assert service.pictures("bob") == bob.pictures and service.pictures() == []
    assert service.picture("0001-红灯笼-seed1.png", "ann") == ann.pictures[0]
    for name in ("0001-红灯笼-seed1.png", "../ann/0001-红灯笼-seed1.png", "pictures.jsonl", "/etc/passwd", "a\0b", ""):
        with pytest.raises(UserError, match="no picture"):
            service.picture(name, "bob")
    check_folder(tmp_path / "out" / "ann", 3)


def test_an_image_to_begin_from_and_a_mask(start, rng):
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    ticket = start().submit(Job((Request("猫", image=image, mask=mask),), SETTINGS))
    finished(ticket)
    assert ticket.state == "done", ticket.error
    drawn = read_image(ticket.pictures[0])
    assert (drawn[16:] == image[16:]).all() and (drawn[:16] != image[:16]).any()


KILLED = """
import sys
from pathlib import Path
from bdm_jax.app.parts import Parts
from bdm_jax.app.service import Job, Service
from bdm_jax.sampling.settings import Request, Sampling
service = Service(Path(sys.argv[1]), parts=Parts(model=Path(sys.argv[2])), batch_size=1)
requests = tuple(Request("猫", seed=seed) for seed in range(10_000))
ticket = service.submit(Job(requests, Sampling(steps=2, size=(32, 32))))
for ticket in ticket.changes():
    print(len(ticket.pictures), flush=True)
"""


def test_after_a_kill_finished_pictures_are_there_and_no_half_ones(start, tiny_folder, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, out, tiny_folder],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )
    for line in process.stdout:
        if int(line) >= 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    count = len([*out.glob("*.png")])
    assert count >= 3
    last = sorted(out.glob("*.png"))[-1]
    (out / f".{last.name[:40]}.abcd1234.tmp").write_bytes(b"half")
    log = (out / runs.LOG).read_bytes()
    (out / runs.LOG).write_bytes(log.rpartition(b'{"file"')[0] + b'{"file": "00')  # the last line torn, so gone
    ticket = start(out).submit(job(5))
    finished(ticket)
    assert ticket.pictures[0].name.endswith("-红灯笼-seed5.png")  # the killed run's numbers are not given again
    check_folder(out, count + 1)


def test_notes_are_of_their_own_thread():
    here, there = threading.Event(), threading.Event()
    seen = []

    def other():
        here.wait(60)
        with collected() as notes:
            warnings.warn("theirs", UserWarning, stacklevel=1)
        seen.extend(notes)
        there.set()

    thread = threading.Thread(target=other)
    thread.start()
    with collected() as notes:
        here.set()
        assert there.wait(60)
        warnings.warn("ours", UserWarning, stacklevel=1)
    thread.join()
    assert (notes, seen) == (["ours"], ["theirs"])


def test_systems_are_kept_while_there_is_room(tiny_folder, monkeypatch):
    systems, one, two = KeptSystems(), Parts(model=tiny_folder), Parts(model=tiny_folder, variant="")
    first = systems.get(one, "float32")
    assert systems.get(one, "float32") is first and len(systems) == 1
    systems.get(two, "float32")
    assert len(systems) == 2 and systems.get(one, "float32") is first
    monkeypatch.setattr("bdm_jax.app.service.kept.device_memory", lambda: 1)
    systems.get(one, "bfloat16")
    assert len(systems) == 1 and systems.get(one, "float32") is not first


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"x")
    for name in ("checkpoints/sd.safetensors", "Lora/画风/ink.safetensors", "Lora/ink.pt", "loras/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "checkpoints" / "whole").mkdir()
    (folder / "checkpoints" / "whole" / "model_index.json").write_text("{}", encoding="utf-8")
    (folder / "checkpoints" / "out.safetensors").symlink_to(outside)
    (folder / "checkpoints" / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (folder / "checkpoints" / "away").symlink_to(tmp_path, target_is_directory=True)
    (folder / "checkpoints" / "same.safetensors").symlink_to(folder / "checkpoints" / "sd.safetensors")
    return folder


def test_names_are_those_of_the_folder(models):
    found = ModelsFolder(models)
    assert found.names("models") == ["same.safetensors", "sd.safetensors", "whole", "demo"]
    assert found.names("loras") == ["ink.pt", "画风/ink.safetensors"] and found.names("controls") == []
    assert found.path("loras", "画风/ink") == models.resolve() / "Lora/画风/ink.safetensors"
    assert ModelsFolder().names("models") == ["demo"]


def test_a_folder_s_name_has_no_ending():
    names = {"style/ink.v2.safetensors": "style/ink.v2", "ink.PT": "ink", "anything-v4.5": "anything-v4.5"}
    assert {name: stem(name) for name in names} == names


@pytest.mark.parametrize(
    "name",
    [
        "out.safetensors",
        "away/outside.safetensors",
        "../outside.safetensors",
        "../checkpoints/sd.safetensors",
        "./sd.safetensors",
        "/etc/passwd",
        "sd.safetensors\0",
        "sd.safetensors/",
        "..",
        ".",
        "",
        "~",
        "~root",
        "\N{FULLWIDTH FULL STOP}./sd.safetensors",
        "whole/../sd.safetensors",
        "..\\outside.safetensors",
        "C:\\x.safetensors",
        "x" * 100_000,
        None,
        3,
    ],
)
def test_nothing_else_is_opened(models, name):
    with pytest.raises(UserError, match="unknown model") as error:
        ModelsFolder(models).path("models", name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_models_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such folder of models"):
        ModelsFolder(tmp_path / "none")
    with pytest.raises(UserError, match="unknown kind of model"):
        ModelsFolder().names("cats")


def test_every_stage_is_counted(start):
    service = start()
    finished(service.submit(job(1)))
    deadline = time.monotonic() + 60
    while not service.counts.batches and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.counts.pictures == 1 and service.counts.jobs == {"done": 1}
    assert all(service.counts.times[stage] for stage in ("waiting", "loading", "drawing", "saving"))


def test_previews_are_small_pictures(start):
    service = start(preview_every=1)
    previews = [one.preview for one in service.submit(job(1, settings=Sampling(steps=4, size=(32, 32)))).changes()]
    shown = [one for one in previews if one is not None]
    assert shown and all(Image.fromarray(one).size == (256, 256) for one in shown)
