"""What every command does with its flags, its errors and its exit status."""

import importlib
import io
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jax.errors import JaxRuntimeError
from rich.console import Console

from bdm_jax import command_line
from bdm_jax.errors import FileError, UserError

COMMANDS = [
    *("commands.sample", "commands.train", "convert.__main__", "plan.command", "bench.__main__", "bench.feed"),
    *("bench.server", "web.__main__"),
    *("evaluate.__main__", "evaluate.approximations", "evaluate.phases", "evaluate.writing", "app.compare"),
    *("latents.precompute", "data.prepare", "data.grade", "data.synthetic_text"),
    *("data.emoji.make_tokenizers", "data.emoji.render_emoji", "configs.demo"),
]


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    """how deep"""


@dataclass(frozen=True)
class Folders:
    """Try."""

    source: command_line.tyro.conf.Positional[str]


@dataclass(frozen=True)
class Flags:
    """Try."""

    name: str = "x"
    loud: bool = False
    inner: Inner = field(default_factory=Inner)


def test_flags_have_no_prefix_and_no_counterpart(capsys):
    assert command_line.parse(Flags, ["--depth", "3", "--loud"]) == Flags(loud=True, inner=Inner(3))
    with pytest.raises(SystemExit) as stopped:
        command_line.parse(Flags, ["--help"], prog="try.py")
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "usage: try.py" in out and "how deep" in out and "--no-loud" not in out


@pytest.mark.parametrize(
    ("args", "message"), [(["--depht", "3"], "--depth"), (["--depth", "deep"], "--depth"), (["--name"], "--name")]
)
def test_a_wrong_flag_is_one_line(args, message, capsys):
    with pytest.raises(UserError, match=message) as error:
        command_line.parse(Flags, args)
    assert "\n" not in str(error.value) and "│" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@dataclass(frozen=True)
class Optional:
    """Try."""

    scenes: int | None = None
    share: float | None = None
    folder: Path | None = None
    sure: bool | None = None
    part: Literal["b", "a"] | None = None
    size: Literal["auto"] | int = "auto"
    count: int = 1
    rate: float = 1.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scenes", "1.5"], "--scenes 1.5: expected a whole number, or None"),
        (["--scenes=it's"], "--scenes it's: expected a whole number, or None"),
        (["--share", "half"], "--share half: expected a number, or None"),
        (["--sure", "x"], "--sure x: expected one of False, True, None"),
        (["--part", "z"], "--part z: expected one of a, b, None"),
        (["--size", "z"], "--size z: expected a whole number, or auto"),
        (["--count", "1.5"], "--count 1.5: expected a whole number"),
        (["--rate", "x"], "--rate x: expected a number"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_is_expected(args, message):
    with pytest.raises(UserError) as error:
        command_line.parse(Optional, args)
    assert str(error.value) == message


def test_optional_values_may_be_none():
    given = ["--scenes", "None", "--share", "0.5", "--folder", "a", "--sure", "True", "--part", "b"]
    assert command_line.parse(Optional, given) == Optional(None, 0.5, Path("a"), True, "b")
    assert command_line.parse(Optional, ["--folder", "None", "--sure", "None", "--part", "None"]) == Optional()


def test_the_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["try.py", "--name", "y"])
    assert command_line.parse(Flags, None).name == "y"


def test_statuses(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def fails(error):
        raise error

    assert command_line.run(lambda: None) == 0 and command_line.run(lambda: 3) == 3
    assert command_line.run(lambda: fails(FileError("a.png: cannot be read"))) == 2
    assert capsys.readouterr().err == "error: a.png: cannot be read\n"
    assert command_line.run(lambda: fails(KeyboardInterrupt()), stopped="stopped; it is kept") == 130
    assert capsys.readouterr().err == "stopped; it is kept\n"
    with pytest.raises(ValueError, match="ours"):  # a mistake of ours keeps its traceback
        command_line.run(lambda: fails(ValueError("ours")))
    assert warnings.formatwarning("cut off", UserWarning, "x.py", 1) == "note: cut off\n"


@pytest.mark.parametrize(
    ("argv", "name"),
    [("sample.py", "sample.py"), ("/usr/bin/bdm-sample", "bdm-sample"), ("bdm-sample.exe", "bdm-sample")],
)
def test_what_a_command_is_called(argv, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv])
    assert command_line.called("sample.py") == name


