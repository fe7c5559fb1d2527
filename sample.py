"""Pictures from prompts: python sample.py "红灯笼" """

import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdm_jax.errors import UserError, unknown
from bdm_jax.paths import DEMO
from convert.files import FileError


@dataclass(frozen=True)
class Arguments:
    """Draw pictures for Chinese prompts: PNG files, numbered on in the output folder, with their settings inside.

    Several pictures also make a contact sheet. A picture depends on its prompts, seed and settings only.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """What to draw, in the branch's language; each prompt makes its own pictures."""
    negative: str = ""
    """What to keep away from, in the branch's language."""
    english: str = ""
    """Told to the backbone as well, in English; the paper's way is to leave it empty."""
    english_negative: str = ""
    """What the backbone keeps away from, in English."""
    seed: int = 0
    """Seed of each prompt's first picture."""
    count: int = 1
    """Pictures per prompt, with seeds SEED, SEED+1, ..."""
    steps: int = 25
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance, 1 for none; by default the model's own."""
    sampler: str = "dpmpp-2m"
    """Sampler; an unknown name shows those there are."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; by default what the model was trained at."""
    batch_size: int = 8
    """Pictures drawn at a time; changes their speed only."""
    bare: bool = False
    """Draw with the backbone alone, which reads English."""
    model: Path = DEMO
    """Model: a pipeline folder, or a single file of UNet, VAE and text tower."""
    backbone: Path | None = None
    """Another English model in place of the model's own: a pipeline folder or a single file."""
    vae: Path | None = None
    """Another autoencoder: a component folder or a file."""
    branch: Path | None = None
    """Another branch: a component folder or a file."""
    text_encoder: Path | None = None
    """Another English text tower: a component folder or a file."""
    branch_text_encoder: Path | None = None
    """Another text tower for the branch: a component folder or a file."""
    variant: str | None = None
    """Which of a folder's weight files to read, as in fp16."""
    out: Path = Path("out")
    """Folder for the pictures."""


def main() -> int:
    """Exit status: 0, 2 after bad input (one line on stderr), 130 after Ctrl-C."""
    arguments = tyro.cli(Arguments, prog="sample.py", config=(tyro.conf.FlagCreatePairsOff,))
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    what = SpinnerColumn(), TextColumn("{task.description}"), BarColumn()
    try:
        size = check(arguments)
        with Progress(*what, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            paths = draw(arguments, size, bar)
    except (UserError, FileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished pictures are kept", file=sys.stderr)
        return 130
    print(*paths, sep="\n")
    return 0


def check(arguments: Arguments) -> tuple[int, int] | None:
    """What can be known before JAX is loaded; returns (height, width). Raises UserError."""
    if not arguments.prompts:
        raise UserError('no prompts: give at least one, as in: python sample.py "红灯笼"')
    if arguments.bare and (arguments.english or arguments.english_negative):
        raise UserError("--bare draws the prompt itself, in English: leave out --english and --english-negative")
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count} is less than 1")
    width, x, height = (arguments.size or "").partition("x")
    if arguments.size is not None and not (x and width.isdecimal() and height.isdecimal()):
        raise UserError(f"--size {arguments.size}: write it as WIDTHxHEIGHT, for example 512x512")
    if not arguments.model.exists():
        raise UserError(f"{arguments.model}: no such model folder")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.out).close()
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written ({error.strerror or error})") from error
    return (int(height), int(width)) if x else None


def draw(arguments: Arguments, size: tuple[int, int] | None, bar: Progress) -> list[Path]:
    """Load the model and draw; returns the files written. JAX is imported here, when it is needed."""
    task = bar.add_task("loading", total=None)
    from bdm_jax import compile_cache
    from bdm_jax.diffusion.samplers import SAMPLERS
    from bdm_jax.generate import Request, default_size, generate
    from bdm_jax.pictures import contact_sheet, file_name, next_index, thumbnail, write_png
    from bdm_jax.pipeline import BridgePipeline

    if arguments.sampler not in SAMPLERS:
        raise unknown("sampler", arguments.sampler, SAMPLERS)
    compile_cache.enable()
    others = ("backbone", "vae", "branch", "text_encoder", "branch_text_encoder", "variant")
    parts = {name: getattr(arguments, name) for name in others}
    pipeline = BridgePipeline.from_pretrained(arguments.model, **parts)
    size = size or default_size(pipeline)
    guidance = pipeline.guidance if arguments.guidance is None else arguments.guidance
    fixed = {name: getattr(arguments, name) for name in ("negative", "english", "english_negative")}
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    requests = [Request(prompt, **fixed, seed=seed) for prompt in arguments.prompts for seed in seeds]
    settings = {"steps": arguments.steps, "guidance": guidance, "sampler": arguments.sampler}

    def progress(done: int, total: int) -> None:
        bar.update(task, description="drawing" if done else "compiling", completed=done, total=total)

    pictures = generate(
        pipeline,
        requests,
        **settings,
        size=size,
        batch_size=arguments.batch_size,
        branch=not arguments.bare,
        progress=progress,
    )
    more = {"height": size[0], "width": size[1], "bare": arguments.bare, "model": arguments.model.resolve().name}
    more |= {name: Path(part).name for name, part in parts.items() if part is not None}
    first, kept, paths = next_index(arguments.out), [], []
    for index, (request, picture) in enumerate(zip(requests, pictures, strict=True)):
        paths.append(arguments.out / file_name(first + index, request.prompt, request.seed))
        write_png(paths[-1], picture, {**asdict(request), **settings, **more})
        kept.append(thumbnail(picture))
    if len(kept) > 1:
        columns = arguments.count if 1 < arguments.count < len(kept) else None
        captions = [f"{r.prompt} {r.seed}" if arguments.count > 1 else r.prompt for r in requests]
        paths.append(arguments.out / f"{first:04d}-contact-sheet.png")
        write_png(paths[-1], contact_sheet(kept, captions, columns))
    return paths


if __name__ == "__main__":
    sys.exit(main())
