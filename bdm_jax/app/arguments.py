"""The command line of sample.py: flags, a file of prompts, settings inside an image; checked without JAX."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from bdm_jax import command_line
from bdm_jax.app.metadata import PARTS, digest, read_settings, restore
from bdm_jax.app.parts import Parts
from bdm_jax.app.prompts import read_prompts
from bdm_jax.app.tags import shared_tags, without_tags
from bdm_jax.errors import UserError
from bdm_jax.images.decode import read_image, read_mask
from bdm_jax.sampling.reading import shared_weights, source_texts
from bdm_jax.sampling.settings import ANY_SEED, Request, Sampling, check

_MAX_SEEDS = 1_000_000


def parse_seeds(text: str) -> tuple[int, ...]:
    """`7`, `0-9` or `1,5,20-24` -> seeds; `-1` stands for any. Raises ValueError."""
    if text.strip() == str(ANY_SEED):
        return (ANY_SEED,)
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not all(number.isdecimal() and len(number) < 20 for number in ((first, last) if dash else (first,))):
            raise ValueError(f"{text}: write seeds as 7, as 0-9 or as 1,5,20-24, or -1 for any")
        begin, end = int(first), int(last or first)
        if end < begin or end >= 2**32 or end - begin + len(seeds) >= _MAX_SEEDS:
            raise ValueError(f"{text}: seeds rise, are below 2**32, and at most {_MAX_SEEDS} at a time")
        seeds += range(begin, end + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{text}: a seed is there twice")
    return tuple(seeds)


_SEEDS = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="N|A-B|A,B,C",
    instance_from_str=lambda texts: parse_seeds(texts[0]),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda seeds: [",".join(map(str, seeds))],
)


@dataclass(frozen=True)
class Arguments:
    """Draw images for Chinese prompts: PNG files in the output folder, with their settings inside.

    Several images also make a contact sheet. An image depends on its prompts, seed and settings only.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """What to draw, in the branch's language; each prompt makes its own images."""
    negative: str = ""
    """Negative prompt, in the branch's language."""
    english: str = ""
    """English prompt for the backbone; empty in the paper."""
    english_negative: str = ""
    """Negative prompt for the backbone, in English."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompts from a .txt, .csv or .jsonl file, or BDM_870.json; rerunning resumes."""
    seed: Annotated[tuple[int, ...], _SEEDS] = (0,)
    """Seeds of each prompt's images: one, a range, or a list; -1 for any."""
    count: int = 1
    """Images per prompt, with seeds SEED, SEED+1, ..."""
    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Initial image (image-to-image)."""
    mask: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """White where the image is repainted (inpainting); of the image's size."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PNG")] = None
    """Regenerate an image of ours: its settings become the defaults of all other flags."""
    out: Path = Path("out")
    """Output folder."""
    batch_size: int = 8
    """Images per batch; affects speed only."""
    preview_every: int = 0
    """Write intermediate images to OUT/preview.png every N steps; 0 for never."""
    settings: Sampling = Sampling()
    parts: Parts = Parts()

    def requests(self) -> tuple[list[Request], list[int] | None]:
        """The requests, image by image, and for prompts from a file the numbers of their rows.

        Raises UserError for what is not valid, as far as that is known without a model.
        """
        common = Request("", self.negative, self.english, self.english_negative, 0, self.image, self.mask)
        if self.prompts is None:
            seeds = self._seeds(self.seed)
            return [replace(common, prompt=prompt, seed=seed) for prompt in self.prompt for seed in seeds], None
        rows = read_prompts(self.prompts, common, english=self.settings.bare)
        drawn = [
            (row, seed) for row in rows for seed in self._seeds((row.request.seed,) if row.own_seed else self.seed)
        ]
        return [replace(row.request, seed=seed) for row, seed in drawn], [row.number for row, _ in drawn]

    def _seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        if self.count == 1:
            return seeds
        return [ANY_SEED] * self.count if seeds[0] == ANY_SEED else range(seeds[0], seeds[0] + self.count)


def parse(given: Sequence[str]) -> tuple[Arguments, list[Request], list[int] | None]:
    """A command line -> arguments, requests, and for prompts from a file the numbers of their rows.

    Raises UserError, in one line, for what is not valid; SystemExit after --help.
    """
    earlier = command_line.parse(_From, _without_help(given), return_unknown_args=True)[0].from_
    values = {} if earlier is None else read_settings(earlier)
    arguments = command_line.parse(Arguments, given, default=_defaults(values), prog=command_line.called("sample.py"))
    _check(arguments, {flag.partition("=")[0] for flag in given if flag.startswith("--")})
    check(arguments.settings)
    requests, rows = arguments.requests()
    tags = shared_tags(requests, arguments.settings)
    if arguments.parts.lora_dir and not tags:
        warnings.warn("--lora-dir has no effect: no prompt names a LoRA, as in <lora:NAME:0.8>", stacklevel=2)
    arguments = replace(arguments, parts=arguments.parts.with_tags(tags))
    _check_requests(arguments, requests, given)
    check_folder(arguments.out)
    arguments = replace(arguments, parts=arguments.parts.fetched())  # after all that can be wrong without them
    if values:
        _compare(arguments, values)
    return arguments, requests, rows


@dataclass(frozen=True)
class _From:
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None


