"""train.py's words to its user."""

import importlib.util
from pathlib import Path

import pytest

from bdm_jax import configs
from bdm_jax.models.functional import abstract

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
    assert {"emoji-backbone", "emoji-branch", "emoji-text", "emoji-vae", "bdm-sd15", "sd15-lora"} <= {*configs.names()}
    assert "demo" not in configs.names()
    for name in configs.names():
        assert len(configs.load(name).digest()) == 16
    status, out, _ = run("--help")
    assert status == 0 and all(name in out for name in configs.names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("emoji-brunch",), "unknown config 'emoji-brunch': did you mean 'emoji-branch'?"),
        (("emoji-vae", "--steps", "0"), "steps=0: must be at least 1"),
        (("emoji-text", "--accumulate", "2"), "accumulate=2: the captions of a whole batch are compared"),
        (("emoji-vae", "--accumulate", "3"), "batch_size=4 is not a multiple of 3"),
        (("emoji-backbone", "--task.zero-snr", "--task.prediction-type", "epsilon"), "task.zero_snr needs"),
        (("emoji-vae", "--mesh.data", "7"), "does not fit"),
        (("emoji-vae", "--data.style", "oil"), "unknown style 'oil'"),
        (("emoji-vae", "--data.folder", "nowhere"), "nowhere"),
        (("emoji-backbone", "--task.vae", "nowhere"), "nowhere: no such file or component folder"),
        (("emoji-branch", "--task.backbone", "nowhere"), "nowhere: no such model folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_explain_says_where_everything_lies_and_trains_nothing(run, tmp_path):
    """Parameters, their average and both of Adam's moments; the sum is that of the sizes on one device."""
    status, out, _ = run("emoji-vae", "--explain", "--mesh.data", "1")
    lines = out.splitlines()
    assert status == 0 and not any(tmp_path.iterdir())
    assert "1 cpu devices: data=1 x fsdp=1 x tensor=1" in lines[0]
    count = sum(leaf.size for leaf in abstract(configs.load("emoji-vae").task.vae).values())
    assert f"{4 * (4 * count + 3):,}" in lines[-1]
    assert sum(line.startswith("params/vae/") for line in lines) == len(abstract(configs.load("emoji-vae").task.vae))


def test_explain_lists_frozen_networks(run):
    """Under a line of their own, with the bytes that they take: here fp32, whole on the one device."""
    status, out, _ = run("emoji-controlnet", "--explain", "--mesh.data", "1")
    lines = out.splitlines()
    assert status == 0
    task = configs.load("emoji-controlnet").task
    frozen = {name: abstract(task.sizes()[name]) for name in ("unet", "text_encoder")}
    listed = lines[lines.index("frozen:") + 1 :]
    assert len(listed) == sum(map(len, frozen.values())) + 1
    count = sum(leaf.size for tree in frozen.values() for leaf in tree.values())
    assert listed[-1].split() == ["sum", f"{4 * count:,}"]


def test_the_end_of_a_session_is_status_3(run, monkeypatch):
    from bdm_jax.training import loop

    for finished, status in ((True, 0), (False, 3)):
        monkeypatch.setattr(loop, "train", lambda config, finished=finished: finished)
        assert run("emoji-vae")[0] == status


def test_unknown_field_offers_the_nearest(run):
    status, _, err = run("emoji-vae", "--optimiser.learning-rate", "1")
    assert status == 2 and "--optimizer.learning-rate" in err
