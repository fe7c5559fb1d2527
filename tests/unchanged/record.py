"""Record what a checkout gives, for tests/test_unchanged.py: python tests/unchanged/record.py ROOT

ROOT is the checkout whose sample.py and train.py run; the results go beside this file. Every run is made twice, in
processes of their own: with an empty cache of compiled programs and with what the first left in it (training has none).
Where the two differ in a bit, nothing is recorded.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import runs
from PIL import Image


def main() -> int:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "sample.py").is_file():
        print(__doc__)
        return 2
    root = Path(sys.argv[1]).resolve()
    told = {"commit": _commit(root), "machine": runs.here(), "inputs": {}, "drawings": {}}
    with tempfile.TemporaryDirectory(prefix="recording-") as folder:
        place = runs.Workplace(root, Path(folder))
        with tempfile.TemporaryDirectory() as other:
            (Path(other) / "assets").symlink_to(root / "assets", target_is_directory=True)
            told["inputs"] = runs.make_inputs(Path(other))
        for name in runs.DRAWINGS:
            told["drawings"][name] = _record_drawing(place, name)
        told["training"] = _record_training(place)
        told["old_run"] = _record_old_run(place)
    with runs.RECORDED.open("w", encoding="utf-8") as file:
        file.write(_dumped(told) + "\n")
    sizes = [path.stat().st_size for path in runs.HERE.rglob("*") if path.is_file()]
    print(f"{len(sizes)} files in {runs.HERE}, {sum(sizes):,} bytes")
    return 0


def _record_drawing(place: runs.Workplace, name: str) -> dict:
    """Writes a sheet of the pictures; returns the settings that all share, and each one's file and other settings."""
    print(f"{name}: {' '.join(runs.DRAWINGS[name].flags)}")
    found = []
    for attempt in ("cold", "warm"):
        _finish(place.draw(name, f"{name}-{attempt}"))
        found.append(runs.read_pictures(place.folder / f"{name}-{attempt}"))
    _check(name, *[{file: (pixels.tobytes(), values) for file, (pixels, values) in each.items()} for each in found])
    sheet = runs.tiled(pixels for pixels, _ in found[0].values())
    Image.fromarray(sheet).save(runs.HERE / f"{name}.png", optimize=True)
    if name == runs.OLD_PICTURES_OF:
        _keep(place.folder / f"{name}-cold", runs.OLD_PICTURES, found[0].keys() | {"pictures.jsonl"})
    every = {file: values for file, (_, values) in found[0].items()}
    first, *others = every.values()
    shared = {key: value for key, value in first.items() if all(other.get(key, ...) == value for other in others)}
    own = {file: {key: values[key] for key in values if key not in shared} for file, values in every.items()}
    return {"settings": shared, "pictures": own}


def _record_training(place: runs.Workplace) -> dict:
    """Metrics of every step, a digest of every exported tensor, the grid of samples."""
    print(f"training: {' '.join(runs.TRAINING)}")
    found = []
    for _ in range(2):
        place.forget("training")
        _finish(place.run("train.py", *runs.TRAINING))
        found.append(runs.read_training(place.folder / "training"))
    _check("training", *found)
    return found[0]


def _record_old_run(place: runs.Workplace) -> dict:
    """The folder that a first leg leaves, what is exported from it, and what a second leg logs."""
    print(f"old run: {' '.join(runs.OLD_RUN_FLAGS)}")
    found, run = [], place.folder / runs.OLD_RUN.name
    for _ in range(2):
        place.forget(runs.OLD_RUN.name)
        _finish(place.run("train.py", *runs.OLD_RUN_FLAGS, *runs.LEG), runs.LEG_OVER)
        if not found:
            _keep(run, runs.OLD_RUN, runs.KEPT_OF_RUN)
        _finish(place.run("train.py", *runs.OLD_RUN_FLAGS, "--export-only"))
        word = runs.read_tensors(run / "export" / runs.EXPORTED_WORD)
        _finish(place.run("train.py", *runs.OLD_RUN_FLAGS, *runs.LEG), runs.LEG_OVER)
        found.append({"word": word, "metrics": runs.read_metrics(run)})
    _check("old run", *found)
    return found[0]


def _commit(root: Path) -> str:
    """Of the checkout, which must have no changes of its own."""

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout

    if changed := git("status", "--porcelain", "bdm_jax", "convert", "configs", "assets", "sample.py", "train.py"):
        sys.exit(f"{root} is not as it was committed:\n{changed}")
    return git("rev-parse", "HEAD").strip()


def _finish(done: subprocess.CompletedProcess, status: int = 0) -> None:
    if done.returncode != status:
        sys.exit(f"{' '.join(map(str, done.args))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


def _check(name: str, first: dict, second: dict) -> None:
    if first != second:
        sys.exit(f"{name}: two runs of the same code differ; nothing is recorded")


def _keep(source: Path, target: Path, names) -> None:
    """Copy files and folders of these names."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in sorted(names):
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, target / name)


def _dumped(value, margin: str = "") -> str:
    """JSON, with what fits on a line on one line."""
    text = json.dumps(value, ensure_ascii=False)
    if len(margin) + len(text) < 116 or not isinstance(value, dict | list):
        return text
    inner = margin + " "
    if isinstance(value, list):
        lines = [_dumped(item, inner) for item in value]
    else:
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_dumped(item, inner)}" for key, item in value.items()]
    begin, end = "[]" if isinstance(value, list) else "{}"
    return begin + "\n" + ",\n".join(inner + line for line in lines) + "\n" + margin + end


if __name__ == "__main__":
    sys.exit(main())
