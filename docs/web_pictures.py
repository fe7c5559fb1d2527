"""The screenshots of docs/web.md: python docs/web_pictures.py (needs Chromium, playwright, and a font with Chinese)."""

import io
import shutil
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from bdm_jax.app.service import Job, ModelsFolder, Service
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.web.keys import Keys
from bdm_jax.web.limits import Limits
from bdm_jax.web.server import Server, create_app

OUT = Path(__file__).with_name("web")
PROMPTS = "老虎 月饼 熊猫 饺子 红苹果 折扇 茶壶 龙".split()
WAIT = 240_000  # milliseconds


def main() -> None:
    """Draw a few pictures with the demo, open the page in a browser, and write a PNG into docs/web for each shot."""
    with tempfile.TemporaryDirectory() as folder:
        service, limits = Service(Path(folder), ModelsFolder(), preview_every=1), Limits()
        service.submit(Job(tuple(Request(one, seed=3) for one in PROMPTS), Sampling(steps=15))).wait()
        server = Server(create_app(service, Keys(), limits), "127.0.0.1", 0, limits)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.1)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                for name, (width, scheme, locale, act) in SHOTS.items():
                    size = {"width": width, "height": 900 if width > 500 else 844}
                    page = browser.new_page(viewport=size, color_scheme=scheme, locale=locale)
                    page.set_default_timeout(WAIT)
                    page.goto(f"http://127.0.0.1:{server.port}/")
                    page.wait_for_selector(".thumb")
                    act(page)
                    page.wait_for_timeout(800)  # until what moves has come to rest
                    shot = Image.open(io.BytesIO(page.screenshot(full_page=width < 500))).convert("RGB")
                    shot.quantize(256).save(OUT / f"{name}.png", optimize=True)  # a quarter of the bytes
                    page.close()
        finally:
            server.should_exit = True
            thread.join()
            service.close()


def finished(page: Page) -> None:
    """A picture that has just been drawn."""
    page.click("#settings > button")
    page.fill("#steps input[type=number]", "15")
    page.fill("#seed input", "1")
    page.click("#settings > button")
    page.fill("#prompt textarea", "红灯笼")
    page.click("#draw")
    page.wait_for_selector("[data-state=done] button.tile")


def drawing(page: Page) -> None:
    """Four pictures half-way, with the settings unfolded."""
    page.click("#settings > button")
    page.fill("#steps input[type=number]", "60")
    page.fill("#count input", "4")
    page.fill("#prompt textarea", "熊猫")
    page.click("#draw")
    page.wait_for_function("parseFloat(document.querySelector('.bar i')?.style.width || '0') > 40")
    page.wait_for_timeout(300)


def selected(page: Page) -> None:
    """A picture of the gallery with its settings."""
    page.click(".thumb >> nth=1")
    page.wait_for_selector(".details img")


SHOTS = {
    "wide-zh": (1280, "light", "zh-CN", finished),
    "wide-en-dark": (1280, "dark", "en-US", drawing),
    "narrow-zh": (390, "light", "zh-CN", finished),
    "narrow-en-dark": (390, "dark", "en-US", selected),
}


if __name__ == "__main__":
    main()
