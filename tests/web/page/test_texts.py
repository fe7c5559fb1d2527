"""The page's language, and that both say everything."""

import pytest

from bdm_jax.web.page.texts import language_of, table


@pytest.mark.parametrize(
    "accepted, language",
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh", "zh"),
        ("zh-Hant-TW", "zh"),
        ("en-US,zh;q=0.5", "en"),
        ("de", "en"),
        ("zha", "en"),
        ("", "en"),
        (None, "en"),
    ],
)
def test_the_first_language_decides(accepted, language):
    assert language_of(accepted) == language


def test_both_languages_have_the_same_placeholders():
    chinese, english = table("zh"), table("en")
    for key, text in chinese.items():
        assert text and english[key]
        names = [
            {name for name in ("{n}", "{total}", "{name}", "{kind}", "{strength}") if name in one}
            for one in (text, english[key])
        ]
        assert names[0] == names[1], key
