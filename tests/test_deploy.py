"""Launch recipes: scripts run beside stand-ins for a cluster's programs, and give their flags to the real parser."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bdm_jax import command_line, configs
from bdm_jax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
# Devices that a script's config is split over, and its processes, by the script and its argument.
DEVICES = {"box.sh": (8, 1), "slurm/one-node.sbatch": (8, 1), "slurm/several-nodes.sbatch": (80, 80)}
DEVICES |= {"tpu.sh v5e": (256, 64), "tpu.sh v5p": (128, 32)}
STAND_IN = """#!{python}
import json, os, sys
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps([name, *args]) + "\\n")
if name == "srun":
    os.execvp("python", args[args.index("python"):])
sys.exit(int(os.environ.get("STATUS", "0")) if name == "python" else 0)
"""


def test_every_script_is_tried():
    there = {str(path.relative_to(DEPLOY)) for path in (*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch"))}
    assert there == {recipe.split()[0] for recipe in DEVICES}


def run(recipe, folder, **environment):
    """(exit status, the programs that it called with their arguments), in an empty folder."""
    programs, log = folder / "bin", folder / "log"
    programs.mkdir()
    for name in ("python", "srun", "xpk", "scontrol"):
        (programs / name).write_text(STAND_IN.format(python=sys.executable, log=str(log)))
        (programs / name).chmod(0o755)
    settings = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
    script, *arguments = recipe.split()
    command = ["bash", str(DEPLOY / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    return done.returncode, calls


def trainings(calls):
    """What train.py is called with, through whatever launches it."""
    found = [call for call in calls if call[0] == "python"]
    found += [shlex.split(call[call.index("--command") + 1]) for call in calls if "--command" in call]
    assert found and all(call[1] == "train.py" for call in found)
    return [call[2:] for call in found]


def parsed(arguments) -> TrainConfig:
    import tyro

    default, marks = configs.load(arguments[0]), (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    return command_line.parse(type(default), arguments[1:], default=default, prog="train.py", config=marks)


@pytest.mark.parametrize("recipe", DEVICES)
def test_a_script_says_what_to_change_and_trains_what_there_is(recipe, tmp_path):
    """Its head; its flags, through the parser of train.py; batches that its devices and processes divide."""
    script = DEPLOY / recipe.split()[0]
    head = script.read_text("utf-8").split("\n\n")[0]
    assert head.startswith("#!/bin/bash\n# ") and "# Change: " in head and str(script.relative_to(ROOT)) in head
    status, calls = run(recipe, tmp_path)
    assert status == 0
    (arguments,) = trainings(calls)
    config = parsed(arguments)
    assert str(config.run) != str(configs.load(arguments[0]).run) or "run" in " ".join(arguments)
    devices, processes = DEVICES[recipe]
    fixed = config.mesh.fsdp * config.mesh.tensor
    assert devices % fixed == 0
    assert config.batch_size % (devices // config.mesh.tensor * config.accumulate) == 0
    assert config.batch_size % processes == 0


@pytest.mark.parametrize("name", ["one-node", "several-nodes"])
def test_slurm_goes_on_after_a_session_and_only_then(name, tmp_path):
    for expected in (0, 2, 3):
        folder = tmp_path / str(expected)
        folder.mkdir()
        status, calls = run(f"slurm/{name}.sbatch", folder, STATUS=str(expected))
        assert status == expected
        assert (["scontrol", "requeue", "7"] in calls) == (expected == 3)


def test_several_nodes_have_a_task_for_each_gpu():
    """JAX under Slurm gives each task one GPU, and runtime.processes counts tasks; on one node a task has them all."""
    options = {
        path.stem: dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", path.read_text("utf-8"), re.MULTILINE))
        for path in (DEPLOY / "slurm").iterdir()
    }
    several, one = options["several-nodes"], options["one-node"]
    assert several["ntasks-per-node"] == several["gpus-per-node"]
    assert int(several["nodes"]) * int(several["gpus-per-node"]) == DEVICES["slurm/several-nodes.sbatch"][0]
    assert (one["nodes"], one["ntasks-per-node"]) == ("1", "1") and one["gpus-per-node"] == "8"
