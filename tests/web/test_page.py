"""The page in a headless Chromium, against the real service with the bundled demo at few steps."""

import logging
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from playwright import sync_api
from safetensors.numpy import save_file
from serving import running

from bdm_jax.app.metadata import read_settings
from bdm_jax.app.service import ModelsFolder, Service
from bdm_jax.images.decode import read_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

WAIT = 180_000  # milliseconds; compiling on busy cores takes its time
ARGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DONE = "[data-state=done]"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@contextmanager
def served(out, models=None, keys=()):
    with running(Service(out, ModelsFolder(models), preview_every=1), keys) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module")
def address(out):
    with served(out) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, width=1280, key=None, **options):
    """A page of its own; afterwards, that it had no error and asked nobody but its own host."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **{"locale": "zh-CN", **options})
    page, faults = context.new_page(), []
    page.set_default_timeout(WAIT)
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    own = (address, "data:", f"blob:{address}")
    page.on("request", lambda sent: None if sent.url.startswith(own) else faults.append(sent.url))
    page.on("response", lambda got: faults.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    enter(page, address, key)
    yield page
    found = list(faults)  # closing may break a stream off
    context.close()
    assert found == []


def enter(page, address, key=None):
    page.goto(address)
    if key:
        page.fill("#key", key)
        page.click("button")
    page.wait_for_selector(".stage")


def unfold(page, *names):
    for name in names:
        page.click(f"#{name} > button")


def draw(page, prompt, **fields):
    """Fill the fields, each by its element's id, and press the button."""
    page.fill("#prompt textarea", prompt)
    for name, value in fields.items():
        page.fill(f"#{name} input:not([type=range]), #{name} textarea", str(value))
    page.click("#draw")


def newest(out):
    return max(out.glob("*.png"))


def test_a_chinese_prompt_becomes_a_picture(browser, address, out):
    with opened(browser, address) as page:
        unfold(page, "settings")
        draw(page, "红灯笼", steps=2, seed=5, count=2)
        page.wait_for_selector(f"{DONE} button.tile >> nth=1")
        page.wait_for_function(f"[...document.querySelectorAll('{DONE} img')].every(one => one.complete)")
        sizes = page.eval_on_selector_all(f"{DONE} img", "all => all.map(one => [one.naturalWidth, one.naturalHeight])")
        assert sizes == [[128, 128]] * 2
        files = sorted(out.glob("*.png"))
        assert [read_settings(file)["seed"] for file in files] == [5, 6]
        assert {read_settings(file)["prompt"] for file in files} == {"红灯笼"}
        # the gallery has both; its settings fill the fields again
        page.fill("#prompt textarea", "")
        page.fill("#seed input", "")
        page.click(f'.thumb[data-name="{files[1].name}"]')
        page.click("#again")
        page.wait_for_selector("#said p")
        assert page.input_value("#prompt textarea") == "红灯笼"
        assert page.input_value("#seed input") == "6"
        assert page.input_value("#steps input[type=number]") == "2"
        # what is not valid is said in one line, as sample.py says it
        draw(page, "红灯笼", steps=2, size="100")
        page.wait_for_selector("#said .error")
        assert "100: write it as WIDTHxHEIGHT" in page.inner_text("#said")


def test_stop_in_the_middle(browser, address, out):
    before = set(out.glob("*.png"))
    with opened(browser, address) as page:
        unfold(page, "settings")
        draw(page, "熊猫", steps=100, count=16)
        page.wait_for_selector(".tile.preview img")
        page.click("#draw")  # one more job, which waits
        page.wait_for_selector("#clear:visible")
        page.click("#clear")
        page.wait_for_selector("#clear", state="hidden")
        page.click("#stop")
        page.wait_for_selector("[data-state=stopped]")
        page.wait_for_selector("#stop", state="hidden")
        assert set(out.glob("*.png")) == before
        draw(page, "熊猫", steps=2, count=1)  # and the next one is drawn
        page.wait_for_selector(f"{DONE} button.tile")
    assert len(set(out.glob("*.png")) - before) == 1


def test_what_is_painted_over_is_redrawn(browser, address, out, tmp_path):
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[:, :20] = (40, 90, 200)
    Image.fromarray(picture).save(tmp_path / "in.png")
    with opened(browser, address) as page:
        unfold(page, "settings", "picture")
        canvas = page.locator("#editor canvas").first
        canvas.wait_for()
        page.set_input_files("#editor input[type=file]", tmp_path / "in.png")
        page.wait_for_selector("#editor [aria-label='Brush'], #editor [title='Brush']", state="attached")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 30, middle[1] + 20, steps=8)
        page.mouse.up()
        draw(page, "红苹果", steps=4, seed=1, strength=1)
        page.wait_for_selector(f"{DONE} button.tile")
    values = read_settings(newest(out))
    assert values["prompt"] == "红苹果" and {"image_sha256", "mask_sha256"} <= values.keys()
    drawn = read_image(newest(out))
    changed = np.abs(drawn.astype(int) - picture).max(axis=2) > 40
    assert changed[44:84, 44:84].any()
    assert not changed[:24].any() and not changed[:, :24].any()  # far from the paint


