"""The runs whose results are recorded: one table for record.py, which recorded them, and for tests/test_unchanged.py.

Only the commands are used (sample.py, train.py), so that a run means the same however the package behind them is laid
out. What a run reads beyond the bundled assets is made here of seeded numbers, by arithmetic that is exact everywhere.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded.json"
OLD_PICTURES = HERE / "old_pictures"  # an output folder of sample.py
OLD_RUN = HERE / "old_run"  # a run's folder of train.py, whose first leg ended half-way

SIDE = 128  # of every picture
CPUS = 2  # XLA's thread pool has one thread for each CPU; how sums are split can depend on their number
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")  # whose versions can change a bit of the results
TIMEOUT = 1800  # seconds for one command, on a busy machine


# ---------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Drawing:
    """One call of sample.py. rows: its prompts, as in a .jsonl file. from_file: whether they are given as one."""

    rows: tuple[dict[str, str], ...]
    flags: tuple[str, ...]
    from_file: bool = True


DRAWINGS = {
    "demo": Drawing(  # the first eight rows leave the backbone's prompt empty: they make two batches, the last four one
        (
            {"prompt": "红灯笼"},
            {"prompt": "熊猫", "negative": "低质量，模糊"},
            {"prompt": "(红:1.3)苹果"},
            {"prompt": "［雪］山，（蓝：0.8）天"},
            {"prompt": "饺子和热茶"},
            {"prompt": "一只黑猫", "negative": "(白:1.2)"},
            {"prompt": "风筝"},
            {"prompt": "龙"},
            {"prompt": "月饼", "english": "night"},
            {"prompt": "长城", "negative": "低质量", "english": "(snow:1.2), winter"},
            {"prompt": "京剧脸谱", "english": "red heart", "english_negative": "text"},
            {"prompt": "一只[可爱]的兔子", "english": "a rabbit in the snow"},
        ),
        ("--seed", "0-1"),
    ),
    "reference": Drawing(  # its batch takes as many windows as the longest prompt
        ({"prompt": "（红:1.3）灯笼"}, {"prompt": "春节的夜晚，孩子们在院子里放烟花，老人们围着桌子包饺子"}),
        ("--reference", "--steps", "8", "--seed", "3", "--negative", "低质量"),
        from_file=False,
    ),
    "plugins": Drawing(  # prompts of two windows
        (
            {"prompt": "一碗热气腾腾的牛肉面，旁边放着一双筷子和一个小碟子，上面撒满葱花", "english": "noodles, red"},
            {"prompt": "一座古老的石桥，桥下有一条小船慢慢划过，船上的人撑着红伞", "english": "(bridge:1.2), night"},
        ),
        (
            *("--lora", "lora.safetensors:0.8:0.5", "--control", "controlnet,hint.png,strength=0.7,end=0.75"),
            *("--steps", "8", "--seed", "5"),
        ),
    ),
    "image": Drawing(
        ({"prompt": "老虎", "image": "image.png", "mask": "mask.png"},),
        ("--steps", "10", "--sampler", "dpmpp-2m-sde-karras", "--strength", "0.6", "--seed", "0-1"),
    ),
    "sampler": Drawing(
        ({"prompt": "金鱼", "negative": "低质量"}, {"prompt": "（红：1.2）伞"}),
        (
            *("--sampler", "euler-a", "--guidance", "4", "--guidance-rescale", "0.7", "--branch-end", "0.6"),
            *("--cache-every", "2", "--steps", "10", "--seed", "7"),
        ),
    ),
    "english-guidance": Drawing(
        ({"prompt": "茶壶", "english": "blue"}, {"prompt": "剪刀", "english": "(gold:1.3)"}),
        (
            *("--english-guidance", "5", "--guidance", "2", "--sampler", "unipc", "--merge-tokens", "0.25"),
            *("--residual-strengths", "0.9", "1", "1.1", "0.8", "1", "--steps", "6", "--seed", "11"),
        ),
    ),
    "bare": Drawing(
        ({"prompt": "red lantern BREAK snow", "negative": "text"}, {"prompt": "(black:1.2) cat BREAK [tree]"}),
        ("--bare", "--sampler", "ddim", "--steps", "8", "--seed", "2"),
    ),
}
OLD_PICTURES_OF = "sampler"  # the drawing whose output folder is kept as the old version left it

TRAINING_STEPS = 20
TRAINING = (
    *("emoji-branch", "--task.backbone", "assets/demo", "--task.text-encoder", "assets/demo/branch_text_encoder"),
    *("--task.tokenizer", "assets/demo/branch_tokenizer", "--task.guidance", "3"),
    *("--data.folder", "assets/emoji", "--data.style", "fluent", "--data.concepts", "32"),
    *("--optimizer.learning-rate", "1e-3", "--optimizer.copied-factor", "0.2", "--optimizer.warmup-steps", "5"),
    *("--optimizer.b2", "0.999", "--optimizer.ema-decay", "0.999"),
    *("--steps", str(TRAINING_STEPS), "--batch-size", "4", "--log-every", "1", "--sample-every", "1000"),
    *("--run", "training"),
)
TRAINING_SINCE = ("--data.scenes", "None")  # settings that came later, as the recorded version trained

# Two vectors are trained: a whole train state, and a run's folder small enough to be kept.
OLD_RUN_FLAGS = (
    *("emoji-inversion", "--task.model", "assets/demo", "--data.folder", "assets/emoji", "--steps", "12"),
    *("--batch-size", "2", "--log-every", "4", "--optimizer.warmup-steps", "2", "--run", OLD_RUN.name),
)
LEG = ("--minutes", "0.0001")  # over when the first line is logged: after four steps
LEG_OVER = 3  # train.py's exit status then
EXPORTED_WORD = "learned_embeds.safetensors"
KEPT_OF_RUN = ("config.json", "checkpoints", "latents-0.npz", "metrics.jsonl", "speed.jsonl")


# ------------------------------------------------------------------------------------------------- running the commands


class Workplace:
    """A folder in which the commands of one checkout run: its assets, the inputs, an own cache of compiled programs.

    Paths are given relative to it: no file that a command writes names the machine's folders in its settings.
    """

    def __init__(self, root: Path, folder: Path, cache: str = "cache"):
        self.root, self.folder = root.resolve(), folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "assets").exists():
            (folder / "assets").symlink_to(self.root / "assets", target_is_directory=True)
            make_inputs(folder)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "BDM_JAX_", "LIBTPU_"))}
        own = {"BDM_JAX_CACHE": str(folder / cache), "XDG_CACHE_HOME": str(folder / "home"), "JAX_PLATFORMS": "cpu"}
        own["BDM_JAX_DTYPE"] = "float32"  # as it was recorded
        self.environment = {**kept, **own, "PYTHONUTF8": "1"}

    def run(self, script: str, *flags: str) -> subprocess.CompletedProcess:
        """The command to its end, on as many CPUs as the recording had."""
        before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        try:
            if before is not None:  # of this thread; the child inherits it
                os.sched_setaffinity(0, sorted(before)[:CPUS])
            process = subprocess.Popen(
                [sys.executable, str(self.root / script), *flags],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def draw(self, name: str, out: str) -> subprocess.CompletedProcess:
        """The drawing of that name, into a folder."""
        drawing = DRAWINGS[name]
        prompts = [row["prompt"] for row in drawing.rows]
        if drawing.from_file:
            file = self.folder / f"{name}.jsonl"
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in drawing.rows]
            file.write_text("".join(lines), encoding="utf-8")
            prompts = ["--prompts", file.name]
        return self.run("sample.py", *prompts, *drawing.flags, "--out", out)

    def forget(self, *names: str) -> None:
        """Remove folders of earlier runs."""
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)


def here() -> dict[str, Any]:
    """All that the bits of a result depend on besides the code, as far as this system tells it."""
    processor = _processor()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"versions": {name: version(name) for name in PACKAGES}, **processor, "cpus": min(cpus, CPUS)}


_FLAGS = re.compile(r"(sse|ssse|avx|fma|f16c|bmi|amx|popcnt|movbe|adx|abm|xop|gfni|vaes|vpclmul)")


def _processor() -> dict[str, str]:
    """What XLA's compiler chooses its instructions and their order by: maker, family and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = told.get("flags", told.get("Features", "")).split()
    return {
        "processor": told.get("model name", "unknown"),
        "vendor": told.get("vendor_id", told.get("CPU implementer", "unknown")),
        "family": told.get("cpu family", told.get("CPU part", "unknown")),
        "flags": " ".join(sorted(flag for flag in flags if "flags" not in told or _FLAGS.match(flag))),
    }


