"""The documentation: commands, modules, paths, flags and links exist; pages in two languages say the same."""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = [("README.md", "README.zh.md"), ("docs/using.md", "docs/using.zh.md")]
ROOMS = {path.name for path in (ROOT / "bdm_jax").iterdir() if path.is_dir() and path.name != "__pycache__"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(text):
    """Code blocks as (language, code)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Shell commands of the code blocks, as lists of arguments without comments."""
    found = []
    for language, code in blocks(text):
        if language in ("", "bash", "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|;| do ", line):
                    with contextlib.suppress(ValueError):
                        found.append(shlex.split(command, comments=True))
    return [command for command in found if command]


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def definitions(file):
    """Name -> node of what a module defines or imports at its top level."""
    return _names(ast.parse(file.read_text(encoding="utf-8")).body)


def _names(body):
    names = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.If):
            names |= _names(node.body)
    return names


def module_file(parts):
    """(file of the module that a dotted name begins with, the parts that are left)."""
    folder, rest = ROOT, list(parts)
    while rest:
        inside = folder / rest[0] if (folder / rest[0]).is_dir() or folder != ROOT / "bdm_jax" else ROOT / rest[0]
        if inside.is_dir():
            folder, rest = inside, rest[1:]
        elif (folder / f"{rest[0]}.py").is_file():
            return folder / f"{rest[0]}.py", rest[1:]
        else:
            break
    return folder / "__init__.py", rest


def exists(dotted):
    """Whether a dotted name is a module, or something that a module defines."""
    file, rest = module_file(dotted.split("."))
    if not file.is_file():
        return False
    names = definitions(file)
    for part in rest:
        if part not in names:
            return False
        names = _names(names[part].body) if isinstance(names[part], ast.ClassDef) else {}
    return True


def flags_of(main):
    """The flags that `main(["--help"])` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", out.getvalue()))


def anchors(page):
    """GitHub's anchors of the headings."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    }


@each_page
def test_commands_exist(page):
    runs = {path.stem.replace("_", "-") for path in (ROOT / "configs").glob("[!_]*.py")}
    for command in commands(text_of(page)):
        words = [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if len(words) < 2 or words[0] != "python":
            continue
        if words[1] == "-m":
            module, rest = module_file(words[2].split("."))
            if words[2].split(".")[0] not in ("bdm_jax", "convert", "configs"):
                continue
            assert not rest, command
            file = module.with_name("__main__.py") if module.name == "__init__.py" else module
            assert file.is_file() and '__name__ == "__main__"' in text_of(file), command
        else:
            assert (ROOT / words[1]).is_file(), command
        if words[1] == "train.py" and not re.search(r"[$A-Z]", words[2]):
            assert words[2] in runs, command


@each_page
def test_dotted_names_exist(page):
    for name in set(re.findall(r"\bbdm_jax(?:\.[A-Za-z_]\w*)+", text_of(page))):
        assert exists(name), name


@each_page
def test_python_examples_import_what_there_is(page):
    for language, code in blocks(text_of(page)):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "bdm_jax":
                for alias in node.names:
                    assert exists(f"{node.module}.{alias.name}"), f"{node.module}.{alias.name}"


@each_page
def test_paths_exist(page):
    tops = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"out", "data"}
    for code in inline_code(text_of(page)):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code) and ("/" in code or code.endswith(".py")):
            first = code.split("/")[0]
            if first in tops | ROOMS or code.endswith(".py"):
                places = (ROOT, ROOT / "bdm_jax", ROOT / "bdm_jax" / "data")
                found = any((place / code).exists() for place in places)
                assert found or ("/" not in code and any((ROOT / "bdm_jax").rglob(code))), code


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize(
    "name", ["README.md", "docs/using.md", "docs/using.zh.md", "docs/sampling.md", "docs/plugins.md"]
)
def test_flags_of_sample_exist(name):
    from bdm_jax.commands.sample import main

    text, known = text_of(ROOT / name), flags_of(main)
    drawing = [command for command in commands(text) if "sample.py" in command]
    used = {word.split("=")[0] for command in drawing for word in command if word.startswith("--")}
    if name != "README.md":
        rows = [line for line in text.splitlines() if line.startswith("| ") and "`--" in line]
        used |= {flag for row in rows for flag in re.findall(r"`(--[a-z][\w-]*)", row.split("|")[1])}
        used |= {flag for row in rows for flag in re.findall(r"`(--[a-z][\w-]*)", row.split("|")[2])}
    assert used and used <= known, used - known


@pytest.mark.parametrize("pair", TRANSLATED, ids=lambda pair: pair[0])
def test_pages_in_two_languages_say_the_same(pair):
    texts = [text_of(ROOT / name) for name in pair]
    code = [[(language, re.sub(r" *#.*", "", body)) for language, body in blocks(text)] for text in texts]
    assert code[0] == code[1]
    bare = [re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) for text in texts]
    assert len({tuple(map(len, re.findall(r"^(#+) ", text, re.MULTILINE))) for text in bare}) == 1
    links = [{link.replace(".zh.md", ".md") for link in re.findall(r"\]\(([^)\s]+)\)", text)} for text in bare]
    assert links[0] == links[1]
    tables = [
        [re.findall(r"\d[\d.,]*%?", line) for line in text.splitlines() if re.match(r"\|.*\d+%", line)] for text in bare
    ]
    assert tables[0] == tables[1]
    names = [{name for name in inline_code(text) if re.match(r"--|bdm_jax", name)} for text in bare]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/using.md", "docs/architecture.md"])
def test_python_examples_run(name, tmp_path, monkeypatch):
    """The examples of a page, one after the other, in an empty folder with the bundled assets."""
    from bdm_jax.systems import families

    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    rows, names = dict(families.FAMILIES), {}  # a page may add a row
    try:
        for language, code in blocks(text_of(ROOT / name)):
            if language == "python":
                exec(compile(code, name, "exec"), names)
    finally:
        families.FAMILIES.clear()
        families.FAMILIES.update(rows)
