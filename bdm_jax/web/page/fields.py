"""What the fields of the page say -> a job, and the settings inside a picture -> the fields. Knows no Gradio."""

import dataclasses
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from bdm_jax import command_line
from bdm_jax.app.arguments import parse_seeds
from bdm_jax.app.metadata import PARTS, filled, restore
from bdm_jax.app.parts import Parts
from bdm_jax.app.service import Job, ModelsFolder
from bdm_jax.errors import UserError, short
from bdm_jax.sampling.settings import ANY_SEED, Request, Sampling, parse_size
from bdm_jax.text.tags import take_tags
from bdm_jax.web.page.texts import say

AS_STARTED = ""  # the model that the server was started with; as a branch, the model's own
BARE = "(bare)"  # no branch; no file is called so
# Settings with a field of their own; the others are written as flags into one field.
_PICKED = ("model", "branch", "lora", "embedding", "control")  # parts with a field
_OWN = ("steps", "sampler", "guidance", "size", "branch_strength", "strength", "bare")


@dataclass(frozen=True)
class PickedControl:
    """A ControlNet of the models folder with its map, or with a photo that `maker` makes it of."""

    name: str
    file: str | None
    maker: str = ""
    strength: float = 1.0


@dataclass(frozen=True)
class FormFields:
    """What stands in the fields. An empty text is the model's own; of the seed, any."""

    prompt: str = ""
    negative: str = ""
    english: str = ""
    english_negative: str = ""
    steps: int | None = Sampling.steps
    sampler: str = ""
    guidance: str = ""
    size: str = ""
    seed: str = ""
    count: int | None = 1
    branch_strength: float = 1.0
    strength: float = Sampling.strength
    more: str = ""
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    model: str = AS_STARTED
    branch: str = AS_STARTED
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[str, ...] = ()
    control: PickedControl | None = None


@dataclass(frozen=True)
class Restored:
    """What stands in the fields for a picture to be drawn again, and what its file could not give."""

    fields: FormFields
    notes: list[str] = field(default_factory=list)


def to_job(fields: FormFields, models: ModelsFolder, started: Parts, owner: str = "", most: int | None = None) -> Job:
    """The job that sample.py would make of the same settings.

    Args:
      started: the parts that the server was started with.
      most: pictures of one job.

    Raises UserError for what is not valid, as far as the fields alone say it; the service checks the rest.
    """
    count = 1 if fields.count is None else fields.count
    if count < 1 or count > (most or count):
        raise UserError(f"{count} pictures: expected 1 to {most}" if most else f"{count} pictures: expected 1 or more")
    settings = Sampling(
        steps=Sampling.steps if fields.steps is None else fields.steps,
        sampler=fields.sampler.strip() or None,
        guidance=_guidance(fields.guidance),
        size=_size(fields.size),
        branch_strength=fields.branch_strength,
        strength=fields.strength if fields.image is not None else Sampling.strength,
        bare=fields.branch == BARE,
    )
    settings = _with_flags(settings, fields.more)
    if settings.bare and settings.branch_strength != 1:
        settings = replace(settings, branch_strength=1.0)
    texts = {name: getattr(fields, name) for name in ("prompt", "negative", "english", "english_negative")}
    request = Request(**texts, image=fields.image, mask=fields.mask)
    seeds = _seeds(fields.seed, count)
    if most is not None and len(seeds) > most:
        raise UserError(f"{len(seeds)} pictures: expected 1 to {most}")
    return Job(tuple(replace(request, seed=seed) for seed in seeds), settings, _parts(fields, models, started), owner)


def from_picture(values: Mapping[str, Any], models: ModelsFolder, started: Parts, language: str) -> Restored:
    """The fields that draw a picture with these settings again (see `metadata.read_settings`).

    Image, mask and map are not in a file, and a part may be missing here: the notes say so.
    """
    request, settings = restore(filled(values))
    notes = []
    if values.get("image_sha256"):
        notes.append(say("from_image", language, name=values.get("image") or "?"))
    found = _Parts(values, models, started, language, notes)
    fields = FormFields(
        prompt=request.prompt,
        negative=request.negative,
        english=request.english,
        english_negative=request.english_negative,
        steps=settings.steps,
        sampler=settings.sampler or "",
        guidance="" if settings.guidance is None else f"{settings.guidance:g}",
        size=f"{settings.size[1]}x{settings.size[0]}" if settings.size else "",
        seed=str(request.seed),
        branch_strength=settings.branch_strength,
        strength=settings.strength,
        more=as_flags(settings),
        model=found.model(),
        branch=BARE if settings.bare else found.one("branch", "branches"),
        loras=found.loras(request),
        embeddings=found.embeddings(),
        control=found.control(),
    )
    found.others()
    return Restored(fields, notes)


def as_flags(settings: Sampling) -> str:
    """Settings that have no field of their own, as flags of the command line; those as by default are left out."""
    words = []
    for one in dataclasses.fields(Sampling):
        value = getattr(settings, one.name)
        if one.name in _OWN or value == one.default:
            continue
        words.append(f"--{one.name.replace('_', '-')}")
        if isinstance(value, tuple):
            words += map(str, value)
        elif value is not True or one.default is None:
            words.append(str(value))
    return " ".join(words)


