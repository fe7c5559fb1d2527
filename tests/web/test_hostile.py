"""Requests that no good client sends: each is answered with a 4xx of one line, and the next good one is served."""

import base64
import io
import json
import os
import socket
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image

from bdm_jax.web.limits import Limits

GOOD = {"prompt": "红灯笼", "seed": 1, "steps": 2, "width": 32, "height": 32}
T2I, I2I, OAI = "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/images/generations"
PNG_INFO, OPTIONS = "/sdapi/v1/png-info", "/sdapi/v1/options"
WAIT = 60  # seconds, for a machine that is busy


def png(width, height, rows=b""):
    """A PNG that says it has so many pixels, whatever it holds."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def text_bomb():
    """A PNG with a text of many megabytes, compressed to few bytes."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "png")
    data = b"key\0\0" + zlib.compress(b"x" * (100 << 20), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = out.getvalue()
    return whole[:33] + chunk + whole[33:]


def zip_bomb():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(10 << 20))
    return out.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def picture(size=(32, 32)):
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "png")
    return b64(out.getvalue())


def mask(value):
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32), value, np.uint8)).save(out, "png")
    return b64(out.getvalue())


def txt(**changes):
    return T2I, {**GOOD, **changes}


def img(**changes):
    return I2I, {**GOOD, "init_images": [picture()], **changes}


def setting(**changes):
    return txt(override_settings=changes)


