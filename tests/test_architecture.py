"""The rooms of docs/architecture.md: who may import whom, that nothing lies loose, what every file must have."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bdm_jax"
TOP_FILES = {"__init__", "errors", "paths", "command_line"}
# A file imports from rooms on floors below its own, and from its own room.
FLOORS = {
    1: ("models", "diffusion", "formats", "images", "runtime"),
    2: ("text", "data"),
    3: ("systems",),
    4: ("plugins", "latents"),
    5: ("sampling",),
    6: ("training",),
    7: ("app", "configs"),
    8: ("evaluate", "plan", "bench", "web"),
    9: ("commands", "convert"),
    10: ("sample", "train"),  # a few lines each, so that commands run from a checkout
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms} | dict.fromkeys(TOP_FILES, 0)
OUTSIDE = ("configs", "convert")  # they lie beside the package, and are imported as bdm_jax.configs, bdm_jax.convert


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path):
    """bdm_jax/text/encode.py -> bdm_jax.text.encode, configs/demo.py -> bdm_jax.configs.demo."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "bdm_jax" else ("bdm_jax", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in (PACKAGE, *(ROOT / name for name in OUTSIDE))
    for path in sorted(folder.rglob("*.py"))
} | {f"bdm_jax.{name}": ROOT / f"{name}.py" for name in ("sample", "train")}


def room(module):
    """The longest room that the module lies in; a file at the top is a room of its own."""
    parts = module.split(".")[1:] or ["__init__"]
    return "/".join(parts[:2]) if "/".join(parts[:2]) in FLOOR else parts[0]


def imports(module):
    """(line, module of ours) for every import in the file, inside functions and for type checkers too."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found = [name if (name := f"{base}.{alias.name}") in FILES else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] in ("bdm_jax", *OUTSIDE))


def test_nothing_lies_loose():
    """Every file has a room, every room a floor and an __init__.py (without, it would be missing in a wheel)."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP_FILES
    assert {room(module) for module in FILES} <= FLOOR.keys()
    folders = {path.parent for path in FILES.values()} - {ROOT}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_no_import_goes_up():
    wrong = []
    for module, path in FILES.items():
        if module == "bdm_jax":  # the public face names what is above; it loads nothing by itself (see below)
            continue
        own = room(module)
        for line, name in imports(module):
            where = f"{path.relative_to(ROOT)}:{line}"
            if name.split(".")[0] in OUTSIDE:
                wrong.append(f"{where}: {name} is not installed under that name; write bdm_jax.{name}")
            elif name == "bdm_jax":
                wrong.append(f"{where}: the public face is for users; import from the rooms")
            elif name not in FILES:
                wrong.append(f"{where}: {name} is no module")
            elif own in TOP_FILES:
                if name != "bdm_jax.errors":
                    wrong.append(f"{where}: the files at the top import bdm_jax.errors only, not {name}")
            elif room(name) != own and FLOOR[room(name)] >= FLOOR[own]:
                wrong.append(f"{where}: {own} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[room(name)]})")
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    """Between files; the floors leave no circle between rooms."""
    graph = {module: {name for _, name in imports(module)} - {module, "bdm_jax"} for module in FILES}
    del graph["bdm_jax"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_module_says_what_it_is():
    silent = [module for module, path in FILES.items() if not ast.get_docstring(parsed(path))]
    assert not silent


def test_a_class_name_is_used_once():
    """Where two rooms use one name for two things, a reader has to look up which is meant. Private names are local."""
    names = Counter(
        node.name
        for path in FILES.values()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_commands_are_thin():
    long = {}
    for module, path in FILES.items():
        lines = path.read_text("utf-8").count("\n")
        if FLOOR[room(module)] >= 9 and (room(module) != "convert" or path.name == "__main__.py") and lines >= 100:
            long[module] = lines
    assert not long


def test_errors_are_reported_in_one_place():
    reporting = {module for module, path in FILES.items() if 'print(f"error: ' in path.read_text("utf-8")}
    assert reporting == {"bdm_jax.command_line"}


def test_text_is_utf8_whatever_the_locale():
    """A file that is opened as text names its encoding: by default it is the locale's."""
    silent = []
    for module, path in FILES.items():
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call) or any(one.arg == "encoding" for one in node.keywords):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            if name in ("open", "fdopen"):
                own = isinstance(node.func, ast.Name)  # open(path), where path.open() and Image.open(...) are others'
                modes = [text for text in texts if re.fullmatch("[rwax]+[bt+]*", text)]
                text_mode = "b" not in modes[0] if modes else own or not (node.args or node.keywords)
            else:
                text_mode = name in ("read_text", "write_text") and len(node.args) <= (name == "write_text")
            if text_mode:
                silent.append(f"{module}:{node.lineno}")
    assert not silent


def test_no_habit_is_excused():
    code = [path for folder in ("bdm_jax", "configs", "convert", "tests") for path in (ROOT / folder).rglob("*.py")]
    rule = "noqa: " + "E731"  # a lambda with a name
    assert not [str(path) for path in code if rule in path.read_text("utf-8")]


IMPORT = """
import sys, time
before = time.perf_counter()
import bdm_jax
seconds = time.perf_counter() - before
loaded = {"jax", "numpy", "tyro"} & set(sys.modules)
names = set(dir(bdm_jax)) >= {"BridgePipeline", "generate", "Request", "Sampling"}
sys.exit(f"{seconds:.3f} s, {loaded}, {names}" if seconds > 0.3 or loaded or not names else 0)
"""


def test_the_public_face_loads_nothing_until_it_is_asked():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
