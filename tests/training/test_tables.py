"""Sets on the device: the same samples in the same order, and a training that is the loader's, bit for bit."""

import os
import zlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy
from test_survival import final_state, finish, metrics, same, start

from bdm_jax.bench.feed import samples_per_second
from bdm_jax.data.loader import MixturePart, mix_loader
from bdm_jax.data.source import Skips
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.formats.files import read_json
from bdm_jax.paths import TOKENIZERS
from bdm_jax.runtime.sharding import make_mesh
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training import feed, loop, tables
from bdm_jax.training.config import DataConfig
from bdm_jax.training.feed import Feed, steps_per_call
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.sample import Sample
from bdm_jax.training.position import NUMBER, numbered
from bdm_jax.training.tables import tables_of

STEPS = 200


class Photos:
    """Records with one to three captions; some cannot be read, some have no caption, some a damaged image."""

    def __init__(self, name, count):
        self.name, self.count, self.fingerprint = name, count, name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        key = f"{self.name}/{index}"
        if index % 11 == 3:
            raise BadRecord(key, "unreadable", "of the storage")
        texts = [f"灯笼{'红' * (index % 5)}{i}" for i in range(1 + index % 3)]
        return {"key": key, "captions": [] if index % 13 == 5 else texts, "damaged": index % 17 == 7}


def read(record):
    if record["damaged"]:
        raise BadRecord(record["key"], "damaged", "the image")
    rng = np.random.default_rng(zlib.crc32(record["key"].encode()))
    return {"image": rng.integers(0, 256, (4, 6, 3), np.uint8), "moments": rng.normal(size=(2, 2)).astype(np.float16)}


@pytest.fixture(scope="module")
def sample():
    """Two prompts, dropped captions, mirrored images: everything that is drawn."""
    captions = Captions(Tokenizer.from_pretrained(TOKENIZERS / "chinese"), "zh", 0.2, prompts=("{}", "一张{}的照片"))
    return Sample(read, captions, "branch", mirrored=True)


@pytest.fixture
def training(sample):
    parts = [
        MixturePart(Photos("a", 40), range(40), 1.0),
        MixturePart(Photos("b", 25), np.repeat(np.arange(5, 25), 3), 2.5),  # every record three times
    ]
    return SimpleNamespace(sample=sample, parts=parts)


def open_one(training, made, skips, start_step=0):
    parts, sample = (training.parts, training.sample) if made is None else (made.parts, made.deal)
    loader = mix_loader(
        numbered(parts),
        lambda record, rng: {**sample(record, rng), NUMBER: record[NUMBER]},
        8,
        3,
        start_step,
        skips=skips,
        light=made is not None,
    )
    return Feed(loader, make_mesh(), made)