@pytest.fixture(autouse=True)
def notes_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@contextmanager
def no_reader(buffered=True):
    """stdout is a pipe whose other end is closed; to be closed without an error at the end, as Python does."""
    reading, writing = os.pipe()
    os.close(reading)
    buffer = open(writing, "wb", buffering=-1 if buffered else 0)
    with io.TextIOWrapper(buffer, "utf-8", write_through=not buffered) as stream, redirect_stdout(stream):
        yield


def by_rich(text):
    Console().print(text)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(("show", "text"), [(print, "one line"), (print, "many\n" * 10**5), (by_rich, "one line")])
def test_a_reader_that_is_gone_ends_a_command_quietly(show, text, buffered, capfd):
    with no_reader(buffered):
        assert command_line.run(lambda: show(text)) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_quietly(name, capfd):
    with no_reader():
        assert importlib.import_module(f"bdm_jax.{name}").main(["--help"]) == 141
    assert capfd.readouterr().err == ""


def test_all_commands_are_among_them():
    root = Path(__file__).resolve().parent.parent
    files = [path for folder in ("bdm_jax", "convert", "configs") for path in (root / folder).rglob("*.py")]
    having = {
        ".".join(path.relative_to(root).with_suffix("").parts).removeprefix("bdm_jax.")
        for path in files
        if "\ndef main(args: Sequence[str]" in path.read_text("utf-8")
    }
    assert having == {*COMMANDS}


def test_another_pipe_that_breaks_is_no_quiet_end(capfd):
    def fails():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        command_line.run(fails)


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("cp1252", "strict", b"\\u7ea2 caf\xe9"),
        ("ascii", "surrogateescape", b"\\u7ea2 caf\\xe9"),  # a C locale
        ("gbk", "strict", "红 café".encode("gbk")),
        ("utf-8", "strict", "红 café".encode()),
    ],
)
def test_a_stream_takes_any_text(encoding, errors, written, monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding, errors))
    assert command_line.run(lambda: print("红 café", end="")) == 0
    assert buffer.getvalue() == written


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "cp1252", "ascii"])
@pytest.mark.parametrize("args", [["--depht", "3"], ["--depth", "deep"], ["--name"]])
def test_an_error_is_the_same_line_on_every_stdout(encoding, args, monkeypatch):
    said = []
    for one in ("utf-8", encoding):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), one))
        with pytest.raises(UserError) as error:
            command_line.parse(Flags, args)
        said.append(str(error.value))
    assert said[0] == said[1] and "---" not in said[1]


def test_an_unknown_flag_is_named_before_what_is_missing():
    with pytest.raises(UserError, match="^Unrecognized options: --bogus$"):
        command_line.parse(Folders, ["--bogus"])
    with pytest.raises(UserError, match="source"):
        command_line.parse(Folders, [])


LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NAMES = """
import os, sys
from bdm_jax.images.pictures import file_name
name = file_name(1, "\\u7ea2\\u706f cat", 7)
os.fsencode(name)
print(name, sys.stdout.encoding)
"""


def test_names_of_files_in_a_locale_without_chinese():
    environment = {**os.environ, **LOCALE, "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, "-c", NAMES], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split()[0] == "0001-cat-seed7.png"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; less is needed"),
        (MemoryError("Unable to allocate 16.0 GiB"), "out of memory: Unable to allocate 16.0 GiB; "),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.\nx"),
            "17.18 GB more were needed",
        ),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\nin hbm"), "out of memory: Ran out of memory in hbm; "),
    ],
)
def test_memory_that_is_not_there_is_one_line(error, said, capsys):
    def fails():
        raise error

    assert command_line.run(fails) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory") and said in err and err.count("\n") == 1 and "--vae-tile" in err


def test_another_error_of_the_compiler_keeps_its_traceback():
    def fails():
        raise JaxRuntimeError("INTERNAL: a mistake")

    with pytest.raises(JaxRuntimeError):
        command_line.run(fails)


def test_a_pipe_has_no_bars_whatever_asks_for_colours(monkeypatch):
    """Notebooks and CI set FORCE_COLOR: every frame of a bar would be a line."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not command_line.progress_console().is_terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command_line.progress_console().is_terminal
