"""Every kind of source gives the same records; damage is found, named and costs nothing else."""

import json
import tarfile
import tracemalloc

import fsspec
import numpy as np
import pytest

from bdm_jax.data import records, tars
from bdm_jax.data.builder import ImageText
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import decode_image

COUNT = 10


@pytest.fixture
def rows(picture):
    kinds = ["PNG", "JPEG", "WEBP"]
    return [
        {"image": picture(i, kind=kinds[i % 3]), "captions": [f"红灯笼{i}", f"lantern {i}"], "aesthetic": 5.5}
        for i in range(COUNT)
    ]


def samples(rows):
    kinds = ["png", "jpg", "webp"]
    for number, row in enumerate(rows):
        metadata = {"caption": row["captions"][1], "aesthetic": row["aesthetic"]}
        yield {
            kinds[number % 3]: row["image"],
            "txt": row["captions"][0].encode() + b"\n",
            "json": json.dumps(metadata).encode(),
        }


@pytest.fixture(params=["tar", "folder", "array_record", "tfds", "bucket tar", "bucket folder"])
def source(request, tmp_path, rows, write_tar, write_folder, write_array):
    kind = request.param.split()[-1]
    if kind == "tar":
        every = list(samples(rows))
        write_tar(tmp_path / "a-000.tar", every[:6])
        write_tar(tmp_path / "a-001.tar", every[6:], first=6)
    elif kind in ("folder", "tfds"):
        write_folder(tmp_path / "train", rows)
    else:
        write_array(tmp_path / "x.array_record-00000-of-00002", rows[:4])
        write_array(tmp_path / "x.array_record-00001-of-00002", rows[4:])
    if kind == "tfds":
        builder = ImageText(source=str(tmp_path / "train"), data_dir=tmp_path / "out")
        builder.download_and_prepare()
        return records.open_source(builder.data_dir)
    if not request.param.startswith("bucket"):
        return records.open_source(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    return records.open_source(f"memory://{tmp_path.name}", cache=tmp_path / "cache")


def test_every_kind_gives_the_same_records(source, rows):
    assert len(source) == COUNT and source.fingerprint
    found = sorted((source[i] for i in range(COUNT)), key=lambda record: record["captions"][0])
    for record, row in zip(found, sorted(rows, key=lambda row: row["captions"][0]), strict=True):
        assert record["image"] == row["image"] and set(record["captions"]) == set(row["captions"])
        assert record["aesthetic"] == 5.5
    assert len({record["key"] for record in found}) == COUNT
    for wrong in (-1, COUNT):
        with pytest.raises((IndexError, ValueError)):
            source[wrong]


def test_patterns_and_what_cannot_be_opened(tmp_path, rows, write_tar):
    every = list(samples(rows))
    for number in range(3):
        write_tar(tmp_path / f"a-{number:03d}.tar", every)
    assert len(records.open_source(tmp_path / "a-{001..002}.tar")) == 2 * COUNT
    assert len(records.open_source(tmp_path / "a-00[01].tar")) == 2 * COUNT
    assert len(records.open_source(tmp_path / "a-000.tar")) == COUNT
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "short.tar").write_bytes(b"no tar" * 100)
    (tmp_path / "b.array_record").write_bytes(b"no array_record" * 9999)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "text.txt")
    for name, message in {
        "a-{001..003}.tar": "1 of 3 files are missing, the first one: .*a-003.tar",
        "none-*.tar": "no files match",
        "nowhere": "no such file",
        "empty": "holds no records",
        "text.txt": "one kind at a time",
        "short.tar": "no tar files with samples.*not a tar file.*short.tar",
        "packed.tar": "compressed shards",
        "b.array_record": "cannot be read as array_record",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            records.open_source(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_store_that_cannot_be_asked_is_not_one_that_has_nothing(monkeypatch):
    with pytest.raises(UserError, match="^memory://none: no such file or folder"):
        records.open_source("memory://none")

    def refuses(*_, **__):
        raise PermissionError("Anonymous caller\ndoes not have access")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuses)
    with pytest.raises(UserError, match="^memory://none: cannot be asked for: Anonymous caller does not have access$"):
        records.open_source("memory://none")

    def needs(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", needs)
    with pytest.raises(UserError, match=r"^gs://bucket/set: Please install gcsfs .* \(install it with pip\)$"):
        records.open_source("gs://bucket/set")


def test_the_index_is_made_once_and_again_for_another_shard(tmp_path, rows, write_tar, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(rows))
    records.open_source(path)
    scan, monkeypatched = tars._scan, monkeypatch.setattr
    monkeypatched(tars, "_scan", None)
    assert len(records.open_source(path)) == COUNT
    monkeypatched(tars, "_scan", scan)
    write_tar(path, list(samples(rows))[:4])
    assert len(records.open_source(path)) == 4


def test_a_damaged_tar_loses_only_what_is_damaged(tmp_path, rows, write_tar):
    every = list(samples(rows))
    every[2] = {"txt": b"no picture"}
    path = write_tar(tmp_path / "a.tar", every)
    with tarfile.open(path) as tar:
        at = {member.name: member.offset for member in tar}
    data = bytearray(path.read_bytes())
    data[at["000005.webp"] : at["000005.webp"] + 512] = bytes(range(256)) * 2  # a header
    path.write_bytes(data[: at["000009.txt"] - 100])
    source = records.open_source(path)
    captions = [source[i]["captions"][0] for i in range(len(source))]
    assert captions == [f"红灯笼{i}" for i in (0, 1, 3, 4, 6, 7, 8)]
    left_out = {
        "no image": ["a.tar/000002", "a.tar/000005"],
        "truncated shard": ["a.tar/000009"],
        "no end-of-archive marker": ["a.tar"],
    }
    assert source.left_out == left_out


def test_a_damaged_array_record_loses_only_what_is_damaged(tmp_path, rows, write_array, rng):
    rows = [{**row, "noise": [float(x) for x in rng.random(500)]} for row in rows]
    path = write_array(tmp_path / "a.array_record", rows + [b"no example \xff", b""])
    data = bytearray(path.read_bytes())
    data[data.find(rows[5]["image"]) + 50] ^= 1
    path.write_bytes(data)
    source, bad = records.open_source(path), {}
    for i in range(len(source)):
        try:
            assert source[i]["captions"][0] == f"红灯笼{i}"
        except BadRecord as error:
            bad[i] = error.cause
    assert bad == {5: "damaged record", 10: "damaged record", 11: "no image"}


def test_a_folder_keeps_to_itself(tmp_path, rows, write_folder):
    folder = write_folder(tmp_path / "set", rows[:1])
    outside = tmp_path / "outside.png"
    outside.write_bytes(rows[0]["image"])
    (folder / "link.png").symlink_to(outside)
    lines = [
        {"file_name": "../outside.png"},
        {"file_name": str(outside)},
        {"file_name": "link.png"},
        {"file_name": "missing.png"},
        {"text": "no name"},
        {"file_name": "00000.png", "text": 7},
    ]
    text = "\n".join([*map(json.dumps, lines), "{broken", "[1]", "\xff"])
    (folder / "metadata.jsonl").write_text(text, encoding="latin-1")
    source, causes = records.open_source(folder), []
    for i in range(len(source)):
        with pytest.raises(BadRecord) as error:
            source[i]
        causes.append(error.value.cause)
    assert causes == ["outside the folder"] * 3 + ["missing file"] + ["invalid metadata"] * 5


def test_memory_does_not_grow_with_the_shards(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", ({"jpg": b"x" * 700, "txt": b"y"} for _ in range(3000)))
    tracemalloc.start()
    source = records.open_source(path)
    for i in range(0, 3000, 10):
        source[i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 3000 and isinstance(source._ranges, np.memmap)
    assert peak < 4e6 < path.stat().st_size


@pytest.mark.parametrize(
    "cause", ["empty file", "unsupported format", "corrupt image", "too large", "CMYK", "16-bit", "multi-page"]
)
def test_strict_decoding_names_the_cause(faults, cause):
    for data in faults[cause]:
        with pytest.raises(BadRecord, match="record 7") as error:
            decode_image(data, name="record 7", strict=True)
        assert error.value.cause == cause


def test_animations_are_refused(faults):
    for data in faults["animated"]:
        with pytest.raises(BadRecord) as error:
            decode_image(data, strict=True)
        assert error.value.cause == "animated"
        assert decode_image(data).shape == (16, 16, 3)
