"""A wheel as pip builds it: what it brings, where, and that it works away from the checkout."""

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bdm_jax", "configs", "convert", "assets")
WITHIN = ("configs", "convert", "assets")  # installed as bdm_jax/...


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build/ of the checkout gets into it."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel as it lies in a site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_every_file_is_there_and_nothing_else(installed):
    """No top-level name but bdm_jax: `configs`, `convert`, `tests`, `sample` could be anybody's."""
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"bdm_jax"}
    expected = {
        path.relative_to(ROOT) if name == "bdm_jax" else Path("bdm_jax") / path.relative_to(ROOT)
        for name in SOURCES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(installed) for path in (installed / "bdm_jax").rglob("*") if path.is_file()}
    assert found == expected
    assert Path("bdm_jax/evaluate/claims/ambiguity.txt") in found
    assert Path("bdm_jax/data/emoji/zh_only.txt") in found and Path("bdm_jax/assets/demo/model_index.json") in found


def test_console_commands(installed):
    file = ConfigParser()
    file.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    assert dict(file["console_scripts"]) == {
        "bdm-sample": "bdm_jax.commands.sample:main",
        "bdm-train": "bdm_jax.commands.train:main",
        "bdm-convert": "bdm_jax.convert.__main__:main",
    }


def run(code, folder, *arguments, installed):
    """Python without the checkout: its own modules come from the wheel."""
    start = f"import sys; sys.path.insert(0, {str(installed)!r}); sys.argv[0] = 'bdm-x'; "
    return subprocess.run(
        [sys.executable, "-P", "-c", start + code, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_commands_work_in_an_empty_folder(installed, tmp_path):
    code = "from bdm_jax.commands.train import main; sys.exit(main())"
    done = run(code, tmp_path, "--help", installed=installed)
    assert done.returncode == 0 and done.stdout.startswith("usage: bdm-x CONFIG") and "emoji-branch" in done.stdout
    code = "from bdm_jax.convert.__main__ import main; sys.exit(main())"
    done = run(code, tmp_path, "inspect", str(ROOT / "assets" / "demo" / "branch"), installed=installed)
    assert done.returncode == 0 and "BDM branch" in done.stdout, done.stderr
    code = "import bdm_jax, bdm_jax.paths as p; assert p.__file__.startswith(sys.path[0]); assert p.DEMO.is_dir()"
    done = run(code, tmp_path, installed=installed)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_package_without_its_assets_says_so(installed, tmp_path):
    """As where somebody packages the code alone."""
    shutil.copytree(installed / "bdm_jax", tmp_path / "bdm_jax", ignore=shutil.ignore_patterns("assets"))
    code = "from bdm_jax.commands.sample import main; sys.exit(main())"
    done = run(code, tmp_path, "红灯笼", installed=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert "this installation came without the bundled model" in done.stderr
