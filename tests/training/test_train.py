"""train.py's words to its user."""

import importlib.util
import signal
from pathlib import Path

import pytest

from bdm_jax import configs
from bdm_jax.models.functional import abstract
from bdm_jax.paths import DEMO

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
        (("emoji-vae", "--accumulate", "3"), "batch_size=64 is not a multiple of 3"),
        (("emoji-backbone", "--task.zero-snr", "--task.prediction-type", "epsilon"), "task.zero_snr needs"),
        (("emoji-backbone", "--task.num-train-timesteps", "0"), "task.num_train_timesteps=0: must be at least 1"),
        (("emoji-backbone", "--task.beta-end", "1.5"), "task.beta_end=1.5: must be between 0 and 1"),
        (("emoji-vae", "--mesh.data", "7"), "does not fit"),
        (("emoji-vae", "--data.style", "oil"), "unknown style 'oil'"),
        (("emoji-vae", "--data.folder", "nowhere"), "nowhere"),
        (("emoji-backbone", "--task.vae", "nowhere"), "nowhere: no such file or component folder"),
        (("emoji-branch", "--task.backbone", "nowhere"), "task.backbone=nowhere: no such model folder; give --task.b"),
        (
            ("emoji-branch", "--task.start-from", str(DEMO / "branch")),
            "task.backbone=runs/emoji-backbone/export: no such model folder; give --task.backbone, or start from a",
        ),
        (
            ("emoji-branch", "--task.backbone", str(DEMO)),
            "task.text_encoder=runs/emoji-text/export/branch_text_encoder: no such component folder; give --task.te",
        ),
        (("emoji-vae", "--seed", "-1"), "error: seed=-1: must not be negative\n"),
        (("emoji-vae", "--minutes", "0"), "error: minutes=0.0: must be positive\n"),
        (("emoji-vae", "--data.scenes", "1.5"), "error: --data.scenes 1.5: expected a whole number, or None\n"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, message, tmp_path):
    status, _, err = run(*arguments)
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("error: ") and message in err
    assert not any(tmp_path.iterdir())  # an empty run's folder is gone again


def test_only_folders_that_the_run_has_made_are_taken_away(run, tmp_path):
    (tmp_path / "T" / "mine").mkdir(parents=True)
    for folder in ("T/mine", "T/new/deep"):
        assert run("emoji-vae", "--run", folder, "--data.folder", "nowhere")[0] == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["T", "mine"]
    (tmp_path / "T" / "mine" / "config.json").write_text("{}")
    assert run("emoji-vae", "--run", "T/mine", "--data.folder", "nowhere")[0] == 2
    assert (tmp_path / "T" / "mine" / "config.json").read_text() == "{}"


def test_ctrl_c_before_the_first_step_is_one_line_and_leaves_nothing(run, monkeypatch, tmp_path):
    """Hit while the session is made ready, where records are read and encoded."""
    from bdm_jax.training import loop

    def hit(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "_Session", hit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
    try:
        status, out, err = run("emoji-vae", "--run", "T/x")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, out) == (130, "") and not any(tmp_path.iterdir())
    assert err == "interrupted outside of the steps, with nothing to save: run the same command again\n"


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
