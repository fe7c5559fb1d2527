"""How does the server bear many clients? `python -m bdm_jax.bench.server --clients 32 --requests 500`.

A server of its own (`python -m bdm_jax.web`) draws, by default with the bundled demo, for clients that each ask for the
next picture when they have one. Counted: pictures that are lost or come twice, seconds from request to answer, pictures
per second beside those of sample.py's way in batches of the same size, how far pictures are from those, the server's
memory on the way.
"""

import base64
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdm_jax import command_line
from bdm_jax.app import runs
from bdm_jax.app.arguments import check_folder
from bdm_jax.app.parts import Parts
from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.images.decode import read_image
from bdm_jax.paths import DEMO, check_output
from bdm_jax.runtime import compile_cache
from bdm_jax.sampling.settings import Request, Sampling

_TIMEOUT = 3600  # seconds for one picture


@dataclass(frozen=True)
class LoadArgs:
    """Measure the server under load."""

    model: Path = DEMO
    """What draws: a pipeline folder or a single file."""
    clients: int = 32
    """Clients at once."""
    requests: int = 500
    """Pictures that they ask for together."""
    steps: int = 6
    """Sampling steps of each."""
    size: int = 128
    """Pixels a side."""
    batch_size: int = 8
    """Pictures drawn at a time."""
    compare: int = 64
    """Pictures drawn as sample.py does, for its throughput and to compare pixels; 0 for none."""
    json: Path | None = None
    """Write all figures here."""


def load(args: LoadArgs, out: Path) -> dict[str, Any]:
    """All figures. Raises UserError for settings that are not valid, and where the server does not start."""
    for name in ("clients", "requests", "steps", "size", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is less than 1")
    seeds = range(args.requests)
    rate, alone = _as_sample(args, seeds[: args.compare], out / "sample") if args.compare else (None, {})
    with _Server(out / "served", args) as server:
        _ask(server, args, 2**31)  # what has to be compiled for one picture is not measured
        with ThreadPoolExecutor(args.batch_size) as pool:
            list(pool.map(lambda seed: _ask(server, args, seed), range(2**31 + 1, 2**31 + 1 + 2 * args.batch_size)))
        before, memory = len([*server.out.glob("*.png")]), []
        lock, answers = threading.Lock(), []

        def client(seed: int) -> None:
            asked = time.perf_counter()
            pixels = _ask(server, args, seed)
            spent = time.perf_counter() - asked
            with lock:
                answers.append((spent, _distance(pixels, alone.get(seed))))
                if len(answers) % max(args.requests // 20, 1) == 0:
                    memory.append(server.memory())

        began = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            list(pool.map(client, seeds))
        seconds = time.perf_counter() - began
        files = [path.name for path in server.out.glob("*.png")]
    times = sorted(spent for spent, _ in answers)
    counts = Counter(int(name.rpartition("seed")[2].removesuffix(".png")) for name in files)
    row = {
        "answered": len(answers),
        "lost": sum(counts[seed] == 0 for seed in seeds),
        "twice": sum(counts[seed] > 1 for seed in seeds) + len(files) - before - args.requests,
        "seconds": seconds,
        "per_second": args.requests / seconds,
        "p50": statistics.median(times),
        "p95": times[min(len(times) - 1, round(0.95 * len(times)))],
        "memory": memory,
    }
    if rate:
        row |= {"sample_per_second": rate, "ratio": row["per_second"] / rate}
        row["largest_difference"] = max(far for _, far in answers if far is not None)
    values = {name: value for name, value in asdict(args).items() if name != "json"}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return {"settings": settings, **row}


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures, write them where that was asked for; 2 for bad input."""

    def command() -> None:
        asked = command_line.parse(LoadArgs, args, prog="python -m bdm_jax.bench.server")
        check_output("--json", asked.json)
        compile_cache.enable()
        with tempfile.TemporaryDirectory() as folder:
            found = load(asked, Path(folder))
        print(
            f"{found['answered']} answers to {asked.clients} clients in {found['seconds']:.1f} s, "
            f"{found['lost']} lost, {found['twice']} twice; p50 {found['p50']:.2f} s, p95 {found['p95']:.2f} s; "
            f"{found['per_second']:.2f} pictures/s"
        )
        if asked.compare:
            print(
                f"sample.py: {found['sample_per_second']:.2f} pictures/s, ratio {found['ratio']:.2f}; "
                f"largest difference of a pixel {found['largest_difference']} of 255"
            )
        if found["memory"]:
            print("memory of the server, MB:", *(f"{size / 1e6:.0f}" for size in found["memory"]))
        if asked.json:
            write_json(asked.json, found)

    return command_line.run(command)


class _Server:
    """A server in a process of its own, until the block ends."""

    def __init__(self, out: Path, args: LoadArgs):
        self.out = out
        command = [sys.executable, "-m", "bdm_jax.web", "--no-page", "--port", "0", "--out", str(out)]
        command += ["--model", str(args.model), "--batch-size", str(args.batch_size)]
        command += ["--preview-every", "0", "--max-waiting", "10000"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def __enter__(self) -> "_Server":
        line = self._process.stdout.readline()
        if "http://" not in line:
            raise UserError("the server does not start; what it says is above")
        self.url = line.partition("serving at ")[2].partition(";")[0]
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait(60)

    def memory(self) -> float | None:
        """Resident bytes, where the system tells them."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("process_resident_memory_bytes "):
                    return float(line.split()[1])
        return None


def _request(args: LoadArgs, seed: int) -> Request:
    return Request(f"红灯笼{seed % 7}", seed=seed)


def _ask(server: _Server, args: LoadArgs, seed: int) -> np.ndarray:
    asked = _request(args, seed)
    body = {"prompt": asked.prompt, "seed": seed, "steps": args.steps, "width": args.size, "height": args.size}
    request = urllib.request.Request(
        f"{server.url}/sdapi/v1/txt2img", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        (image,) = json.load(answer)["images"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))


def _as_sample(args: LoadArgs, seeds: Sequence[int], out: Path) -> tuple[float, dict[int, Path]]:
    """As sample.py draws them: pictures per second without the first batch, which compiles; file by seed."""
    check_folder(out)
    parts = Parts(model=args.model)
    pipeline, settings = parts.load(), Sampling(steps=args.steps, size=(args.size, args.size))
    first = [_request(args, 2**31 + number) for number in range(args.batch_size)]
    requests = [*first, *(_request(args, seed) for seed in seeds)]
    run = runs.plan(pipeline, requests, settings, out, parts=parts.names(), rows=range(1, len(requests) + 1))
    _, drawn = runs.draw(pipeline, run, batch_size=args.batch_size)
    files, marks = [], []
    for file in drawn:
        files.append(file)
        marks.append(time.perf_counter())
    spent = marks[len(requests) - 1] - marks[len(first) - 1]
    return len(seeds) / spent, dict(zip(seeds, files[len(first) : len(requests)], strict=True))


def _distance(pixels: np.ndarray, file: Path | None) -> int | None:
    """The largest difference of two pictures' pixels."""
    return None if file is None else int(np.abs(pixels.astype(int) - read_image(file)).max())


if __name__ == "__main__":
    sys.exit(main())