def _with_flags(settings: Sampling, text: str) -> Sampling:
    """Raises UserError for what are no flags of `Sampling`, and for those that have fields of their own."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{short(text)}: {error}; write flags as on the command line") from error
    if not words:
        return settings
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in _OWN:
            raise UserError(f"{word}: this setting has a field of its own")
        if word in ("-h", "--help"):
            raise UserError(f"{word}: write flags as in: --hires 2 --clip-skip 2")
    return command_line.parse(Sampling, words, default=settings, prog="sample.py")


def _seeds(text: str, count: int) -> Sequence[int]:
    """`7` or, as sample.py takes them, `0-9` or `1,5,8`; any where it is empty or -1."""
    try:
        seeds = parse_seeds(text.strip() or str(ANY_SEED))
    except ValueError as error:
        raise UserError(f"seed {error}") from error
    if seeds == (ANY_SEED,):  # chosen here, so that no note says what the pictures' names say
        return [random.SystemRandom().randrange(2**31) for _ in range(count)]
    if len(seeds) > 1 and count > 1:
        raise UserError(f"{len(seeds)} seeds and {count} pictures: give one seed, or 1 picture of each")
    return seeds if count == 1 else range(seeds[0], seeds[0] + count)


def _guidance(text: str) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise UserError(f"guidance {short(text)}: expected a number") from error


def _size(text: str) -> tuple[int, int] | None:
    try:
        return parse_size(text.strip().replace("×", "x")) if text.strip() else None
    except ValueError as error:
        raise UserError(str(error)) from error


def _parts(fields: FormFields, models: ModelsFolder, started: Parts) -> Parts:
    parts = started
    if fields.model != AS_STARTED:  # another model, with its own parts
        parts = Parts(model=models.path("models", fields.model), text_weights=started.text_weights)
    if fields.branch not in (AS_STARTED, BARE):
        parts = replace(parts, branch=models.path("branches", fields.branch))
    loras = tuple(f"{models.path('loras', name)}:{strength:g}" for name, strength in fields.loras)
    embeddings = tuple(str(models.path("embeddings", name)) for name in fields.embeddings)
    controls = () if fields.control is None else (_control(fields.control, models),)
    return replace(
        parts,
        lora=(*parts.lora, *loras),
        embedding=(*parts.embedding, *embeddings),
        control=(*parts.control, *controls),
    )


def _control(control: PickedControl, models: ModelsFolder) -> str:
    network = models.path("controls", control.name)
    if control.file is None:
        raise UserError(f"the ControlNet {control.name} needs a map: give it an image")
    maker = f",from={control.maker}" if control.maker else ""
    return f"{network},{control.file},strength={control.strength:g}{maker}"


class _Parts:
    """The parts that a picture names, without their folders, among those that there are."""

    def __init__(
        self, values: Mapping[str, Any], models: ModelsFolder, started: Parts, language: str, notes: list[str]
    ):
        self.values, self.models, self.language, self.notes = values, models, language, notes
        self.started = started.names()

    def model(self) -> str:
        name = self.values.get("model")
        if name is None or name == self.started.get("model"):
            return AS_STARTED
        return self._find("model", "models", name) or AS_STARTED

    def one(self, part: str, kind: str) -> str:
        name = self.values.get(part)
        if name is None or name == self.started.get(part):
            return AS_STARTED
        return self._find(part, kind, name) or AS_STARTED

    def loras(self, request: Request) -> tuple[tuple[str, float], ...]:
        texts = (request.prompt, request.negative, request.english, request.english_negative)
        tagged = {tag.name for text in texts for tag in take_tags(text)[1]}
        found = []
        for text in self._several("lora"):
            name, *strengths = text.split(":")
            if PurePosixPath(name).stem in tagged:  # the prompt names it
                continue
            if own := self._find("LoRA", "loras", name):
                found.append((own, strength := _number(strengths[0] if strengths else None, 1.0)))
                if len(strengths) > 1 and _number(strengths[1], strength) != strength:
                    self.notes.append(say("text_strength", self.language, name=short(own), strength=strengths[1]))
        return tuple(found)

    def embeddings(self) -> tuple[str, ...]:
        names = (text.partition("=")[0] for text in self._several("embedding"))
        return tuple(own for name in names if (own := self._find("embedding", "embeddings", name)))

    def control(self) -> PickedControl | None:
        for text in self._several("control"):
            name, *rest = text.split(",")
            settings = dict(word.split("=", 1) for word in rest if "=" in word)
            if own := self._find("ControlNet", "controls", name):
                self.notes.append(say("from_map", self.language))
                return PickedControl(own, None, settings.get("from", ""), _number(settings.get("strength"), 1.0))
        return None

    def others(self) -> None:
        """Notes of parts that the page has no field for."""
        for part in (name for name in PARTS if name not in _PICKED):
            name = self.values.get(part)
            if name is not None and name != self.started.get(part):
                self._lost(part.replace("_", " "), name)

    def _several(self, part: str) -> Sequence[str]:
        written, started = self.values.get(part) or "", self.started.get(part) or ""
        here = started.split(" + ")
        return [text for text in written.split(" + ") if text and text not in here]

    def _find(self, part: str, kind: str, name: str) -> str | None:
        for own in self.models.names(kind):
            if own == name or PurePosixPath(own).name == name:
                return own
        self._lost(part, name)
        return None

    def _lost(self, kind: str, name: str) -> None:
        self.notes.append(say("lost_part", self.language, kind=kind, name=short(name)))


def _number(text: str | None, default: float) -> float:
    try:
        return default if text is None else float(text)
    except ValueError:
        return default
