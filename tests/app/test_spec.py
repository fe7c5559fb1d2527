"""How plug-ins are named: the longest path that exists wins, whatever signs are in it."""

from pathlib import Path

import pytest

from bdm_jax.app.spec import (
    parse_blend,
    parse_control,
    parse_embedding,
    parse_image_prompt,
    parse_spec,
    rewritten,
)
from bdm_jax.errors import UserError

PATHS = (
    *("a", "a:0.5", "a,b", "b", "b,strength=2", "c", "d:1:2", "C:/x/ink.pt", "C:/x/ink.pt=1", "红,灯:笼.png"),
    *("net,1.safetensors", "map,from=x.png", "base,1", "base"),
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in PATHS:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a:0.5", ("a:0.5", 1, 1)),
        ("a:0.5:0.7", ("a:0.5", 0.7, 0.7)),
        ("a:0.6", ("a", 0.6, 0.6)),
        ("d:1:2", ("d:1:2", 1, 1)),
        ("d:1:2:3:4", ("d:1:2", 3, 4)),
        ("./a,b:0.2", ("a,b", 0.2, 0.2)),
        ("C:/x/ink.pt", ("C:/x/ink.pt", 1, 1)),
        ("C:/x/ink.pt:0.5", ("C:/x/ink.pt", 0.5, 0.5)),
        ("C:/nowhere.pt:0.5", ("C:/nowhere.pt", 0.5, 0.5)),
        (r"D:\nowhere.pt", (r"D:\nowhere.pt", 1, 1)),
        ("no:1:2:3", ("no:1", 2, 3)),
        ("no.safetensors", ("no.safetensors", 1, 1)),
        ("no.safetensors:-1:0", ("no.safetensors", -1, 0)),
        ("C:/风格/a b.safetensors:1e-1", ("C:/风格/a b.safetensors", 0.1, 0.1)),
        ("1:2:3:4", ("1:2", 3, 4)),
        ("0.5", ("0.5", 1, 1)),
    ],
)
def test_lora(text, spec):
    assert parse_spec(text) == (Path(spec[0]), *spec[1:])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("C:/x/ink.pt", ("C:/x/ink.pt", None)),
        ("C:/x/ink.pt=1", ("C:/x/ink.pt=1", None)),
        ("C:/x/ink.pt=1=<i>", ("C:/x/ink.pt=1", "<i>")),
        ("C:/x/ink.pt=2", ("C:/x/ink.pt", "2")),
        ("a=b=c", ("a", "b=c")),
        ("no=b=c", ("no", "b=c")),
    ],
)
def test_embedding(text, found):
    assert parse_embedding(text) == (Path(found[0]), found[1])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:0.5:0.3", ("a:0.5", None, 0.3)),
        ("a,b:0.3", ("a,b", None, 0.3)),
        ("a,c:0.3", ("a", "c", 0.3)),
        ("a,b,base,1:0.3", ("a,b", "base,1", 0.3)),
        ("a,b,nothing:0.3", ("a,b", "nothing", 0.3)),
        ("no,nothing:0.3", ("no", "nothing", 0.3)),
    ],
)
def test_blend(text, found):
    other, base, weight = found
    assert parse_blend(text) == (Path(other), base and Path(base), weight)


@pytest.mark.parametrize(
    ("text", "network", "image", "settings"),
    [
        ("a,b", "a", "b", {}),
        ("net,1.safetensors,红,灯:笼.png,strength=0.5", "net,1.safetensors", "红,灯:笼.png", {"strength": 0.5}),
        ("a,b,c,end=0.5", "a,b", "c", {"end": 0.5}),
        ("c,b,strength=2,end=1", "c", "b,strength=2", {"end": 1}),
        ("c,b,strength=1", "c", "b", {"strength": 1}),
        ("a,map,from=x.png,from=canny", "a", "map,from=x.png", {"from": "canny"}),
        ("a,strength=1,b", "a", "b", {"strength": 1}),
        ("no,map.png,end=1", "no", "map.png", {"end": 1}),
    ],
)
def test_control(text, network, image, settings):
    assert parse_control(text) == (Path(network), Path(image), settings)


