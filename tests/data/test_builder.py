"""Any source as a prepared set: without Beam, and with it where it is installed."""

import importlib.util
import subprocess
import sys

import pytest

from bdm_jax.data import prepare, records


@pytest.fixture
def shards(tmp_path, picture, write_tar):
    for shard in range(3):
        samples = []
        for i in range(20):
            number = 20 * shard + i
            caption = "a lantern" if i == 3 else f"红灯笼{number}"
            samples.append({"jpg": b"" if number == 25 else picture(number, kind="JPEG"), "txt": caption.encode()})
        write_tar(tmp_path / f"a-{shard}.tar", samples, first=20 * shard)
    (tmp_path / "a-3.tar").write_bytes(b"no tar" * 200)
    return tmp_path / "a-{0..3}.tar"


def check(folder):
    source = records.open_source(folder / "image_text" / "1.0.0")
    found = {source[i]["captions"][0]: source[i] for i in range(len(source))}
    assert set(found) == {f"红灯笼{i}" for i in range(60) if i % 20 != 3 and i != 25} and len(source) == 56
    record = found["红灯笼7"]
    assert record["key"] == "a-0.tar/000007" and (record["height"], record["width"]) == (48, 64)


def test_without_beam(shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare.main([str(shards), str(out), "--language", "zh"]) == 0
    check(out)
    out = capsys.readouterr().out
    assert "56 records" in out and "left out: 1 empty file, 3 language, 1 unreadable file" in out
    assert prepare.main([str(tmp_path / "nothing"), str(tmp_path / "other")]) == 2
    if importlib.util.find_spec("apache_beam") is None:
        assert prepare.main([str(shards), str(tmp_path / "other"), "--beam"]) == 2
        assert "pip install apache-beam" in capsys.readouterr().err


def test_through_beam(shards, tmp_path):
    pytest.importorskip("apache_beam")
    command = [sys.executable, "-m", "bdm_jax.data.prepare", str(shards), str(tmp_path / "out"), "--language", "zh"]
    options = ["--runner", "DirectRunner", "--direct_num_workers", "2", "--direct_running_mode", "multi_processing"]
    subprocess.run([*command, "--beam", "--", *options], check=True, timeout=300)
    check(tmp_path / "out")