DEEP = "[" * 100_000
BAD = {
    # models and files
    "model by path": setting(sd_model_checkpoint="/etc/passwd"),
    "model above the folder": setting(sd_model_checkpoint="../../etc/passwd"),
    "model by a hub's name": setting(sd_model_checkpoint="stabilityai/sdxl"),
    "model by a link": setting(sd_model_checkpoint="http://127.0.0.1:1/x.safetensors"),
    "model with NUL": setting(sd_model_checkpoint="demo\0.safetensors"),
    "model that is a number": setting(sd_model_checkpoint=7),
    "model by options": (OPTIONS, {"sd_model_checkpoint": "../x"}),
    "options of a wrong type": (OPTIONS, {"sd_model_checkpoint": ["demo"]}),
    "autoencoder by path": setting(sd_vae="/etc/passwd"),
    "LoRA by path": txt(prompt="<lora:../../etc/passwd:1> 猫"),
    "LoRA without end": txt(prompt="<lora:x:1 猫"),
    "LoRA of infinite strength": txt(prompt="<lora:x:inf> 猫"),
    "control by path": txt(
        alwayson_scripts={"controlnet": {"args": [{"model": "/etc/passwd", "image": picture(), "module": "none"}]}}
    ),
    "control of a wrong kind": txt(alwayson_scripts={"controlnet": {"args": ["x"]}}),
    "control with a wrong weight": txt(alwayson_scripts={"controlnet": {"args": [{"weight": "much"}]}}),
    "image by path": img(init_images=["/etc/passwd"]),
    "image by link": img(init_images=["file:///etc/passwd"]),
    # sizes and counts
    "huge width": txt(width=1_000_000),
    "huge number": txt(width=10**30),
    "negative size": txt(width=-32),
    "no size": txt(width=0, height=0),
    "odd size": txt(width=33),
    "one side alone": txt(height=None),
    "size beyond after hires": txt(width=1024, height=1024, enable_hr=True, hr_scale=4),
    "many pictures": txt(batch_size=1_000_000),
    "many batches": txt(n_iter=10**9),
    "no pictures": txt(batch_size=0),
    "many steps": txt(steps=100_000),
    "no steps": txt(steps=0),
    "many timesteps": setting(timesteps=list(range(999, 0, -1))),
    "long prompt": txt(prompt="猫" * 100_000),
    "no prompt": txt(prompt=""),
    # numbers and types
    "NaN": (T2I, json.dumps({**GOOD, "cfg_scale": float("nan")})),
    "infinity": (T2I, json.dumps({**GOOD, "cfg_scale": float("inf")})),
    "NaN as a text": setting(branch_strength="NaN"),
    "overflow": (T2I, '{"prompt": "x", "cfg_scale": 1e999}'),
    "digits without end": (T2I, '{"prompt": "x", "seed": ' + "9" * 100_000 + "}"),
    "text for a number": txt(steps="many"),
    "list for a text": txt(prompt=["猫"]),
    "object for a number": txt(seed={"a": 1}),
    "seed beyond": txt(seed=2**40),
    "seed below": txt(seed=-5),
    "settings that are a list": txt(override_settings=[1]),
    "setting of a wrong type": setting(guidance_rescale="x"),
    "steps as a text": setting(steps="x"),
    "steps as a list": (OAI, {"prompt": "猫", "steps": ["a"]}),
    "hires as an object": setting(hires={"a": 1}),
    "hires as a text": (OAI, {"prompt": "猫", "hires": "nan"}),
    "timesteps as a number": setting(timesteps=5),
    "noise levels as a truth": (OAI, {"prompt": "猫", "sigmas": True}),
    "size as a number": setting(size=-1),
    "size of texts": setting(size=["a"]),
    "size of nothing": setting(size=[None]),
    "controls as a number": txt(alwayson_scripts={"controlnet": {"args": 5}}),
    "controls as a truth": txt(alwayson_scripts={"controlnet": True}),
    "setting out of range": setting(branch_end=7),
    "strength out of range": img(denoising_strength=1.5),
    "unknown sampler": txt(sampler_name="DPM9"),
    "a negative prompt of two parts": txt(negative_prompt="a AND b"),
    "half a surrogate": (T2I, '{"prompt": "\\ud800", "width": 32, "height": 32}'),
    # JSON
    "no JSON": (T2I, "prompt=x"),
    "empty": (T2I, ""),
    "a list": (T2I, "[]"),
    "null": (T2I, "null"),
    "deep": (T2I, DEEP),
    "deep in an object": (T2I, '{"prompt": ' + DEEP),
    "not UTF-8": (T2I, b'{"prompt": "\xff\xfe"}'),
    # uploads
    "no image": img(init_images=[]),
    "no base64": img(init_images=["%%%"]),
    "empty image": img(init_images=[""]),
    "cut off": img(init_images=[picture()[:60]]),
    "PNG bomb": img(init_images=[b64(png(60_000, 60_000))]),
    "PNG of too many pixels": img(init_images=[b64(png(8_000, 8_000))]),
    "PNG with half its rows": img(init_images=[b64(png(64, 64, bytes(100)))]),
    "text bomb": (PNG_INFO, {"image": b64(text_bomb())}),
    "zip bomb": img(init_images=[b64(zip_bomb())]),
    "SVG": img(init_images=[b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")]),
    "mask of nothing": img(mask=mask(0)),
    "mask that is none": img(mask="xxxx"),
    "picture without text": (PNG_INFO, {"image": "x"}),
    "no picture at all": (PNG_INFO, {}),
    "body too large": (T2I, b"{" + b" " * (3 << 20) + b"}"),
    # OpenAI
    "OpenAI: many": (OAI, {"prompt": "x", "n": 10**6}),
    "OpenAI: size": (OAI, {"prompt": "x", "size": "bigxlarge"}),
    "OpenAI: huge": (OAI, {"prompt": "x", "size": "99999x99999"}),
    "OpenAI: no prompt": (OAI, {}),
    "OpenAI: model": (OAI, {"prompt": "x", "model": "../../etc/passwd"}),
    "OpenAI: stream": (OAI, {"prompt": "x", "stream": True}),
    "OpenAI: format": (OAI, {"prompt": "x", "response_format": "exe"}),
    "OpenAI: part": (OAI, {"prompt": "x", "model_path": "/x", "sampler": "rm -rf"}),
}
GET = {
    "a picture without signature": "/pictures/0001-x-seed1.png",
    "a picture of another signature": "/pictures/0001-x-seed1.png?owner=&until=99999999999&signature=00",
    "a path as a picture": "/pictures/..%2f..%2fetc%2fpasswd?until=1&signature=1",
    "a number that is none": "/pictures/x?until=soon",
    "a path": "/..%2f..%2f..%2fetc/passwd",
    "a file": "/file=/etc/passwd",
    "another method": T2I,
    "nothing": "/sdapi/v1/none",
    "a model": "/v1/models/..%2f..%2fetc",
}
HEADERS = {
    "a name that leads here": {"Host": "attacker.example"},
    "no host": {"Host": ""},
    "a host with a user": {"Host": "user@127.0.0.1"},
    "another site's page": {"Origin": "https://attacker.example"},
    "a page of nowhere": {"Origin": "null"},
    "another port's page": {"Origin": "http://127.0.0.1:1"},
    "across sites": {"Sec-Fetch-Site": "cross-site"},
    "from a sibling": {"Sec-Fetch-Site": "same-site"},
    "a length that is none": {"Content-Length": "many"},
    "a large header": {"X-Large": "x" * 100_000},
}


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    with serve(limits=Limits(max_body=2, patience=1.0), models=models) as running:
        yield running


@pytest.fixture(autouse=True)
def the_next_good_request_is_served(server):
    yield
    assert requests.get(f"{server.url}/sdapi/v1/progress", timeout=WAIT).json()["state"]["job_count"] == 0


def check(answer):
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    content = answer.json()
    line = content["error"]["message"] if isinstance(content["error"], dict) else content["detail"]
    assert line and "\n" not in line and len(line) < 600 and "Traceback" not in line
    return line


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server, name):
    path, body = BAD[name]
    data = json.dumps(body).encode() if isinstance(body, dict) else body if isinstance(body, bytes) else body.encode()
    answer = requests.post(server.url + path, data=data, headers={"Content-Type": "application/json"}, timeout=WAIT)
    line = check(answer)
    assert "root:" not in answer.text and str(server.service.out) not in line
    assert server.service.counts.jobs.get("failed", 0) <= 1  # the size that only the model refuses


@pytest.mark.parametrize("name", GET)
def test_bad_addresses(server, name):
    check(requests.get(server.url + GET[name], timeout=WAIT))


@pytest.mark.parametrize("name", HEADERS)
def test_bad_headers(server, name):
    head = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json", **HEADERS[name]}
    body = json.dumps(GOOD).encode()
    head.setdefault("Content-Length", str(len(body)))
    lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
    status, text = raw(server, f"POST {T2I} HTTP/1.1\r\n{lines}\r\n".encode() + body)
    assert 400 <= status < 500 and text.strip() and "\n" not in text.strip()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\n",
        b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
        b"",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET " + b"x" * 100_000,
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)),
        b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET http://[::1/ HTTP/1.1\r\nHost: [::1\r\n\r\n",
    ],
    ids=[
        "half a head",
        "half a body",
        "nothing",
        "TLS",
        "no end",
        "many headers",
        "length below 0",
        "smuggled",
        "host",
    ],
)
def test_slow_and_broken_clients(server, data):
    """Each is sent away while it keeps its connection open; twenty of them hold up nobody."""
    others = [socket.create_connection(("127.0.0.1", server.port), WAIT) for _ in range(20)]
    for other in others:
        other.sendall(data)
    assert requests.get(f"{server.url}/health", timeout=WAIT).status_code == 200
    status, text = raw(server, data)
    assert 400 <= status < 500 and "\n" not in text.strip()
    for other in others:
        other.close()