def _without_help(given: Sequence[str]) -> list[str]:
    return [flag for flag in given if flag not in ("-h", "--help")]


def _defaults(values: dict[str, Any]) -> Arguments:
    """The arguments that would draw an image with these settings; they only name its input images."""
    if not values:
        return Arguments()
    request, settings = restore(values)
    texts = {name: getattr(request, name) for name in ("negative", "english", "english_negative")}
    return Arguments((request.prompt,), **texts, seed=(request.seed,), settings=settings)


def _check(arguments: Arguments, flags: set[str]) -> None:
    """Flags that contradict each other."""
    if arguments.prompts and arguments.from_:
        raise UserError("--from repeats one picture: leave out --prompts")
    if arguments.prompts and arguments.prompt:
        raise UserError("prompts from the command line or from a file (--prompts), not both")
    if not arguments.prompt and not arguments.prompts:
        raise UserError('no prompts: give at least one, as in: python sample.py "红灯笼"')
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count} is less than 1")
    if arguments.count > _MAX_SEEDS:
        raise UserError(f"--count {arguments.count} is more than {_MAX_SEEDS}")
    if arguments.count > 1 and len(arguments.seed) > 1:
        raise UserError(f"--seed names {len(arguments.seed)} seeds already: leave out --count")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size} is less than 1")
    if arguments.preview_every < 0:
        raise UserError(f"--preview-every {arguments.preview_every} is less than 0")
    for name in ("timesteps", "sigmas", "residual_strengths"):
        if (flag := f"--{name.replace('_', '-')}") in flags and not getattr(arguments.settings, name):
            raise UserError(f"{flag} without a number")
    if "--hires-strength" in flags and arguments.settings.hires == 1:
        raise UserError("--hires-strength has no effect without --hires")
    if arguments.settings.reference and arguments.prompts and arguments.batch_size > 1:
        raise UserError(
            "--reference lets the pictures of a batch depend on each other: add --batch-size 1 to --prompts"
        )
    arguments.parts.check()


def check_texts(requests: Sequence[Request], settings: Sampling) -> None:
    """Prompts before any model is read: what changes from step to step, several parts, bytes that are no text.

    Raises UserError.
    """
    for request in requests:
        text = "".join((request.prompt, request.negative, request.english, request.english_negative))
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(
                f"the prompt {text[:40].encode('ascii', 'replace').decode()!r} holds bytes that are no UTF-8"
            )
    if settings.reference:
        return
    texts = {(r.negative, r.prompt, r.english_negative, r.english): r for r in requests}
    for request in texts.values():
        plain = without_tags(request, settings)
        pairs = (plain.negative, plain.prompt), (plain.english_negative, plain.english)
        shared_weights([source_texts(*pair, lambda: ()) for pair in pairs])


def _check_requests(arguments: Arguments, requests: Sequence[Request], given: Sequence[str]) -> None:
    check_texts(requests, arguments.settings)
    for request in requests:
        if request.seed >= 2**32:
            raise UserError(f"seed {request.seed} is outside 0 .. 2**32 - 1")
        if request.mask is not None and request.image is None:
            raise UserError("--mask without --image: give the image that it is the mask of")
        if arguments.settings.bare and (request.english or request.english_negative):
            raise UserError("--bare draws the prompt itself, in English: leave out --english and --english-negative")
    strength = any(flag == "--strength" or flag.startswith("--strength=") for flag in given)
    if strength and all(request.image is None for request in requests):
        raise UserError("--strength has no effect without an image to begin from (--image)")
    for request in {request.image: request for request in requests if request.image is not None}.values():
        image = read_image(request.image)
        if request.mask is not None and (mask := read_mask(request.mask)).shape != image.shape[:2]:
            sizes = (f"{array.shape[1]}x{array.shape[0]}" for array in (mask, image))
            raise UserError("the mask has {} pixels, the image {}: they must be of one size".format(*sizes))


def _compare(arguments: Arguments, values: dict[str, Any]) -> None:
    """What --from cannot restore: input images are required, other models and images are noted."""
    for name, read in (("image", read_image), ("mask", read_mask)):
        file, sha256 = getattr(arguments, name), values.get(f"{name}_sha256")
        if sha256 and file is None:
            raise UserError(f"{arguments.from_} was drawn with the {name} {values.get(name)}: give it with --{name}")
        if sha256 and digest(read(file)) != sha256:
            warnings.warn(f"{file} is another {name} than the one {arguments.from_} was drawn with", stacklevel=2)
    names = arguments.parts.names()
    for name in PARTS:
        then, here, flag = values.get(name), names.get(name), f"--{name.replace('_', '-')}"
        if then == here:
            continue
        if here is None:
            message = f"with {flag} {then}: give it with that flag"
        elif then is None:
            message = f"without {flag}, not with {here}"
        else:
            message = f"with {flag} {then}, not with {here}"
        warnings.warn(f"{arguments.from_} was drawn {message}", stacklevel=2)
    if arguments.settings.reference:
        warnings.warn(
            "in the reference mode a picture depends on its batch; alone it may come out otherwise", stacklevel=2
        )


def check_folder(out: Path) -> None:
    """Make the output folder, and refuse one that cannot be written before the long work, not after it.

    Raises UserError.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