@pytest.mark.parametrize("count", [1, 4])
def test_batches_are_the_loader_s(training, capsys, tmp_path, count):
    """Every array, every record's number, over some epochs; bad records leave the same places to the same others."""
    skips = [Skips(1.0, tmp_path / name) for name in ("loader", "device")]
    made = tables_of(training, True, 0, make_mesh())
    assert "the sets lie on the device: 46 records" in capsys.readouterr().err
    feeds = [open_one(training, one, skip) for one, skip in zip((None, made), skips, strict=True)]
    places = np.arange(8, dtype=np.int32)
    for _ in range(80 // count):
        (ours, numbers), (theirs, expected) = (one.take(count, places) for one in reversed(feeds))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert found.dtype == wanted.dtype and found.sharding == wanted.sharding
            np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(numbers, expected)
    left_out = [{*skip.log.read_text().splitlines()} for skip in skips]  # the order is that of the loader's threads
    assert left_out[0] == left_out[1] and {len(skip.counts) for skip in skips} == {3}


def test_what_does_not_fit_is_read_as_it_is_needed(training, sample, capsys, monkeypatch):
    def refused(changed, samples=10**6):
        assert tables_of(changed, None, samples, make_mesh()) is None
        line = capsys.readouterr().err
        assert line.startswith("the sets are read as they are needed: ") and line.count("\n") == 1
        return line

    assert "reads 50 samples" in refused(training, 50)
    assert "reads 90 samples" in refused(training, 90)  # fewer than records and texts
    assert (
        tables_of(training, True, 50, make_mesh()) is not None
        and tables_of(training, None, 10**6, make_mesh()) is not None
    )
    capsys.readouterr()
    buckets = [replace(part, bucket=(8, 8 * i)) for i, part in enumerate(training.parts, 1)]
    assert "several buckets" in refused(SimpleNamespace(sample=sample, parts=buckets))
    assert "every sample anew" in refused(SimpleNamespace(sample=partial(sample), parts=training.parts))
    prompts = replace(sample, captions=replace(sample.captions, prompts=("{}", "一张照片")))
    assert "used without captions" in refused(SimpleNamespace(sample=prompts, parts=training.parts))
    shapes = replace(sample, read=lambda record: {"x": np.zeros(len(record["captions"]))})
    assert "several shapes" in refused(SimpleNamespace(sample=shapes, parts=training.parts))
    assert tables_of(training, False, 10**6, make_mesh()) is None and not capsys.readouterr().err

    monkeypatch.setattr(tables, "_free_memory", lambda: 30_000)
    assert "0.0 MB may be used, 25% of what is free" in refused(training)
    with pytest.raises(UserError, match=r"^data.on_device=True: they take 0.0 MB or more.*; leave it out"):
        tables_of(training, True, 10**6, make_mesh())


def test_a_call_ends_where_something_is_due(tmp_path):
    config = toy.config(tmp_path, log_every=20, sample_every=500, checkpoint_every=30)
    assert [steps_per_call(replace(config, steps_per_call=most), None, 1) for most in (1, 4, 9, 10, 99)] == [
        1,
        2,
        5,
        10,
        10,
    ]
    assert steps_per_call(config, None, 3) == 1
    with pytest.raises(UserError, match="steps_per_call=5: with batches of several shapes"):
        steps_per_call(replace(config, steps_per_call=5), None, 3)


@pytest.fixture
def session(monkeypatch):
    """A function that trains in this process, on from where the run is, until it dies after a step, if one is given."""

    class Killed(Exception):
        pass

    def run(folder, on_device, stop=None, **changes):
        folder.mkdir(exist_ok=True)
        data = DataConfig(style="fluent", concepts=50, on_device=on_device)
        values = {"task": toy.ToyTask(words=True), "data": data, "log_every": 10, "checkpoint_every": 50, **changes}
        with monkeypatch.context() as patch:
            patch.setattr(feed, "mix_loader", feed.mix_loader)  # undone after the session
            toy.watch(folder)
            step = loop._Session._step

            def until(self):
                if self.at == stop:
                    raise Killed
                step(self)

            patch.setattr(loop._Session, "_step", until)
            if stop is None:
                return train(toy.config(folder, STEPS, **values))
            with pytest.raises(Killed):
                train(toy.config(folder, STEPS, **values))

    return run


def test_a_training_is_the_loader_s_bit_for_bit(session, tmp_path, capfd):
    """200 steps, ten in a call: on the device until it dies after 60, through the loader from 50 until it dies after
    110, on the device again from 100; against all of them through the loader, ten in a call, and each in its own.
    """
    one, whole, mixed = (tmp_path / name for name in ("one", "whole", "mixed"))
    session(whole, False, steps_per_call=10)
    assert "one call takes" not in capfd.readouterr().err
    session(mixed, True, 60, steps_per_call=10)
    assert "one call takes up to 10 steps\n" in capfd.readouterr().err
    session(mixed, False, 110, steps_per_call=10)
    session(mixed, None, steps_per_call=10)
    same(mixed, whole, STEPS)
    session(one, None)
    assert toy.seen(one) == toy.seen(whole)
    for ours, theirs in zip(metrics(one), metrics(whole), strict=True):  # another program may round elsewhere
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(final_state(one, STEPS), final_state(whole, STEPS), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_on_eight_devices_it_is_too(tmp_path):
    """The same with a mesh of 2 x 4, killed (SIGKILL) after 60 and ended (SIGTERM) after 111."""
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    eight = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    beside = start(whole, str(STEPS), **eight, TOY_ON_DEVICE="False")
    told = finish(start(mixed, str(STEPS), "after 60: SIGKILL", **eight, TOY_ON_DEVICE="True"), -9)
    assert "the sets lie on the device: 50 records" in told
    finish(start(mixed, str(STEPS), "after 110: SIGTERM", **eight, TOY_ON_DEVICE="False"), 3)
    assert (mixed / "checkpoints" / "111").is_dir()
    finish(start(mixed, str(STEPS), **eight, TOY_ON_DEVICE="True"), 0)
    finish(beside, 0)
    same(mixed, whole, STEPS)


def test_a_loss_that_is_not_finite_names_step_and_samples(session, tmp_path, monkeypatch):
    """In the middle of a call: the same as through the loader, step by step."""
    read, told = toy._read, {}

    def spoilt(record):
        row = read(record)
        return {**row, "x": row["x"] * np.nan} if zlib.crc32(row["x"].tobytes()) % 10 == 1 else row

    monkeypatch.setattr(toy, "_read", spoilt)
    for name, changes in (("loader", {}), ("device", {"steps_per_call": 10})):
        with pytest.raises(UserError, match=r"^step \d+: loss nan"):
            session(tmp_path / name, name == "device", **changes)
        told[name] = read_json(tmp_path / name / "not_finite.json")
    assert told["loader"] == told["device"] and len(told["loader"]["samples"]) == 16


def test_both_ways_are_measured_side_by_side(tmp_path):
    """The host deals out numbers faster than it makes rows: a caption to tokenize costs more than both draws."""
    config = toy.config(tmp_path, task=toy.ToyTask(words=True))
    rates = samples_per_second(config, seconds=0.3)
    assert rates["device"]["host"] > 1.5 * rates["loader"]["host"] > 0
    assert all(rates[name]["batches"] > 0 for name in ("loader", "device"))
    assert not list(tmp_path.iterdir())