@pytest.mark.parametrize(
    "data",
    [
        b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["half a body", "no chunk"],
)
def test_who_breaks_off_is_no_fault(server, data, caplog):
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as client:
        client.sendall(data)
    assert requests.get(f"{server.url}/health", timeout=WAIT).status_code == 200
    time.sleep(0.2)
    assert not [record for record in caplog.records if record.exc_info]


NO_EFFECT = [
    ({"scheduler": "karras"}, "scheduler 'karras' is ignored: it goes with a sampler_name"),
    (
        {"alwayson_scripts": {"controlnet": {"args": [{"image": "x", "module": "canny"}]}}},
        "a unit of the ControlNet extension is ignored: it names no model",
    ),
    ({"alwayson_scripts": {"other": {"args": 5}}}, "alwayson_scripts: 'other' is unknown and ignored"),
]


def test_what_has_no_effect_is_named(serve):
    with serve() as server:
        for asked, note in NO_EFFECT:
            answer = requests.post(f"{server.url}{T2I}", json={**GOOD, **asked}, timeout=WAIT)
            assert answer.status_code == 200 and note in json.loads(answer.json()["info"])["warnings"]


def test_who_waits_when_the_server_ends_is_told(serve):
    with serve() as server, ThreadPoolExecutor(1) as pool:
        asked = {**GOOD, "steps": 150, "n_iter": 16}
        waiting = pool.submit(requests.post, f"{server.url}{T2I}", json=asked, timeout=WAIT)
        while server.service.current() is None:
            time.sleep(0.01)
        server.should_exit = True
        answer = waiting.result()
    assert answer.status_code == 503 and answer.json()["detail"] == "the server is being stopped"


def test_a_body_that_drips_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as client:
        head = f"POST {T2I} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 1000\r\n\r\n"
        client.sendall(head.encode())
        answer = b""
        client.settimeout(0.1)
        for _ in range(WAIT * 10):
            try:
                client.sendall(b"{")
                answer = client.recv(4096)
                break
            except TimeoutError:
                continue
    assert b" 408 " in answer.partition(b"\r\n")[0]


def raw(server, data):
    """(status, body) of an answer to bytes."""
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as client:
        client.sendall(data)
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
            head, _, body = answer.partition(b"\r\n\r\n")
            found = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if found and len(body) >= int(found[0].partition(b":")[2]):
                break
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2].decode()


def test_there_are_sixty_of_them_and_a_good_one_is_drawn(server):
    assert len(BAD) + len(GET) + len(HEADERS) >= 60
    answer = requests.post(server.url + T2I, json=GOOD, timeout=600)
    assert answer.status_code == 200 and len(answer.json()["images"]) == 1
    assert len([*server.service.out.glob("*.png")]) == 1 and not [*server.service.out.glob(".*.tmp")]


def test_a_client_that_goes_leaves_the_queue(server):
    body = json.dumps({**GOOD, "steps": 150, "batch_size": 16}).encode()
    head = f"POST {T2I} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as client:
        client.sendall(head.encode() + body)
        while server.service.current() is None:
            os.sched_yield()
        ticket = server.service.current()
    assert ticket.wait(300) and ticket.state == "stopped"
