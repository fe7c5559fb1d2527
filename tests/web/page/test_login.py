"""The page's login and its pictures' routes: an owner's key opens that owner's pictures, and nothing else."""

import fastapi
import numpy as np
import pytest
from fastapi.testclient import TestClient

from bdm_jax.app.service import Service
from bdm_jax.images.pictures import write_png
from bdm_jax.web.page.login import Login
from bdm_jax.web.page.pictures import routes


@pytest.fixture
def client(tmp_path):
    for owner in ("anna", "ben"):
        (tmp_path / owner).mkdir()
        write_png(tmp_path / owner / f"0001-{owner}-seed1.png", np.zeros((300, 400, 3), np.uint8))
    service, app = Service(tmp_path), fastapi.FastAPI()
    login = Login({"a-key": "anna", "b-key": "ben"}.get)
    app.include_router(login.routes())
    app.include_router(routes(service, login.owner))

    @app.get("/")
    def home(request: fastapi.Request):
        return {"owner": login.owner(request)}

    yield TestClient(app)
    service.close()


def enter(client, key):
    return client.post("/page/login", data={"key": key})


def test_a_key_opens_its_owners_pictures_only(client):
    assert client.get("/page/pictures/0001-anna-seed1.png").status_code == 401
    answer = enter(client, "a-key")
    assert answer.json() == {"owner": "anna"}
    cookie = answer.history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "a-key" not in cookie
    assert client.get("/page/pictures/0001-anna-seed1.png").headers["content-type"] == "image/png"
    small = client.get("/page/thumbnails/0001-anna-seed1.png")
    assert small.headers["content-type"] == "image/webp" and small.content.startswith(b"RIFF")
    for name in ("0001-ben-seed1.png", "..%2Fben%2F0001-ben-seed1.png", "pictures.jsonl", "%00"):
        for route in ("pictures", "thumbnails"):
            assert client.get(f"/page/{route}/{name}").status_code == 404


def test_a_wrong_key_is_refused_in_the_browsers_language(client):
    answer = client.post("/page/login", data={"key": "no"}, headers={"accept-language": "zh-CN"})
    assert answer.status_code == 401 and "密钥不对" in answer.text
    assert "not known" in enter(client, "no").text
    assert client.get("/").json() == {"owner": None}
    assert client.post("/page/login", data={"key": "x" * 2000}).status_code == 422


def test_leaving_ends_the_session(client):
    enter(client, "b-key")
    stolen = dict(client.cookies)
    assert client.get("/page/logout").status_code == 200  # the form again
    client.cookies.update(stolen)
    assert client.get("/").json() == {"owner": None}
