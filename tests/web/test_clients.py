"""Clients that others wrote, unchanged: `webuiapi` for A1111's API, `openai` for OpenAI's."""

import base64
import io
import json
import threading

import numpy as np
import openai
import pytest
import requests
import webuiapi
from PIL import Image

from bdm_jax.app.metadata import read_settings
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling

SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("checkpoints", "Lora", "embeddings"):
        (folder / kind).mkdir()
    (folder / "Lora" / "ink.safetensors").write_bytes(b"not read")
    return folder


@pytest.fixture(scope="module")
def server(serve, models):
    with serve(models=models, preview_every=1) as running:
        yield running


@pytest.fixture
def api(server):
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="DPM++ 2M", steps=2)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def as_alone(tiny, request, drawn, **settings):
    """Whether a picture is the one that `generate` draws by itself."""
    settings = Sampling(**{"steps": 2, "size": (32, 32), "sampler": "dpmpp-2m", "guidance": 7.0, **settings})
    (pixels,) = generate(tiny, [request], settings, batch_size=1)
    return np.abs(np.asarray(drawn.convert("RGB")).astype(int) - pixels).max() <= 1  # another size of batch


def test_txt2img(api, tiny):
    result = api.txt2img(prompt="红灯笼", negative_prompt="低质量", seed=7, batch_size=2, n_iter=1, **SMALL)
    assert len(result.images) == 2 and result.image.size == (32, 32)
    assert result.info["all_seeds"] == [7, 8] and result.info["sampler_name"] == "DPM++ 2M"
    assert result.info["warnings"] == [], result.info["warnings"]
    for seed, image in zip((7, 8), result.images, strict=True):
        assert as_alone(tiny, Request("红灯笼", "低质量", seed=seed), image)
    assert result.image.text["parameters"] == result.info["infotexts"][0]
    assert result.parameters["prompt"] == "红灯笼"


def test_english_and_settings_of_ours_by_override_settings(api, tiny):
    overrides = {"english": "lantern", "branch_strength": 0.5, "none_such": 1}
    result = api.txt2img(prompt="红灯笼", seed=3, override_settings=overrides, restore_faces=True, **SMALL)
    assert as_alone(tiny, Request("红灯笼", english="lantern", seed=3), result.image, branch_strength=0.5)
    warned = "\n".join(result.info["warnings"])
    assert "'none_such' is unknown and ignored" in warned and "restore_faces true is ignored" in warned


def test_img2img_and_inpaint(api, tiny, rng):
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    begin = Image.fromarray(pixels)
    result = api.img2img(images=[begin], prompt="猫", seed=1, denoising_strength=0.5, **SMALL)
    assert as_alone(tiny, Request("猫", seed=1, image=pixels), result.image, strength=0.5)
    white = np.zeros((32, 32), np.uint8)
    white[:16] = 255
    mask = {"mask_image": Image.fromarray(white), "mask_blur": 0}
    result = api.img2img(images=[begin], **mask, prompt="猫", seed=1, denoising_strength=1, **SMALL)
    drawn = np.asarray(result.image.convert("RGB"))
    assert (drawn[16:] == pixels[16:]).all() and (drawn[:16] != pixels[:16]).any()


def test_options_switch_the_model(api, server):
    assert api.util_get_current_model() == server.service.parts.model.name
    assert "demo" in api.util_get_model_names()
    api.util_set_model("demo", find_closest=False)
    assert api.util_get_current_model() == "demo"
    api.set_options({"sd_model_checkpoint": server.service.parts.model.name})
    assert requests.post(f"{server.url}/sdapi/v1/options", json={"sd_model_checkpoint": "../x"}).status_code == 422
    assert api.util_get_current_model() == server.service.parts.model.name


