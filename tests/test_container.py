"""The container: what can be known of it without Docker. Its build step runs with stand-ins for pip and rm."""

import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from test_deploy import STAND_IN

from bdm_jax import command_line

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def instructions():
    """(name, rest) of the Dockerfile's lines, continued ones joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of(name):
    return [rest for own, rest in instructions() if own == name]


def test_what_is_copied_is_there_and_is_all_that_is_sent():
    """.dockerignore leaves out everything and takes back what the Dockerfile copies, and nothing else."""
    sources = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    ignored = [
        line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and not line.startswith("#")
    ]
    assert ignored[0] == "*" and [line[1:] for line in ignored if line.startswith("!")] == sources


def test_extras_exist():
    file = ConfigParser()
    file.read(ROOT / "setup.cfg", "utf-8")
    (build,) = (rest for rest in of("RUN") if "pip install" in rest)
    kinds = dict(re.findall(r"(\w+)\) extras=([\w,]+)", build))
    assert kinds.keys() == {"cpu", "cuda", "tpu"}
    for extras in kinds.values():
        assert set(extras.split(",")) <= {*file["options.extras_require"]}


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu", "abacus"])
def test_the_build_step_installs_for_its_device(device, tmp_path):
    """The step itself, with stand-ins for pip and rm."""
    (build,) = (rest for rest in of("RUN") if "pip install" in rest)
    log = tmp_path / "log"
    for name in ("pip", "rm"):
        (tmp_path / name).write_text(STAND_IN.format(python=sys.executable, log=str(log)))
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
    done = subprocess.run(["sh", "-c", build], env=settings, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    if device == "abacus":
        assert done.returncode == 2 and "DEVICE=abacus: known are cpu, cuda, tpu" in done.stderr and not log.exists()
        return
    (pip, _) = [json.loads(line) for line in log.read_text().splitlines()]
    assert done.returncode == 0 and pip[:2] == ["pip", "install"]
    assert (device in pip[-1]) == (device != "cpu")


def test_the_container_runs_as_nobody_and_serves():
    """The last user is a number that is not root's; what is written lies in volumes; the command is one of ours."""
    from bdm_jax.web.__main__ import WebArguments

    names = [name for name, _ in instructions()]
    assert of("USER")[-1].isdecimal() and int(of("USER")[-1]) > 0
    assert "RUN" not in names[names.index("USER") :] and "COPY" not in names[names.index("USER") :]
    volumes = json.loads(*of("VOLUME"))
    settings = dict(re.findall(r"(\w+)=(\S+)", of("ENV")[0]))
    for name in ("HOME", "XDG_CACHE_HOME", "BDM_JAX_CACHE", "HF_HOME"):
        assert any(settings[name] == one or settings[name].startswith(f"{one}/") for one in volumes), name
    command = json.loads(*of("CMD"))
    assert command[:3] == ["python", "-m", "bdm_jax.web"]
    asked = command_line.parse(WebArguments, command[3:])
    assert asked.listen and str(asked.port) in of("EXPOSE") and str(asked.out) in volumes
    check = json.loads(of("HEALTHCHECK")[0].split("CMD", 1)[1])
    assert f"http://127.0.0.1:{asked.port}/health" in check[-1]
    compile(check[-1], "healthcheck", "exec")


def test_compose_is_the_same_container_locked_up():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]["bdm"]
    assert service["read_only"] and service["tmpfs"] == ["/tmp"] and service["cap_drop"] == ["ALL"]
    assert {volume.split(":")[1] for volume in service["volumes"]} >= set(json.loads(*of("VOLUME")))
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()
    assert service["build"]["args"]["DEVICE"] == "cpu"
