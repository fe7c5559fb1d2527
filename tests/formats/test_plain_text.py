import codecs
import warnings

import pytest

from bdm_jax.errors import UserError
from bdm_jax.formats.plain_text import EncodingNote, decode_text

TEXT = "红灯笼，雪\r\na red lantern\r\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-8"),
        codecs.BOM_UTF8 + TEXT.encode("utf-8"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
)
def test_marked_text_and_utf_8(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_text(data, "a.txt") == TEXT


@pytest.mark.parametrize("encoding", ["gbk", "gb2312", "gb18030"])
def test_gbk_is_noted(encoding):
    with pytest.warns(EncodingNote, match="a.txt: not UTF-8, read as GBK"):
        assert decode_text(TEXT.encode(encoding), "a.txt") == TEXT


def test_a_folder_is_noted_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for number in range(3):
            decode_text("红灯笼".encode("gbk"), f"folder/{number}.txt", noted_as="folder")
    assert [str(warning.message).partition(":")[0] for warning in caught] == ["folder"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ncaf\xe9 au lait\n", "a.txt, line 2: neither UTF-8 nor GBK"),
        (codecs.BOM_UTF16_LE + b"a\0\n\0\x00\xd8a\0", "a.txt, line 2: not UTF-16"),
        ("a red lantern".encode("utf-16-le"), "a.txt: no text, it holds NUL"),
        ("红灯笼\n".encode("utf-16-le"), "a.txt: no text, it holds NUL"),
        (codecs.BOM_UTF32_LE + "a".encode("utf-32-le"), "a.txt: no text, it holds NUL"),
    ],
)
def test_what_is_no_text(data, message):
    with pytest.raises(UserError, match=message):
        decode_text(data, "a.txt")
