"""Folders of images as kohya's and diffusers' users have them, and what is said of those that are otherwise."""

import csv
import io
import json

import fsspec
import numpy as np
import pytest

from bdm_jax.data import captions, folders
from bdm_jax.data.records import open_source
from bdm_jax.errors import BadRecord, UserError


def write(folder, files):
    """Relative path -> content, as text or bytes."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def keys(source):
    """Key -> captions."""
    return {source[i]["key"]: source[i]["captions"] for i in range(len(source))}


def test_captions_lie_beside_the_images_under_any_ending(tmp_path, picture):
    image = picture(1)
    folder = write(
        tmp_path,
        {
            "p1.png": image,
            "p1.txt": "红灯笼\n\n灯笼\n",
            "p2.JPG": image,
            "p2.caption": "猫",
            "p3.png": image,
            "p3.TXT": "雪山",
            "P4.webp": image,
            "p4.Caption": "龙",
            "p5.bmp": image,
            "p5.txt": "桥",
            "p5.caption": "一座桥",
            "p6.tiff": image,
            "p7.gif": image,
            "p7.txt": "熊猫".encode("utf-16"),
            "p8.png": image,
            "p8.txt": "北京的红灯笼".encode("gbk"),
            "readme.md": "x",
            ".hidden.png": image,
        },
    )
    with pytest.warns(UserWarning, match="not UTF-8, read as GBK"):
        found = keys(open_source(folder))
    assert found == {
        "P4.webp": ["龙"],
        "p1.png": ["红灯笼", "灯笼"],
        "p2.JPG": ["猫"],
        "p3.png": ["雪山"],
        "p5.bmp": ["一座桥", "桥"],
        "p6.tiff": [],
        "p7.gif": ["熊猫"],
        "p8.png": ["北京的红灯笼"],
    }


def test_kohyas_folders_repeat_and_name_their_images(tmp_path, picture):
    files = {"10_红灯笼/a.png": picture(1), "10_红灯笼/b.png": picture(2), "10_红灯笼/b.txt": "一盏灯"}
    files |= {"2_sks dog_big/c.png": picture(3), "猫/d.png": picture(4), "0_none/e.png": picture(5), "empty/x.md": "x"}
    with pytest.warns(UserWarning, match="images of 0_none are not read"):
        source = open_source(write(tmp_path, files))
    assert keys(source) == {
        "10_红灯笼/a.png": ["红灯笼"],
        "10_红灯笼/b.png": ["一盏灯"],
        "2_sks dog_big/c.png": ["sks dog_big"],
        "猫/d.png": ["猫"],
    }
    assert source.repeats.tolist() == [10, 10, 2, 1]
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), f"/{tmp_path.name}", recursive=True)
    with pytest.warns(UserWarning, match="images of 0_none"):
        assert keys(open_source(f"memory://{tmp_path.name}")) == keys(source)
    write(tmp_path, {"stray.png": picture(6)})
    with pytest.warns(UserWarning) as notes:
        assert keys(open_source(tmp_path)) == keys(source)
    assert any("images beside them, which are not read: stray.png" in str(note.message) for note in notes)
    write(tmp_path, {"99999999999_x/a.png": picture(1)})
    with pytest.warns(UserWarning), pytest.raises(UserError, match=rf"{tmp_path}/99999999999_x: .*at most 10000"):
        open_source(tmp_path)


def test_what_lies_beside_or_above_a_set_points_to_it(tmp_path, picture):
    project = write(tmp_path / "project", {"img/10_sks dog/a.png": picture(1), "log/x.md": "x", "model/x.md": "x"})
    with pytest.raises(UserError, match=f"images lie in img/10_sks dog: give {project}/img$"):
        open_source(project)
    folder = write(tmp_path / "set", {"a.png": picture(1), "metadata.jsonl": "{}"})
    for name in ("a.png", "metadata.jsonl"):
        with pytest.raises(UserError, match=f"{name} is a file of a set: give its folder, {folder}$"):
            open_source(folder / name)


def test_images_beside_folders_are_what_is_read_and_that_is_said(tmp_path, picture):
    folder = write(tmp_path, {"a.png": picture(1), "masks/a.png": picture(2), "notes/x.md": "x"})
    with pytest.warns(UserWarning, match="which are not read: masks$"):
        assert list(keys(open_source(folder))) == ["a.png"]


def test_what_is_no_set_says_what_was_found(tmp_path):
    folder = write(tmp_path, {"a.heic": "x", "b.heic": "x", "a.TXT": "x", "inner/b.md": "x"})
    with pytest.raises(UserError, match=r"expected .*\.jpg.*\.tiff\); found 2 \.heic, 1 \.txt, 1 folders"):
        open_source(folder)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            [],
            r"10_/x\.png: no caption is .* x.txt or x.caption beside x.png \(the folder's name 10_ gives none\)",
        ),
        (["a cat", "dog"], r"x\.png: none of 2 captions is in Chinese: 'a cat'; a branch reads Chinese"),
    ],
)
def test_a_missing_caption_says_what_was_expected(texts, message):
    with pytest.raises(BadRecord, match=message):
        captions.of_language({"key": "10_/x.png", "captions": texts}, "zh")


ROWS = [
    ("00.png", "红灯笼, 两盏", "5.5"),
    ("inner/01.png", 'a "red" lantern\nin two lines', ""),
    ("02.png", "2024", "7"),
]


def table(rows, columns=("file_name", "text", "aesthetic"), **options):
    out = io.StringIO()
    csv.writer(out, **options).writerows([columns, *rows])
    return out.getvalue()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_metadata_is_read_as_its_lines_are(tmp_path, picture, mark, end):
    """The same records from metadata.csv and metadata.jsonl."""
    images = {name: picture(number) for number, (name, *_) in enumerate(ROWS)}
    one = write(tmp_path / "csv", {**images, "metadata.csv": mark + table(ROWS, lineterminator=end) + end})
    lines = [
        {"file_name": name, "text": text, **({"aesthetic": float(score)} if score else {})}
        for name, text, score in ROWS
    ]
    other = write(tmp_path / "jsonl", {**images, "metadata.jsonl": "\n".join(map(json.dumps, lines))})
    ours, theirs = open_source(one), open_source(other)
    assert [ours[i] for i in range(3)] == [theirs[i] for i in range(3)]
    assert len(ours) == 3 and ours[2]["captions"] == ["2024"] and ours[0]["aesthetic"] == 5.5
    write(one, {"metadata.jsonl": "{}"})
    with pytest.warns(UserWarning, match="holds metadata.jsonl and metadata.csv: the first is read"):
        open_source(one)


def test_a_table_keeps_to_its_folder_and_damage_costs_one_row(tmp_path, picture):
    outside = write(tmp_path, {"outside.png": picture(1)}) / "outside.png"
    rows = [
        ("../outside.png", "x"),
        (str(outside), "x"),
        ("missing.png", "x"),
        ("a.png",),
        ("a.png", "b", "c"),
        ("", "x"),
    ]
    rows += [("a.png\0", "x"), ("a.png", "好")]
    text = table(rows, ("file_name", "text")).encode() + b"a.png,\xff\xff\xff\n"
    source, causes = open_source(write(tmp_path / "set", {"a.png": picture(2), "metadata.csv": text})), []
    for i in range(len(source)):
        try:
            assert source[i]["captions"] == ["好"]
            causes.append(None)
        except BadRecord as error:
            causes.append(error.cause)
    assert causes[:3] == ["outside the folder"] * 2 + ["missing file"]
    assert causes[3:] == ["invalid metadata"] * 4 + [None, "invalid metadata"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must name the columns, file_name among them, each once; found nothing"),
        (b"file_name;text\na.png;x\n", "columns are separated by commas; this file has semicolons"),
        (b'"file_name";"text"\n"a.png";"x"\n', "this file has semicolons"),
        (b"file_name\ttext\na.png\tx, y\n", "this file has tabs"),
        (b"file_name,file_name\n", "each once"),
        (b"image,text\n" + b"a.png,x\n" * 5, "found 'image', 'text'"),
        (b'file_name,text\na.png,"never closed\n' + b"b.png,x\n" * 9, "line 11: unexpected end of data"),
        (b"file_name,text\na.png," + b"x" * 200_000, "line 2: field larger than field limit"),
        (b"file_name,text\na.png," + b"x" * 2_000_000, "a line of more than 1 MiB"),
        (b'file_name,text\na.png,"' + b"x\n" * 200_000, "field larger than field limit"),
        (b"file_name," + b",".join(b"c%d" % i for i in range(2000)), "each once"),
        ("file_name,text\n".encode("utf-16"), "must name the columns"),
        (b"\0" * 4096, "must name the columns"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "line|must name"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, content, message):
    write(tmp_path, {"metadata.csv": content})
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path)
    assert str(tmp_path / "metadata.csv") in str(error.value) and len(str(error.value)) < 500


def test_random_tables_end_in_records_or_one_line(tmp_path, rng):
    """Bytes that mean something to a reader of csv, in any order."""
    pieces = [b'"', b",", b"\n", b"\r", b"a.png", b"\xff", b"\0", "灯".encode(), b'""', b"file_name"]
    for _ in range(300):
        body = b"".join(pieces[i] for i in rng.integers(len(pieces), size=40))
        (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n" + body)
        try:
            source = open_source(tmp_path)
            for i in range(len(source)):
                with pytest.raises(BadRecord):
                    source[i]
        except UserError:
            continue


@pytest.mark.parametrize("kind", ["photos", "kohya", "jsonl", "csv", "tar"])
def test_contents_see_what_is_replaced_in_place_and_no_copy(tmp_path, picture, write_tar, kind):
    """An image or a caption of as many bytes under its name; a copy elsewhere, with other times, is the same."""

    def make(folder, image, text):
        if kind == "tar":
            folder.mkdir()
            write_tar(folder / "a.tar", [{"png": image, "txt": text.encode()}])
        inner = "3_x/" if kind == "kohya" else ""
        files = {
            "photos": {"a.txt": text},
            "kohya": {"3_x/a.txt": text},
            "jsonl": {"metadata.jsonl": json.dumps({"file_name": "a.png", "text": text})},
            "csv": {"metadata.csv": table([("a.png", text)], ("file_name", "text"))},
        }.get(kind)
        return open_source(folder if files is None else write(folder, {f"{inner}a.png": image, **files}))

    one, other = picture(1), picture(2)
    assert len(one) == len(other) and one != other
    first = make(tmp_path / "a", one, "红灯笼")
    assert make(tmp_path / "b", one, "红灯笼").contents() == first.contents()
    assert make(tmp_path / "c", other, "红灯笼").contents() != first.contents()
    assert make(tmp_path / "d", one, "红灯泡").contents() != first.contents()
    assert len(np.unique([len(first.contents()), 32])) == 1


def test_large_sets_are_told_apart_by_parts_of_their_files(tmp_path, monkeypatch, rng):
    from bdm_jax.data import contents

    monkeypatch.setattr(contents, "_WHOLE", 0)
    fs, data = fsspec.filesystem("file"), bytearray(rng.bytes(3 << 20))
    path, text = tmp_path / "a.bin", tmp_path / "a.txt"
    path.write_bytes(data)
    text.write_text("灯")
    before = contents.digest_files(fs, [str(path), str(text)])
    assert contents.digest_files(fs, [str(path), str(text)]) == before
    for at in (0, len(data) // 15 * 4, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert contents.digest_files(fs, [str(path), str(text)]) != before
    path.write_bytes(data)
    assert contents.digest_files(fs, [str(path), str(text)]) == before
    assert contents.digest_files(fs, [str(path), str(tmp_path / "gone")]) != before


def test_nothing_of_a_table_is_kept_but_offsets(tmp_path, picture):
    rows = [("a.png", "红灯笼" * 20)] * 5000
    source = open_source(write(tmp_path, {"a.png": picture(1), "metadata.csv": table(rows, ("file_name", "text"))}))
    assert len(source) == 5000 and source[4999]["captions"] == ["红灯笼" * 20]
    assert source._starts.nbytes == 40_000 and folders._MAX_LINE == 1 << 20
