"""Moments as shards: what they hold, going on after SIGKILL and with other processes, what is refused."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bdm_jax.data import captions, records
from bdm_jax.data.loader import mix_loader
from bdm_jax.data.moments import finished, open_moments
from bdm_jax.errors import UserError
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents import precompute
from bdm_jax.models.config import RobertaConfig, VAEConfig
from bdm_jax.models.functional import bind, init
from bdm_jax.paths import EMOJI, TOKENIZERS
from bdm_jax.systems.components import Component, load_component, save_component

COUNT = 60
SIZES = ((64, 64), (32, 96), (96, 32))
OPTIONS = ["--size", "32", "--chunk", "8", "--batch-size", "4", "--buckets", "--rate", "1"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    config = VAEConfig(block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=32)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    save_component(folder, config, init(config, 0), dtype="float32")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, picture, write_folder):
    rows = [{"image": picture(i, SIZES[i % 3]), "text": f"红灯笼{i}", "aesthetic": i / 2} for i in range(COUNT)]
    rows[7]["image"], rows[8]["text"] = b"", ""
    return write_folder(tmp_path_factory.mktemp("set") / "set", rows)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(precompute, "make_buckets", lambda size: ((16, 48), (32, 32), (48, 16)))


def content(folder):
    """File name -> digest, of everything that counts."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "left_out")))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vae, folder):
    """All of it, by one process without interruption."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "make_buckets", lambda size: ((16, 48), (32, 32), (48, 16)))
        assert precompute.main([str(folder), str(out), "--vae", str(vae), *OPTIONS]) == 0
    return out


def test_moments_are_those_of_the_autoencoder(whole, vae, folder):
    component, source = load_component(vae, "float32"), records.open_source(folder)
    by_name = {source[i]["key"]: source[i] for i in range(COUNT) if i not in (7, 8)}
    parts = open_moments(whole, precompute.digest(component))
    assert [part.bucket for part in parts] == [(16, 48), (32, 32), (48, 16)]
    encode, seen = jax.jit(lambda images: bind(component.config, component.params).encode(images)), set()
    for part in parts:
        for i in part.indices:
            record = part.source[i]
            picture = resize_to_cover(decode_image(by_name[record["key"]]["image"]), part.bucket)
            mean, logvar = encode(picture[None].astype(np.float32) / 127.5 - 1)
            expected = np.concatenate([mean, logvar], -1)[0]
            assert record["moments"].dtype == np.float16 and record["moments"].shape == expected.shape
            assert np.allclose(record["moments"], expected, rtol=2e-3, atol=2e-3)  # float16 has 11 bits
            assert record["captions"] == by_name[record["key"]]["captions"] and "image" not in record
            seen.add(record["key"])
    assert seen == set(by_name)
    counts = json.loads((whole / "chunk-000000.json").read_text())
    assert counts["left_out"] == {"empty file": 1} and counts["records"] == 8
    assert finished(whole)[1]["left_out"] == {"caption length": 1}
    assert json.loads((whole / "left_out-0-of-1.jsonl").read_text())["record"] == "00007.png"


def test_training_reads_them_bucket_by_bucket(whole):
    loader = mix_loader(open_moments(whole), lambda r, rng: {"moments": r["moments"], "size": r["bucket"]}, 4, 0)
    for _ in range(30):
        batch = next(loader)
        assert batch["moments"].shape[1:3] == (batch["size"][0][0] // 4, batch["size"][1][0] // 4)
    assert not loader.skips.total


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_write_the_same(whole, vae, folder, tmp_path, processes):
    for part in reversed(range(processes)):
        with pytest.raises(UserError, match="are complete") if part < processes - 1 else contextlib.nullcontext():
            open_moments(tmp_path) if part < processes - 1 else None
        assert (
            precompute.main([str(folder), str(tmp_path), "--vae", str(vae), *OPTIONS, "--part", f"{part}/{processes}"])
            == 0
        )
    assert content(tmp_path) == content(whole)


def test_goes_on_after_sigkill(whole, vae, folder, tmp_path):
    script = (
        "import sys, time; from bdm_jax.latents import precompute; from bdm_jax.data.moments import Chunk\n"
        "precompute.make_buckets = lambda size: ((16, 48), (32, 32), (48, 16))\n"
        "write = Chunk.write\n"
        "Chunk.write = lambda *a: (time.sleep(0.03), write(*a))\n"  # so that the kill meets it at work
        "sys.exit(precompute.main(sys.argv[1:]))"
    )
    arguments = [str(folder), str(tmp_path), "--vae", str(vae), *OPTIONS]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    limit = time.monotonic() + 60
    while not (tmp_path / "precompute.json").is_file() or len(finished(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(finished(tmp_path)) < 8
    with pytest.raises(UserError, match="of 8 chunks are complete: run the same precompute command again"):
        open_moments(tmp_path)
    before = {number: os.stat(tmp_path / f"chunk-{number:06d}.json").st_mtime_ns for number in finished(tmp_path)}
    assert precompute.main(arguments) == 0
    assert content(tmp_path) == content(whole)
    assert all(os.stat(tmp_path / f"chunk-{n:06d}.json").st_mtime_ns == when for n, when in before.items())


def test_what_does_not_fit_is_refused(whole, vae, folder, tmp_path, capsys):
    config = load_component(vae).config
    other = Component(config, init(config, 1))
    with pytest.raises(UserError, match="precomputed with vae [0-9a-f]+, this run has [0-9a-f]+"):
        open_moments(whole, precompute.digest(other))
    save_component(tmp_path / "other", *other, dtype="float32")
    assert precompute.main([str(folder), str(whole), "--vae", str(tmp_path / "other"), *OPTIONS]) == 2
    assert "with vae" in capsys.readouterr().err
    assert precompute.main([str(folder), str(whole), "--vae", str(vae), *OPTIONS, "--side", "9"]) == 2
    assert "with filters" in capsys.readouterr().err
    for wrong in (["--part", "2/2"], ["--part", "x"], ["--tokenizer", str(vae)], ["--chunk", "0"]):
        assert precompute.main([str(folder), str(tmp_path / "new"), "--vae", str(vae), *OPTIONS, *wrong]) == 2
    with pytest.raises(UserError, match="no precomputed latents"):
        open_moments(tmp_path)


def test_a_missing_file_is_named(vae, folder, tmp_path):
    assert precompute.main([str(folder), str(tmp_path), "--vae", str(vae), *OPTIONS]) == 0
    path = tmp_path / "chunk-000003-32x32.array_record"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="chunk-000003-32x32.array_record: missing or truncated"):
        open_moments(tmp_path)


def test_the_bundled_set_keeps_its_names_and_keywords(vae, tmp_path):
    """It has no captions; keywords stay a list also where there is one."""
    every = records.open_source(EMOJI)
    source = [every[i] for i in range(40)]
    few = type("Few", (list,), {"fingerprint": "x"})(source)
    precompute.precompute(few, tmp_path, load_component(vae, "float32"), buckets=((32, 32),), chunk=40)
    (part,) = open_moments(tmp_path)
    assert 1 in {len(record["zh_keywords"]) for record in source}, "the case is there"
    for before, after in zip(source, (part.source[i] for i in part.indices), strict=True):
        assert "image" not in after and bool(after["zh_only"]) == before["zh_only"]
        for language in ("zh", "en"):
            ours, theirs = (captions.caption(r, language, np.random.default_rng(1), True) for r in (after, before))
            assert ours == theirs and captions.name(after, language) == captions.name(before, language)


def test_text_states_come_along(vae, folder, tmp_path):
    tower = RobertaConfig(
        vocab_size=21128, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    save_component(tmp_path / "tower", tower, init(tower, 2), dtype="float32")
    text = ["--text-encoder", str(tmp_path / "tower"), "--tokenizer", str(TOKENIZERS / "chinese")]
    assert precompute.main([str(folder), str(tmp_path / "out"), "--vae", str(vae), *OPTIONS, *text]) == 0
    record = open_moments(tmp_path / "out")[0].source[0]
    assert record["states"].shape == (1, 16, 8) and record["states"].dtype == np.float16