def test_image_prompt():
    paths = Path("a,b"), Path("net,1.safetensors"), Path("红,灯:笼.png")
    assert parse_image_prompt(",".join(map(str, paths)) + ",strength=0.7") == (*paths, {"strength": 0.7})


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_spec, "a:strong", "'strong' is not a number"),
        *(
            (parse_spec, text, "write it as FILE.*numbers finite")
            for text in ("", ":0.5", "a:nan", "a:0.5:inf", ":1:2")
        ),
        (parse_embedding, "a=", "write it as FILE, or FILE=TOKEN"),
        (parse_blend, "a,b", "write it as MODEL:WEIGHT"),
        (parse_control, "a", "write it as NETWORK,MAP"),
        (parse_control, "net,1.safetensors,no,map.png", "^no,map.png: no such file"),
        (parse_control, "canny.safetensors,a,b,from=canny", "^canny.safetensors: no such file"),
        (parse_control, "no,1.safetensors,c,strength=1", "^no,1.safetensors: no such file"),
        (parse_control, "no,x,y.png", "write it as NETWORK,MAP.*; no files of these names are there"),
        (parse_image_prompt, "c,vision,red,灯:笼.png", "write it as ADAPTER,VISION,PICTURE"),
        (parse_image_prompt, "c,vision,红,灯:笼.png,strength=1", "^vision: no such file"),
        (parse_control, "a,b,strenght=1", "unknown setting of a control 'strenght'"),
        (parse_control, "a," * 500, "write it as NETWORK,MAP"),
        (parse_image_prompt, "a,b", "write it as ADAPTER,VISION,PICTURE"),
    ],
)
def test_what_is_refused(parse, text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "text", "short"),
    [
        ("lora", "./C:/x/ink.pt:0.5", "ink.pt:0.5"),
        ("branch_lora", "no/where//l.pt", "l.pt"),
        ("embedding", "C:/x/ink.pt=a/b", "ink.pt=a/b"),
        ("branch_embedding", "C:/x/ink.pt=1", "ink.pt=1"),
        ("blend", "./a,./base,1:0.3", "a,base,1:0.3"),
        ("control", "./net,1.safetensors,./map,from=x.png,from=canny", "net,1.safetensors,map,from=x.png,from=canny"),
        ("image_prompt", "./a,./b,./c,strength=1", "a,b,c,strength=1"),
    ],
)
def test_what_a_picture_records(flag, text, short):
    assert rewritten(flag, text, lambda path, _: Path(path).name) == short


LINK = "https://example.org/a,b/ink.safetensors?type=Model&v=2"


@pytest.mark.parametrize(
    ("text", "path", "strengths"),
    [
        ("art/ink", Path("art/ink"), (1, 1)),
        ("art/ink:0.8", Path("art/ink"), (0.8, 0.8)),
        ("art/ink@v1.0:0.8:0.5", Path("art/ink@v1.0"), (0.8, 0.5)),
        ("art/ink:sub/ink.safetensors", Path("art/ink:sub/ink.safetensors"), (1, 1)),
        ("art/ink:ink.safetensors:0.8:0.5", Path("art/ink:ink.safetensors"), (0.8, 0.5)),
        ("https://example.org:8080/ink.safetensors:0.8", "https://example.org:8080/ink.safetensors", (0.8, 0.8)),
        (LINK, LINK, (1, 1)),
    ],
)
def test_names_and_links_of_loras(text, path, strengths):
    assert parse_spec(text) == (path, *strengths)


def test_names_and_links_elsewhere():
    assert parse_embedding("art/cat=kitten") == (Path("art/cat"), "kitten")
    assert parse_embedding("art/cat:learned_embeds.bin=kitten") == (Path("art/cat:learned_embeds.bin"), "kitten")
    assert parse_embedding("https://example.org/cat.pt=kitten") == ("https://example.org/cat.pt", "kitten")
    assert parse_embedding(LINK) == (LINK, None)
    assert parse_blend("art/one,art/two:x.safetensors:0.3") == (Path("art/one"), Path("art/two:x.safetensors"), 0.3)
    assert parse_blend("a,art/two:0.3") == (Path("a"), Path("art/two"), 0.3)
    assert parse_control("art/canny,b,strength=2")[:2] == (Path("art/canny"), Path("b,strength=2")), "which is there"
    assert parse_control("art/canny,c,strength=2") == (Path("art/canny"), Path("c"), {"strength": 2})
    assert parse_control(f"{LINK},map,from=x.png") == (LINK, Path("map,from=x.png"), {})
    assert parse_image_prompt("art/ip:a.bin,art/ip:models/tower,c,strength=0.5") == (
        *(Path("art/ip:a.bin"), Path("art/ip:models/tower"), Path("c")),
        {"strength": 0.5},
    )


def test_a_path_that_is_there_wins_over_a_name():
    Path("art").mkdir()
    Path("art/ink:0.8").touch()
    assert parse_spec("art/ink:0.8") == (Path("art/ink:0.8"), 1, 1)