def test_a_dropped_picture_restores_its_settings(browser, address, out):
    with opened(browser, address) as page:
        unfold(page, "prompts", "settings")
        draw(
            page,
            "饺子",
            steps=3,
            seed=77,
            english="pink background",
            negative="盘子",
            guidance=2.5,
            more="--clip-skip 2",
        )
        page.wait_for_selector(f"{DONE} button.tile")
    file = newest(out)
    with opened(browser, address) as page:
        unfold(page, "prompts", "settings")
        data = list(file.read_bytes())
        dropped = page.evaluate_handle(
            """([data, name]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(data)], name, {type: 'image/png'}));
                return transfer;
            }""",
            [data, file.name],
        )
        page.dispatch_event("#restore button", "drop", {"dataTransfer": dropped})
        page.wait_for_selector("#said p")
        fields = ("prompt", "english", "negative", "seed", "guidance", "more", "size")
        shown = {name: page.input_value(f"#{name} textarea, #{name} input") for name in fields}
        assert shown == {
            "prompt": "饺子",
            "english": "pink background",
            "negative": "盘子",
            "seed": "77",
            "guidance": "2.5",
            "more": "--clip-skip 2",
            "size": "128x128",
        }
        page.click("#draw")
        page.wait_for_selector(f"{DONE} button.tile")
    assert newest(out) != file
    assert np.array_equal(read_image(newest(out)), read_image(file))  # the same picture


@pytest.mark.parametrize(
    "locale, words", [("zh-CN", ("开始绘制", "参数", "已画的图")), ("en-US", ("Draw", "Settings", "Pictures"))]
)
def test_both_languages(browser, address, locale, words):
    with opened(browser, address, locale=locale) as page:
        texts = [page.inner_text(one) for one in ("#draw", "#settings > button", "#pictures .heading")]
        assert tuple(text.split("\n")[0].strip() for text in texts) == words


def test_a_narrow_dark_screen(browser, address):
    with opened(browser, address, width=390, color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        tops = [page.locator(one).bounding_box()["y"] for one in ("#draw", "#stage", "#settings", "#gallery")]
        assert tops == sorted(tops)  # what matters every day comes first, the picture right below the button
        red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
        assert max(map(int, (red, green, blue))) < 60


def test_the_server_ends_while_a_page_is_open(browser, tmp_path, caplog):
    log = logging.getLogger("uvicorn.error")
    with served(tmp_path / "out") as address:
        log.addHandler(caplog.handler)
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector(".stage")
    log.removeHandler(caplog.handler)
    page.close()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def pick(page, field, name):
    page.click(f"#{field} input")
    page.click(f"#{field} [role=option] >> text={name}")


def test_plugins_are_picked_and_pictures_are_their_owner_s(browser, tmp_path, rng):
    """A LoRA with its strength and a textual inversion, of the models folder."""
    for kind in ("loras", "embeddings"):
        (tmp_path / "models" / kind).mkdir(parents=True)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down": rng.normal(size=(4, 192)), "lora_up": rng.normal(size=(192, 4))}
    tensors = {f"{module}.{name}.weight": value.astype(np.float32) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "models" / "loras" / "ink.safetensors")
    word = {"emb_params": rng.normal(size=(2, 128)).astype(np.float32)}
    save_file(word, tmp_path / "models" / "embeddings" / "inkstyle.safetensors")
    out, keys = tmp_path / "out", ("ann=the-key-of-ann", "bob=the-key-of-bob")
    with served(out, tmp_path / "models", keys) as address:
        with opened(browser, address, key="the-key-of-ann") as page:
            unfold(page, "settings", "prompts", "plugins")
            pick(page, "lora", "ink.safetensors")
            page.keyboard.press("Escape")
            page.wait_for_selector("#plugins input[aria-label*='ink']")
            page.fill("#plugins input[type=number][aria-label*='ink']", "0.5")
            pick(page, "embedding", "inkstyle.safetensors")
            page.keyboard.press("Escape")
            page.wait_for_function("document.querySelector('#english textarea').value.includes('inkstyle')")
            draw(page, "红灯笼", steps=2, seed=5)
            page.wait_for_selector(f"{DONE} button.tile")
            assert page.locator(".thumb").count() == 1
        (file,) = (out / "ann").glob("*.png")
        values = read_settings(file)
        assert values["lora"] and "0.5" in str(values["lora"]) and "inkstyle" in values["english"]
        with opened(browser, address, key="the-key-of-bob") as page:
            assert page.locator(".thumb").count() == 0
        # Not `opened`: Gradio's client reports the stream that leaving breaks off, or not, as it happens.
        page = browser.new_page()
        enter(page, address, "the-key-of-bob")
        page.click("a[href='page/logout']")
        page.wait_for_selector("#key")
        page.close()
