"""Training from precomputed latents: what is learned, the order, going on, mixtures, faults, refusals."""

import importlib.util
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image
from test_devices import samples, two
from test_survival import final_state, finish, metrics, same, start, watched  # noqa: F401

from bdm_jax.data.loader import mix_loader
from bdm_jax.data.moments import open_moments
from bdm_jax.data.records import open_source
from bdm_jax.latents.precompute import precompute
from bdm_jax.models.functional import init
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component, load_component, save_component
from bdm_jax.training import feed, sets
from bdm_jax.training.loop import train
from bdm_jax.training.position import NUMBER, numbered
from bdm_jax.training.sets import DataConfig, Sets

SQUARE, WIDE = (64, 64), (32, 96)
BATCH = 16  # of the autoencoder, here and in a run's own encoding: the same program, the same bits


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A function (name, count, sizes) -> a folder of captioned noise, of the sizes in turn."""

    def write(name, count, sizes):
        folder = tmp_path_factory.mktemp("pictures") / name
        folder.mkdir()
        lines = []
        for number in range(count):
            noise = np.random.default_rng([len(name), number]).integers(0, 256, (*sizes[number % len(sizes)], 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{name}{number:03d}.png")
            lines.append(json.dumps({"file_name": f"{name}{number:03d}.png", "text": f"红灯笼{number}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return write


@pytest.fixture(scope="module")
def vae(backbone_folder):
    return backbone_folder / "vae"


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory):
    """A function from a folder of pictures to one of its latents."""

    def make(folder, buckets=(SQUARE,), component=None):
        out = tmp_path_factory.mktemp("latents") / folder.name
        component = component or load_component(vae, "float32")
        precompute(open_source(folder), out, component, buckets=buckets, chunk=20, batch_size=BATCH)
        return out

    return make


@pytest.fixture(scope="module")
def squares(pictures):
    return pictures("s", 40, [SQUARE])


@pytest.fixture(scope="module")
def two_buckets(pictures, encoded):
    """Latents of 48 square and 24 wide pictures."""
    return encoded(pictures("mixed", 72, [SQUARE, WIDE, SQUARE]), (SQUARE, WIDE))


@pytest.fixture
def toys(vae):
    """A function from folders to what toy.py needs to train on them."""
    return lambda *folders: {"TOY_SETS": ":".join(map(str, folders)), "TOY_VAE": str(vae)}


@pytest.fixture(scope="module")
def whole(two_buckets, vae, tmp_path_factory):
    """Ten steps on two buckets that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole")
    finish(start(run, "10", TOY_SETS=str(two_buckets), TOY_VAE=str(vae)), 0)
    return run


