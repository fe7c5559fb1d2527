"""train.py's words to its user."""

import importlib.util
from pathlib import Path

import pytest

import configs

_SCRIPT = Path(__file__).parents[2] / "train.py"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function from arguments to (exit status, stdout, stderr) of train.py."""
    spec = importlib.util.spec_from_file_location("train_script", _SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        try:
            status = script.main()
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return call


def test_every_config_is_valid_and_is_listed(run):
    assert configs.names() == ["emoji-backbone", "emoji-branch", "emoji-text", "emoji-vae"]
    for name in configs.names():
        assert len(configs.load(name).digest()) == 16
    status, out, _ = run("--help")
    assert status == 0 and all(name in out for name in configs.names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("emoji-brunch",), "unknown config 'emoji-brunch': did you mean 'emoji-branch'?"),
        (("emoji-vae", "--steps", "0"), "steps=0: must be at least 1"),
        (("emoji-vae", "--checkpoint-every", "30"), "checkpoint_every=30 must be a multiple of log_every=20"),
        (("emoji-vae", "--mesh.data", "7"), "does not fit"),
        (("emoji-vae", "--data.style", "oil"), "unknown style 'oil'"),
        (("emoji-vae", "--data.folder", "nowhere"), "nowhere is not a prepared data set"),
        (("emoji-backbone", "--task.vae", "nowhere"), "nowhere: no such file or component folder"),
        (("emoji-branch", "--task.backbone", "nowhere"), "nowhere: no such model folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_unknown_field_offers_the_nearest(run):
    status, _, err = run("emoji-vae", "--optimiser.learning-rate", "1")
    assert status == 2 and "--optimizer.learning-rate" in err