def test_lists(api):
    assert {"DPM++ 2M", "Euler a", "DDIM"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    assert [one["name"] for one in api.get_loras()] == ["ink"] and api.get_embeddings()["loaded"] == {}
    assert api.get_cmd_flags()["api"] and api.get_memory()["ram"] == {} and api.get_scripts()["txt2img"] == []
    for listed in (api.get_upscalers(), api.get_sd_vae(), api.get_hypernetworks(), api.get_prompt_styles()):
        assert isinstance(listed, list)
    assert api.refresh_checkpoints() is None and api.controlnet_model_list() == []


def test_progress_and_interrupt(api):
    results = []
    asked = {"prompt": "雪山", "seed": 1, "batch_size": 8, "n_iter": 2, **SMALL, "steps": 100}
    thread = threading.Thread(target=lambda: results.append(api.txt2img(**asked)))
    thread.start()
    seen = {"progress": 0}
    while thread.is_alive() and not (seen["progress"] and seen["current_image"]):
        seen = api.get_progress()
    assert seen["state"]["job_count"] == 1 and 0 < seen["progress"] <= 1
    assert Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).height >= 256
    api.interrupt()
    thread.join(300)
    assert len(results[0].images) < 16 and results[0].info["state"] == "stopped"
    api.util_wait_for_ready(check_interval=0.1)


def test_skip_and_png_info(api):
    assert api.skip() == {}
    result = api.txt2img(prompt="猫, 狗", seed=5, **SMALL)
    told = api.png_info(result.image)
    assert told.info == result.info["infotexts"][0] and told.info.startswith("猫, 狗\n") and "Seed: 5" in told.info
    assert json.loads(told.json["items"]["bdm_jax"])["seed"] == 5
    assert api.png_info(Image.new("RGB", (4, 4))).info == ""


def test_samplers_and_schedulers_by_their_names(api, server):
    for name, scheduler, ours in (
        ("Euler a", "Automatic", "euler-a"),
        ("DPM++ 2M Karras", "automatic", "dpmpp-2m-karras"),
        ("DPM++ 2M", "Karras", "dpmpp-2m-karras"),
        ("DDIM", "uniform", "ddim"),
    ):
        result = api.txt2img(prompt="猫", seed=1, sampler_name=name, scheduler=scheduler, **SMALL)
        newest = server.service.pictures()[0]
        assert read_settings(newest)["sampler"] == ours and result.info["warnings"] == []
    result = api.txt2img(prompt="猫", seed=1, sampler_name="DDIM", scheduler="karras", **SMALL)
    assert "scheduler 'karras' is ignored" in result.info["warnings"][0]


def test_an_error_is_one_line(api):
    with pytest.raises(RuntimeError) as error:
        api.txt2img(prompt="猫", width=33, height=32, steps=2)
    status, text = error.value.args
    assert status == 422 and json.loads(text)["detail"].startswith("size 33x32")


def test_openai_images(client, tiny, server):
    extra = {"steps": 2, "seed": 11, "sampler": "dpmpp-2m", "guidance": 7, "english": "lantern", "unknown": 1}
    answer = client.images.generate(prompt="红灯笼", n=2, size="32x32", quality="low", extra_body=extra)
    images = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in answer.data]
    for seed, image in zip((11, 12), images, strict=True):
        assert as_alone(tiny, Request("红灯笼", english="lantern", seed=seed), image)
    assert sorted(answer.warnings) == ["'quality' is ignored", "'unknown' is unknown and ignored"]
    how = {"size": "32x32", "response_format": "url", "extra_body": {"steps": 2, "seed": 1}}
    answer = client.images.generate(prompt="猫", **how)
    found = requests.get(answer.data[0].url)
    assert found.status_code == 200 and Image.open(io.BytesIO(found.content)).size == (32, 32)
    assert requests.get(answer.data[0].url + "0").status_code == 403


def test_openai_models_and_errors(client, server):
    own = server.service.parts.model.name
    assert [model.id for model in client.models.list()][0] == own and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-image-9' is not there"):
        client.images.generate(prompt="猫", model="gpt-image-9")
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="猫", size="40x41")
    assert error.value.body["message"].startswith("size 40x41") and error.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="17 pictures are more than the 16"):
        client.images.generate(prompt="猫", n=17)


def test_health_and_metrics(api, server):
    api.txt2img(prompt="猫", seed=1, **SMALL)
    assert requests.get(f"{server.url}/health").json() == {"status": "ok"}
    lines = requests.get(f"{server.url}/metrics").text.splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    assert values["bdm_queue_length"] == 0 and values["bdm_pictures_total"] >= 1
    assert values["bdm_compilations_total"] > 0
    assert values['bdm_stage_seconds_total{stage="drawing"}'] > 0 and values['bdm_jobs_total{state="done"}'] >= 1
    assert values['bdm_requests_total{route="/sdapi/v1/txt2img",status="200"}'] >= 1
