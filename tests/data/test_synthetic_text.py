"""The command that makes sets of pictures of text."""

from bdm_jax.data import synthetic_text
from bdm_jax.data.records import open_source


def test_words_of_a_file(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("山水\n\n灯\n山水\n", "utf-8")
    arguments = [str(tmp_path / "set"), "--words", str(tmp_path / "words.txt"), "--count", "3"]
    assert synthetic_text.main([*arguments, "--sheet", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("3 pictures of 2 words") and (tmp_path / "a.png").is_file()
    source = open_source(tmp_path / "set")
    assert source.rules.words == ("山水", "灯") and len(source) == 3
    assert synthetic_text.main([str(tmp_path / "set"), "--words", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_words_of_the_bundled_set():
    words = synthetic_text.bundled_words()
    assert "红灯笼" in words and len(words) > 4000 and max(map(len, words)) == 4
