"""What every command does with its flags, its errors and its exit status."""

import sys
import warnings
from dataclasses import dataclass, field

import pytest

from bdm_jax import command_line
from bdm_jax.errors import FileError, UserError


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    """how deep"""


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