def test_a_branch_learns_from_shards_what_it_learns_from_memory(
    branch_run,
    squares,
    encoded,
    watched,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """The same samples in the same order; with moments rounded alike, the same losses: sums of the same numbers in two
    programs, measured equal.
    """
    original = sets.record_moments
    monkeypatch.setattr(sets, "record_moments", lambda *a: original(*a).astype(np.float16))
    runs = {}
    for name, folder in (("memory", squares), ("shards", encoded(squares))):
        config = branch_run(tmp_path / name)
        task = replace(config.task, style_in_caption=True)
        runs[name] = replace(config, task=task, data=DataConfig(folder), steps=4, sample_every=4)
        runs[name].run.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(feed, "mix_loader", feed.mix_loader)
            toy.watch(runs[name].run)
            assert train(runs[name])
    memory, shards = runs["memory"].run, runs["shards"].run
    assert toy.seen(shards) == toy.seen(memory) and len(toy.seen(shards)) == 4
    for ours, theirs in zip(metrics(shards), metrics(memory), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert (memory / "latents-0.npz").is_file() and not list(shards.glob("*.npz"))
    assert (shards / "samples" / "0000004.png").is_file() and (shards / "export" / "branch").is_dir()


def test_two_buckets_killed_and_gone_on_with_bit_for_bit(whole, toys, two_buckets, watched, tmp_path, monkeypatch):  # noqa: F811
    finish(start(tmp_path, "10", "between saves", **toys(two_buckets)), -9)
    for name, value in toys(two_buckets).items():
        monkeypatch.setenv(name, value)
    assert watched(tmp_path)
    same(tmp_path, whole)
    parts = [{one.split("/")[0] for one in seen.split()} for seen in toy.seen(whole).values()]
    assert sorted(map(len, parts)) == [1] * 10 and set.union(*parts) == {"0", "1"}, "a batch is of one bucket"
    speed = [json.loads(line) for line in (whole / "speed.jsonl").read_text().splitlines()]
    assert sum("compile" in line["seconds"] for line in speed) >= 1 and all(line["left_out"] == 0 for line in speed)


def test_two_processes_take_what_one_does(whole, toys, two_buckets, tmp_path):
    for process in two(tmp_path, "10", **toys(two_buckets)):
        finish(process, 0)
    assert samples(tmp_path, 2) == samples(whole)
    for ours, theirs in zip(final_state(tmp_path), final_state(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_sets_have_the_shares_that_their_weights_say(squares, two_buckets, vae, tmp_path):
    """Pictures and precomputed latents together: in a bucket sample by sample, all fp16, whatever their numbers."""
    data = DataConfig(squares, (two_buckets,), weights=(1.0, 3.0), style=None)
    parts = Sets(data, "zh").latents(load_component(vae, "float32"), tmp_path)
    assert [part.bucket for part in parts] == [SQUARE, WIDE, SQUARE] and [len(p.indices) for p in parts] == [40, 24, 48]

    def keep(record, rng):
        return {"moments": record["moments"], NUMBER: record[NUMBER]}

    loader, counts = mix_loader(numbered(parts), keep, 10, 0), Counter()
    for _ in range(200):
        batch = next(loader)
        assert batch["moments"].dtype == np.float16
        counts.update(batch[NUMBER][:, 0].tolist())
    shares = np.array([counts[part] for part in range(3)]) / 2000
    assert np.abs(shares - [1 / 4, 3 / 4 * 24 / 72, 3 / 4 * 48 / 72]).max() < 0.01  # Grain rounds weights
    by_records = Sets(replace(data, weights=()), "zh").latents(load_component(vae, "float32"), tmp_path)
    assert {part.weight for part in by_records} == {None}


def damaged(folder, out, record):
    """A copy of shards, one record of whose first file is not as it was written."""
    shutil.copytree(folder, out)
    path = out / f"chunk-000000-{SQUARE[0]}x{SQUARE[1]}.array_record"
    data = bytearray(path.read_bytes())
    moments = open_moments(folder)[1].source[record]["moments"].tobytes()
    at = data.find(moments[:32])
    assert at > 0
    data[at] ^= 1
    path.write_bytes(data)
    return out


def test_a_damaged_record_is_counted_named_and_replaced(two_buckets, toys, whole, tmp_path):
    shards = damaged(two_buckets, tmp_path / "shards", 5)
    err = finish(start(tmp_path / "run", "10", **toys(shards)), 0)
    name = "chunk-000000-64x64.array_record record 5"
    (line,) = [line for line in err.splitlines() if line.startswith("records: ")]
    assert f" damaged record ({name})" in line and "left_out-0.jsonl" in line
    assert "  left out: " in err
    told = [json.loads(line) for line in (tmp_path / "run" / "left_out-0.jsonl").read_text().splitlines()]
    assert told[0]["record"] == name and told[0]["cause"] == "damaged record"
    speed = [json.loads(line) for line in (tmp_path / "run" / "speed.jsonl").read_text().splitlines()]
    assert speed[-1]["left_out"] == len(told)
    before, after = (" ".join(toy.seen(run).values()).split() for run in (whole, tmp_path / "run"))
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed and {a for a, _ in changed} == {"1/5"}, "only the damaged one is replaced"


def test_changed_shards_are_refused_with_both_values(two_buckets, pictures, encoded, toys, tmp_path):
    """As many records of the same sizes, of other pictures: told from the manifest, before anything is trained."""
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(two_buckets, shards)
    finish(start(run, "10", "SIGTERM", **toys(shards)), 3)
    shutil.rmtree(shards)
    shutil.copytree(encoded(pictures("other", 72, [SQUARE, WIDE, SQUARE]), (SQUARE, WIDE)), shards)
    err = finish(start(run, "10", **toys(shards)), 2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the data are not those of the checkpoint: the fingerprint of ArrayRecordSource" in line
    assert " was " in line and ", is " in line


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, backbone_folder):
    """A function from a config's name and arguments to (exit status, stderr) of train.py."""
    spec = importlib.util.spec_from_file_location("train_script", Path(__file__).parents[2] / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    branch = ("--task.backbone", backbone_folder, "--task.text-encoder", backbone_folder.parent / "tower")
    branch += ("--task.tokenizer", TOKENIZERS / "chinese", "--task.style-in-caption")

    def call(name, *arguments):
        own = branch if name == "emoji-branch" else ()
        every = (name, *own, "--run", tmp_path / "run", "--data.style", "None", "--data.concepts", "None", *arguments)
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, every)])
        return module.main(), capsys.readouterr().err

    return call


def test_what_does_not_fit_is_one_line_and_status_2(script, two_buckets, squares, encoded, vae, tmp_path):
    config = load_component(vae, "float32").config
    other = encoded(squares, component=Component(config, init(config, 5)))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(two_buckets, unfinished)
    (unfinished / "chunk-000002.json").unlink()
    cases = [
        (("emoji-branch", "--data.folder", other), f"{other} was precomputed with vae "),
        (("emoji-branch", "--data.folder", unfinished), "3 of 4 chunks are complete: run the same precompute"),
        (("emoji-branch", "--data.folder", squares, "--data.also", unfinished), "3 of 4 chunks are complete"),
        (("emoji-branch", "--data.folder", two_buckets, "--data.style", "fluent"), "all of which are trained on"),
        (("emoji-branch", "--data.folder", two_buckets, "--data.weights", "1", "2"), "for each of the 1 sets"),
        (("emoji-branch", "--data.folder", two_buckets, "--data.skip-rate", "2"), "data.skip_rate=2.0"),
        (("emoji-vae", "--data.folder", two_buckets), "holds precomputed latents, this training reads images"),
    ]
    for arguments, message in cases:
        status, err = script(*arguments, "--data.scenes", "None")
        (line,) = err.strip().splitlines()
        assert status == 2 and line.startswith("error: ") and message in line, line


def test_latents_of_a_half_precision_run_fit_the_same_autoencoder(squares, vae, tmp_path):
    """Computed in bf16, as on accelerators; the digest is that of the file's own weights."""
    component = load_component(vae, "float32")
    precompute(open_source(squares), tmp_path / "out", component, buckets=(SQUARE,), dtype="bfloat16")
    (part,) = Sets(DataConfig(tmp_path / "out"), "zh").latents(component, tmp_path)
    (exact,) = Sets(DataConfig(squares), "zh").latents(component, tmp_path)
    ours, theirs = (np.stack([p.source[i]["moments"] for i in range(40)]).astype(np.float32) for p in (part, exact))
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{difference:.1e}")
    assert 1e-4 < difference < 5e-2, "bfloat16 has 8 bits"


def test_a_saved_copy_of_the_autoencoder_is_the_same(vae, encoded, squares, tmp_path):
    save_component(tmp_path / "vae", *load_component(vae, "float32"), dtype="float32")
    assert Sets(DataConfig(encoded(squares)), "zh").latents(load_component(tmp_path / "vae", "float32"), tmp_path)
