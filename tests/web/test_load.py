"""Many clients at once: every request answered once, every picture the one of the same request alone."""

import base64
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests
from PIL import Image

from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling

CLIENTS, REQUESTS = 8, 40


def test_none_lost_none_twice_each_as_alone(serve, tiny):
    with serve() as server:

        def ask(seed):
            prompt = f"灯笼{seed % 5}"
            body = {"prompt": prompt, "seed": seed, "steps": 2, "width": 32, "height": 32, "cfg_scale": 3}
            answer = requests.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=600)
            assert answer.status_code == 200, answer.text
            (image,) = answer.json()["images"]
            return prompt, seed, np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))

        with ThreadPoolExecutor(CLIENTS) as pool:
            drawn = list(pool.map(ask, range(REQUESTS)))
        names = [path.name for path in server.service.pictures(limit=10_000)]
        counts = server.service.counts
    assert len(names) == REQUESTS and counts.pictures == REQUESTS and counts.jobs == {"done": REQUESTS}
    assert counts.batches < REQUESTS  # some were drawn together
    assert Counter(name.rpartition("seed")[2] for name in names) == Counter(f"{seed}.png" for seed in range(REQUESTS))
    settings = Sampling(steps=2, size=(32, 32), guidance=3.0)
    alone = generate(tiny, [Request(prompt, seed=seed) for prompt, seed, _ in drawn], settings, batch_size=1)
    for (_, seed, pixels), expected in zip(drawn, alone, strict=True):
        assert np.abs(pixels.astype(int) - expected).max() <= 1, seed  # another size of batch is another program