# ------------------------------------------------------------------------------------------------- reading the results


def read_pictures(folder: Path) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """File name -> pixels (H,W,3) uint8 and settings inside, of an output folder's pictures, contact sheets aside."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        if not path.stem.endswith("contact-sheet"):
            with Image.open(path) as image:
                found[path.name] = np.asarray(image.convert("RGB")), json.loads(image.text["bdm_jax"])
    return found


def tiled(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures of one size side by side, six in a row -> (H,W,3)."""
    pictures = list(pictures)
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % min(6, len(pictures)))
    columns = min(6, len(pictures))
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows)


def untiled(sheet: np.ndarray, count: int) -> list[np.ndarray]:
    """The inverse of `tiled`."""
    columns = sheet.shape[1] // SIDE
    places = [divmod(i, columns) for i in range(count)]
    return [sheet[SIDE * y : SIDE * (y + 1), SIDE * x : SIDE * (x + 1)] for y, x in places]


def read_sheet(name: str) -> np.ndarray:
    """The recorded pictures of a drawing, as `tiled` put them together."""
    with Image.open(HERE / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged, speed aside; floats as exact hexadecimal strings."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]
    return [{n: value.hex() if isinstance(value, float) else value for n, value in row.items()} for row in rows]


def read_training(run: Path) -> dict[str, Any]:
    """What a finished training of the branch logged, exported and drew."""
    export = run / "export"
    (grid,) = (run / "samples").glob("*.png")
    with Image.open(grid) as image:
        pixels = np.asarray(image.convert("RGB"))
    return {
        "metrics": read_metrics(run),
        "files": sorted(path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()),
        "branch": read_tensors(export / "branch" / "diffusion_pytorch_model.safetensors"),
        "samples": {"name": grid.name, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(), "means": means(pixels)},
    }


def means(pixels: np.ndarray) -> list[list[float]]:
    """(H,W,3) uint8 -> mean colour of each picture of a grid."""
    height, width = (side // SIDE for side in pixels.shape[:2])
    cells = pixels.reshape(height, SIDE, width, SIDE, 3).mean(axis=(1, 3))
    return cells.reshape(-1, 3).round(3).tolist()


def read_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> type, shape, SHA-256 of the bytes and norm (fp64) of every tensor in a safetensors file."""
    found = {}
    for name, array in sorted(load_file(path).items()):
        norm = float(np.sqrt(np.sum(np.square(array.astype(np.float64)))))
        kind = {"dtype": array.dtype.name, "shape": list(array.shape)}
        found[name] = {**kind, "sha256": hashlib.sha256(array.tobytes()).hexdigest(), "norm": norm.hex()}
    return found


# ----------------------------------------------------------------------------------------------------------- the inputs


def make_inputs(folder: Path) -> dict[str, str]:
    """Write a LoRA and a ControlNet for the demo, a hint, an image and a mask into a folder that has `assets` in it.

    Returns a digest for each file. Values are sums and products of uniform numbers: no library's rounding is in them.
    """
    rng = np.random.default_rng(20)
    weights = {"lora.safetensors": _lora(folder / "assets" / "demo", rng)}
    network = folder / "controlnet"
    network.mkdir()
    (network / "config.json").write_text(json.dumps(_CONTROLNET, indent=1))
    weights["controlnet/diffusion_pytorch_model.safetensors"] = _controlnet(folder / "assets" / "demo", rng)
    digests = {}
    for name, tensors in weights.items():
        save_file(tensors, folder / name)
        told = b"".join(key.encode() + tensors[key].tobytes() for key in sorted(tensors))
        digests[name] = hashlib.sha256(told).hexdigest()
    for name, pixels in {"hint.png": _hint(rng), "image.png": _image(rng), "mask.png": _mask()}.items():
        Image.fromarray(pixels).save(folder / name)
        digests[name] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return digests


_RANK = 2
_ATTENTION = re.compile(r"(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)\.weight$")
_HINT_WIDTHS = (8, 8, 16, 32)
_CONTROLNET = {
    "_class_name": "ControlNetModel",
    "in_channels": 4,
    "block_out_channels": [96, 192],
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "norm_eps": 1e-05,
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": list(_HINT_WIDTHS),
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
}


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], most: float) -> np.ndarray:
    """fp32, between -most and most."""
    return (rng.random(shape, np.float32) * 2 - 1) * np.float32(most)


def _shapes(component: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a component folder of the demo."""
    (path,) = component.glob("*.safetensors")
    with safe_open(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def _lora(demo: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """kohya's layout, for all attentions of the UNet and of its text tower."""
    tensors = {}
    for prefix, component in (("lora_unet", "unet"), ("lora_te", "text_encoder")):
        for name, (outputs, inputs) in ((n, s) for n, s in _shapes(demo / component).items() if _ATTENTION.search(n)):
            module = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
            tensors[f"{module}.lora_down.weight"] = _uniform(rng, (_RANK, inputs), 0.25)
            tensors[f"{module}.lora_up.weight"] = _uniform(rng, (outputs, _RANK), 0.25)
            tensors[f"{module}.alpha"] = np.array(1.0, np.float32)
    return tensors


def _controlnet(demo: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """diffusers' layout: the demo's branch has the shapes, but for those that read the hint. No weight is zero."""
    shapes, hint = _shapes(demo / "branch"), "controlnet_cond_embedding"
    widths = [(3, _HINT_WIDTHS[0], "conv_in"), (_HINT_WIDTHS[-1], _CONTROLNET["block_out_channels"][0], "conv_out")]
    for i, (inputs, outputs) in enumerate(zip(_HINT_WIDTHS, _HINT_WIDTHS[1:], strict=False)):
        widths += [(inputs, inputs, f"blocks.{2 * i}"), (inputs, outputs, f"blocks.{2 * i + 1}")]
    for inputs, outputs, module in widths:
        shapes |= {f"{hint}.{module}.weight": (outputs, inputs, 3, 3), f"{hint}.{module}.bias": (outputs,)}
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if len(shape) > 1:  # about the variance that keeps activations as large as they are
            tensors[name] = _uniform(rng, shape, 1.5 / int(np.prod(shape[1:])) ** 0.5)
        else:
            tensors[name] = _uniform(rng, shape, 0.1) + np.float32("norm" in name and name.endswith("weight"))
    return tensors


def _hint(rng: np.random.Generator) -> np.ndarray:
    """White outlines of rectangles on black, (H,W,3) uint8."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    for left, top, width, height in rng.integers(8, 60, (6, 4)):
        pixels[top : top + height, [left, left + width]] = 255
        pixels[[top, top + height], left : left + width] = 255
    return pixels


def _image(rng: np.random.Generator) -> np.ndarray:
    """Coloured squares over a gradient, a little noise, (H,W,3) uint8."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([2 * x, 2 * y, 255 - x - y], axis=-1)
    for left, top in rng.integers(0, SIDE - 40, (5, 2)):
        pixels[top : top + 40, left : left + 40] = rng.integers(0, 256, 3)
    return np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)


def _mask() -> np.ndarray:
    """A white disc with a grey rim, (H,W) uint8."""
    y, x = np.mgrid[:SIDE, :SIDE]
    squared = (x - 64) ** 2 + (y - 60) ** 2
    return np.where(squared < 36**2, 255, np.where(squared < 48**2, 128, 0)).astype(np.uint8)
