"""Parts of systems are listed in one place: no other file of the library has a table of their names."""

import ast
from pathlib import Path

import pytest

import bdm_jax
from bdm_jax.systems import families

PACKAGE = Path(bdm_jax.__file__).parent
HERE = "systems/families.py"
RECOGNISERS = "formats/networks/"  # a file there may say which of its networks' kinds it gives, below any table
# Words that are parts' names and other things besides: "branch" is also a source, "vae" also a setting.
NAMES = families.names() | {part.name for part in families.BESIDE}


def tables(source: str):
    """(line, names) of every list, tuple or set that is made of texts only, and of every dict with plain values, that
    holds two or more names of parts.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            texts = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
            if not all(isinstance(text, str) for text in texts):
                continue  # what is done with the parts, not a list of them
        elif isinstance(node, ast.Dict) and all(map(is_plain, node.values)):
            texts = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        else:
            continue
        found = [text for text in texts if text in NAMES]
        if len(found) > 1:
            yield node.lineno, found


def is_plain(node) -> bool:
    """A text, a class, a constant, or a row of these: not something computed for one call."""
    if isinstance(node, ast.Tuple | ast.List):
        return all(map(is_plain, node.elts))
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name | ast.Attribute) and is_global(node))


def is_global(node) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr
    return name[:1].isupper()


@pytest.mark.parametrize(
    "source",
    [
        '("unet", "vae")',
        'x = ["tokenizer", "branch_tokenizer"]',
        '{"unet": 1, "text_encoder": 2}',
        '{"unet": (UNetConfig,), "text_encoder": (CLIPTextConfig,)}',
        '{"unet": presets.SD15_UNET, "branch": presets.BDM_BRANCH}',
        'for name in {"unet", "text_encoder_2", "else"}: pass',
    ],
)
def test_a_table_is_seen(source):
    assert list(tables(source))


@pytest.mark.parametrize(
    "source",
    ['f("unet")\ng("vae", "x", ("a", "unet"))', '{"unet": self.unet, "vae": load(x)}', '("unet", 4, "vae", x)'],
)
def test_a_use_is_no_table(source):
    assert not list(tables(source))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_table_of_names(path):
    if path.relative_to(PACKAGE).as_posix().startswith((HERE, RECOGNISERS)):
        return
    found = list(tables(path.read_text("utf-8")))
    assert not found, f"{path}: names of parts are listed in {found}; take them from {HERE}"


def test_rows_are_whole():
    """Every tower names parts of its family, every mirrored part is one, every entry has a class."""
    for family in families.FAMILIES.values():
        for tower in family.towers:
            assert family.parts[tower.encoder].configs and not family.parts[tower.tokenizer].configs
        for part in family.bridge:
            assert part.mirrors is None or part.mirrors in family.backbone_names
        assert family.schedule_class().prediction_type in ("epsilon", "edm")
        assert {reader.source for reader in family.readers} <= {"backbone", "branch"}


def test_derived_tables():
    """What the tables of earlier versions said, now from the rows."""
    assert families.lora_networks()[:4] == ("unet", "text_encoder", "branch", "branch_text_encoder")
    prefixes = families.lora_prefixes()
    assert prefixes["lora_te_"] == prefixes["lora_te1_"] == "text_encoder" and prefixes["lora_te2_"] == "text_encoder_2"
    assert prefixes["lora_branch_te_"] == "branch_text_encoder" and prefixes["unet."] == "unet"
    assert families.embedding_names() == {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    assert (families.mirror("unet"), families.mirror("text_encoder")) == ("branch", "branch_text_encoder")
    assert families.mirror("vae") == "vae" and families.other_kinds("branch") == ("controlnet",)
    assert families.tokenizer_of("branch_text_encoder") == "branch_tokenizer"


def test_family_of_what_is_found():
    one = ["unet", "vae", "text_encoder", "tokenizer"]
    for names, called, name in (
        (one, None, "sd15"),
        ([*one, "text_encoder_2"], None, "sdxl"),
        ([*one, "branch"], None, "sd15"),
        (one, "StableDiffusionXLPipeline", "sdxl"),
        (one, "SomethingElse", "sd15"),
        (["unet"], None, "sd15"),
    ):
        assert families.family_of(names, called).name == name
