"""Who may ask, and what is seen of others."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import webuiapi

from bdm_jax.errors import UserError
from bdm_jax.web.__main__ import WebArguments, main
from bdm_jax.web.keys import VARIABLE, given_keys, key_of, parse_keys

ANN, BOB = "ann-secret-1", "bob-secret-2"
SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def server(serve):
    with serve(keys=[f"ann={ANN}", f"bob={BOB}"]) as running:
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/sdapi/v1/options", "/v1/models", "/metrics", "/openapi.json", "/none"])
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(ANN + "x"), bearer(""), {"Authorization": "Basic !!"}, {"X-API-Key": BOB[:-1]}],
    ids=["none", "wrong", "longer", "empty", "no base64", "shorter"],
)
def test_without_a_key_nothing_is_told(server, path, headers):
    answer = requests.get(server.url + path, headers=headers, timeout=60)
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
    assert "no API key that is known" in answer.text and ANN not in answer.text
    assert requests.get(server.url + "/health", timeout=60).json() == {"status": "ok"}


def test_pictures_of_one_are_not_the_others(server):
    ann = webuiapi.WebUIApi(port=server.port, username="ann", password=ANN, sampler="DPM++ 2M")
    ann.txt2img(prompt="猫", seed=1, **SMALL)
    body = {"prompt": "狗", "size": "32x32", "response_format": "url", "steps": 2, "seed": 2}
    answer = requests.post(f"{server.url}/v1/images/generations", json=body, headers=bearer(BOB), timeout=600).json()
    url = answer["data"][0]["url"]
    assert requests.get(url, timeout=60).status_code == 200  # signed: for whoever bob gives it to
    for stranger in (url.replace("owner=bob", "owner=ann"), url.replace("0001", "0002"), url.partition("?")[0]):
        assert requests.get(stranger, headers=bearer(ANN), timeout=60).status_code == 403
    out = server.service.out
    assert [*out.glob("*.png")] == [] and len([*(out / "ann").glob("*.png")]) == len(
        [*(out / "bob").glob("*.png")]
    ) == 1
    ann.set_options({"sd_model_checkpoint": "demo"})
    assert ann.util_get_current_model() == "demo"
    bobs = requests.get(f"{server.url}/sdapi/v1/options", headers={"X-API-Key": BOB}, timeout=60).json()
    assert bobs["sd_model_checkpoint"] == server.service.parts.model.name
    ann.set_options(bobs)


def test_one_does_not_stop_or_see_the_others_drawing(server):
    session = requests.Session()
    session.headers.update(bearer(BOB))
    body = {"prompt": "猫", "seed": 1, **SMALL, "steps": 150, "batch_size": 4}
    with requests.Session() as ann:
        ann.headers.update(bearer(ANN))
        with ThreadPoolExecutor(1) as pool:
            drawn = pool.submit(ann.post, f"{server.url}/sdapi/v1/txt2img", json=body, timeout=600)
            while server.service.current("ann") is None:
                assert not drawn.done()
            seen = session.get(f"{server.url}/sdapi/v1/progress", timeout=60).json()
            assert seen["state"]["job_count"] == 0 and seen["current_image"] is None
            session.post(f"{server.url}/sdapi/v1/interrupt", timeout=60)
            session.post(f"{server.url}/sdapi/v1/skip", timeout=60)
            assert len(drawn.result().json()["images"]) == 4


def test_keys_as_they_are_written(tmp_path):
    keys = parse_keys([f"ann={ANN}", f"bob={BOB}"])
    assert (keys.owner(ANN), keys.owner(BOB), keys.owner("x"), keys.owner(None), keys.owner("")) == (
        *("ann", "bob"),
        *(None,) * 3,
    )
    assert parse_keys([ANN]).owner(ANN) == "" and parse_keys([]).owner(None) == "" and not parse_keys([])
    assert parse_keys(["aGVsbG8gd29ybGQ="]).owner("aGVsbG8gd29ybGQ=") == ""  # a name needs a key behind it
    file = tmp_path / "keys.txt"
    file.write_text(f"# ours\nann={ANN}\n\n", encoding="utf-8")
    assert given_keys([f"bob={BOB}"], file, {VARIABLE: "eve=eve-secret-3"}).owner("eve-secret-3") == "eve"
    assert key_of({"authorization": "bearer  abc"}) == "abc" and key_of({"x-api-key": "abc"}) == "abc"
    for texts, message in [
        (["short"], "the API key of 5 characters: write KEY"),
        (["ann=short"], "the API key of ann: write KEY"),
        ([ANN, BOB], "give each its owner's name"),
        ([f"ann={ANN}", f"Ann={BOB}"], "two API keys are of ann"),
        ([f"ann={ANN}", f"bob={ANN}"], "there twice"),
        (["with space in it"], "plain characters"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            parse_keys(texts)
        assert not any(text.rpartition("=")[2] in str(error.value) for text in texts if len(text) > 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listen"], "0.0.0.0 is reached from other machines: give --api-key KEY"),
        (["--host", "192.0.2.1"], "192.0.2.1 is reached from other machines"),
        (["--listen", "--no-auth", "--api-key", ANN], "--no-auth with API keys"),
        (["--port", "70000"], "--port 70000 is outside"),
        (["--max-side", "0"], "--max-side 0: expected more than 0"),
        (["--models", "/none/such"], "/none/such: no such folder of models"),
        (["--model", "/none/such"], "/none/such"),
        (["--api-keys", "/none/such"], "/none/such: cannot be read"),
        (["--api-key", "short"], "the API key of 5 characters"),
        (["--batch-size", "0"], "batch size 0 is less than 1"),
    ],
)
def test_flags_are_refused_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["--out", str(tmp_path), "--no-page", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_only_this_machine_unless_it_is_said():
    assert WebArguments().address(parse_keys([])) == "127.0.0.1"
    assert WebArguments(listen=True).address(parse_keys([ANN])) == "0.0.0.0"
    assert WebArguments(listen=True, no_auth=True).address(parse_keys([])) == "0.0.0.0"
    assert json.dumps(WebArguments().api_key) == "[]"
