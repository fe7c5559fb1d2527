"""Drawing into a folder: names, what is there already, shares of several processes, a log, contact sheets.

A run is a list of images, each of which knows its file's name and everything that it depends on. A image that
is there, whole and with the same settings inside, is not drawn again; so a run that was cut off resumes. Any number of
processes may draw into one folder, with the same prompts or others: no image that is there is ever replaced.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from bdm_jax.app import claims, preview
from bdm_jax.app.metadata import KEY, complete_settings, describe, digest, filled, text_chunks
from bdm_jax.app.tags import without_tags
from bdm_jax.errors import FileError, UserError
from bdm_jax.images.decode import read_image, read_mask
from bdm_jax.images.pictures import contact_sheet, encode_png, file_name, numbered
from bdm_jax.paths import atomic_file, leads_to, remove_leftovers
from bdm_jax.plugins.controls import Control
from bdm_jax.runtime.processes import all_agree, broadcast_from_first, is_first
from bdm_jax.sampling.batching import default_size
from bdm_jax.sampling.generate import Progress, generate, resolve
from bdm_jax.sampling.settings import ANY_SEED, Request, Sampling, with_seeds
from bdm_jax.sampling.settings import ImageSource as Source
from bdm_jax.systems.pipeline import BridgePipeline

try:
    import fcntl
except ImportError:  # not on Windows, where one process draws
    fcntl = None

LOG = "pictures.jsonl"
PREVIEW = "preview.png"
_SHEET = 100  # images on one contact sheet


@dataclass(frozen=True)
class PlannedImage:
    """One image of a run: its file's name, what to draw, and all that it depends on as it lies in the file."""

    name: str
    request: Request
    settings: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Images to be drawn with the same settings into one folder.

    sheet: what its contact sheet is called. claim: of the images' numbers, in the first process; None where their names
    come from a file of prompts.
    """

    out: Path
    settings: Sampling
    controls: Sequence[Control]
    images: list[PlannedImage]
    sheet: str
    claim: claims.Claim | None = None


def plan(
    pipeline: BridgePipeline,
    requests: Sequence[Request],
    settings: Sampling,
    out: Path,
    *,
    controls: Sequence[Control] = (),
    parts: Mapping[str, str],
    rows: Sequence[int] | None = None,
) -> Run:
    """The images of a run, named.

    Args:
      parts: the names of the model and of what was put in place of its own, for the settings inside the images.
      rows: for prompts from a file, the number of each request's row: names come from row and seed, so that the same
        file finds its images again. Without, they are numbered on after those that the folder holds or that other
        runs are drawing into it; the numbers are the run's until `draw` is done.

    Every process of a job is to call this: the first one names and tidies for all. Raises UserError for images that
    cannot be read.
    """
    if any(request.seed == ANY_SEED for request in requests):  # the same ones in all processes
        requests = with_seeds(requests, random.Random(broadcast_from_first(random.SystemRandom().randrange(2**31))))
    described = describe_all(pipeline, requests, settings, parts, controls)
    claim = claims.claim(out, len(requests)) if rows is None and is_first() else None
    first = broadcast_from_first(claim.first if claim else 0)
    numbers = rows or range(first, first + len(requests))
    images = [
        PlannedImage(file_name(number, request.prompt or request.english, request.seed), request, values)
        for number, request, values in zip(numbers, requests, described, strict=True)
    ]
    if is_first():
        _tidy(out, images)
    all_agree(True)  # the others begin when it is tidy
    return Run(out, settings, controls, images, "contact-sheet" if rows else f"{first:04d}-contact-sheet", claim)


def describe_all(
    pipeline: BridgePipeline,
    requests: Sequence[Request],
    settings: Sampling,
    parts: Mapping[str, str],
    controls: Sequence[Control] = (),
) -> list[dict[str, Any]]:
    """What each request's image depends on (see `metadata.describe`), with the sampler, guidance and size used.

    Raises UserError for images that cannot be read.
    """
    settings = resolve(pipeline, settings)
    known: dict[tuple[str, Path], tuple[str, tuple[int, ...]]] = {}
    described = []
    for request in requests:
        seen = {name: _seen(getattr(request, name), name, known) for name in ("image", "mask")}
        size = settings.size or default_size(pipeline, controls)
        if seen["image"] and settings.size is None:
            size = tuple(side // pipeline.factor * pipeline.factor for side in seen["image"][1])
        digests = {name: found[0] for name, found in seen.items() if found}
        described.append(describe(request, replace(settings, size=size), parts, digests))
    return described


def draw(
    pipeline: BridgePipeline,
    run: Run,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    preview_every: int = 0,
) -> tuple[int, Iterator[Path]]:
    """Draw what is not there yet of this process's share (every n-th image of n processes).

    Returns how many of the share are there already, and an iterator that draws and yields files as they are done.
    Each image gets a line in OUT/pictures.jsonl: file, SHA-256, settings. Whoever finds all of the run's images
    done at the end makes the contact sheets.

    Args:
      preview_every: number of steps after which the first process shows how far it is in OUT/preview.png; 0 for never.

    Raises UserError, before anything is drawn, for a file of a image's name that has other settings inside; and as
    `generate` does.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(release, run)
        share = run.images[jax.process_index() :: jax.process_count()]
        there = {image.name: sha256 for image in share if (sha256 := _done(run.out, image))}
        left = [image for image in share if image.name not in there]
        drawing: Iterator[np.ndarray] = iter(())
        if left:
            shown = {}
            if preview_every and is_first():
                shown = {"on_preview": preview.writer(pipeline.vae, run.out / PREVIEW), "preview_every": preview_every}
            requests = [without_tags(image.request, run.settings) for image in left]
            how = {"controls": run.controls, "batch_size": batch_size, "progress": progress}
            drawing = generate(pipeline, requests, run.settings, **how, **shown)
        undo.pop_all()
    return len(there), _draw(run, share, there, left, drawing)


def keep(run: Run, image: PlannedImage, pixels: np.ndarray) -> Path:
    """Write an image of a run, (H,W,3) uint8, and its line in the log; returns its file.

    What another process has finished under its name meanwhile stays. Raises FileError for what cannot be written.
    """
    data, path = encode_png(pixels, text_chunks(image.settings)), run.out / image.name
    with _locked(run.out / LOG) as log:  # over both, so that nobody finds one without the other and mends it
        try:
            _write_new(path, data)
        except FileExistsError:
            if run.claim is None:
                if _done(run.out, image) is not None:
                    return path
                with atomic_file(path) as file:  # what lay there is torn
                    file.write(data)
            else:  # by somebody who asks no one for numbers
                image = _renumbered(run, image, data)
        _append(log, run.out / LOG, _line(image, hashlib.sha256(data).hexdigest()))
    return run.out / image.name


def release(run: Run) -> None:
    """Give back the numbers of a run whose images are there, or will never be."""
    if run.claim is not None:
        run.claim.release()


def recover(out: Path) -> None:
    """Mend a folder after a process that was killed while it drew there: no half-written image is left, and every
    image of ours has its line in the log. Images that are being written now stay as they are.
    """
    if not out.is_dir():
        return
    remove_leftovers(out)
    (out / PREVIEW).unlink(missing_ok=True)
    if not (pictures := [path for path in sorted(out.glob("*.png")) if numbered(path.name)]):
        return
    path = out / LOG
    with _locked(path) as log:
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if _logged(line)[0] is not None]
        logged = {_logged(line)[0] for line in whole}
        missing = []
        for picture in (picture for picture in pictures if picture.name not in logged):
            with contextlib.suppress(UserError):  # none of ours
                if (settings := complete_settings(picture)) is not None:
                    image = PlannedImage(picture.name, Request(""), settings)
                    missing.append(_line(image, hashlib.sha256(picture.read_bytes()).hexdigest()))
        if len(whole) < len(lines):
            with atomic_file(path) as file:
                file.write(b"".join([*whole, *missing]))
        elif missing:
            _append(log, path, b"".join(missing))


def _draw(
    run: Run, share: list[PlannedImage], there: dict[str, str], left: list[PlannedImage], drawing: Iterator[np.ndarray]
) -> Iterator[Path]:
    try:
        _mend_log(run.out, share, there)
        for image, pixels in zip(left, drawing, strict=True):
            yield keep(run, image, pixels)
        yield from _sheets(run)
    finally:
        if is_first():
            (run.out / PREVIEW).unlink(missing_ok=True)
        if jax.process_count() == 1 or all((run.out / image.name).exists() for image in run.images):
            release(run)


def _renumbered(run: Run, image: PlannedImage, data: bytes) -> PlannedImage:
    """Written under the next number that is free."""
    while True:
        claim = claims.claim(run.out, 1)
        try:
            name = file_name(claim.first, image.request.prompt or image.request.english, image.request.seed)
            _write_new(run.out / name, data)
        except FileExistsError:
            continue
        finally:
            claim.release()
        found = replace(image, name=name)
        run.images[run.images.index(image)] = found
        return found


def _write_new(path: Path, data: bytes) -> None:
    with atomic_file(path, replace=False) as file:
        file.write(data)


def _seen(
    source: Source | None, name: str, known: dict[tuple[str, Path], tuple[str, tuple[int, ...]]]
) -> tuple[str, tuple[int, ...]] | None:
    """Digest and (height, width) of an image or a mask; files that many images begin from are read once."""
    if source is None or isinstance(source, np.ndarray):
        return None if source is None else (digest(source), source.shape[:2])
    if (name, source) not in known:
        pixels = read_mask(source) if name == "mask" else read_image(source)
        known[name, source] = digest(pixels), pixels.shape[:2]
    return known[name, source]


def _done(out: Path, image: PlannedImage) -> str | None:
    """The file's SHA-256 where the image is there and whole. Raises UserError where it is another's."""
    path = out / image.name
    if not path.exists() or (found := complete_settings(path)) is None:
        return None
    found, wanted = filled(found), json.loads(json.dumps(image.settings))
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            theirs, ours = (json.dumps(values.get(name), ensure_ascii=False) for values in (found, wanted))
            raise UserError(
                f"{path} is there already, drawn with {name.replace('_', ' ')} {theirs}, not {ours}: "
                "choose another folder with --out"
            )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _line(image: PlannedImage, sha256: str) -> bytes:
    values = {"file": image.name, "sha256": sha256, **image.settings}
    return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8")


def _mend_log(out: Path, share: Sequence[PlannedImage], there: Mapping[str, str]) -> None:
    """Exactly one line for every image of the share that is there, none for the others, and no torn one.

    Lines of images outside the share stay.
    """
    path = out / LOG
    if not there and not path.exists():
        return
    names = {image.name for image in share}
    with _locked(path) as log:
        late = [image for image in share if image.name not in there and (out / image.name).exists()]
        there = {**there, **{image.name: sha256 for image in late if (sha256 := _done(out, image))}}
        old = path.read_bytes()
        kept, logged = [], set()
        for line in old.splitlines(keepends=True):
            name, sha256 = _logged(line)
            if name is None or (name in names and (name in logged or there.get(name) != sha256)):
                continue
            kept.append(line)
            logged.add(name)
        unlogged = there.keys() - logged
        missing = [_line(image, there[image.name]) for image in share if image.name in unlogged]
        new = b"".join([*kept, *missing])
        if new == old:
            return
        if new.startswith(old):
            _append(log, path, new[len(old) :])
            return
        with atomic_file(path) as file:
            file.write(new)


def _logged(line: bytes) -> tuple[str | None, str | None]:
    """File and SHA-256 of a line of the log; None for one that is torn."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
        return values["file"], values["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The log, opened for appending, while no other process writes to it."""
    while True:
        try:
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
        try:
            if fcntl:
                with contextlib.suppress(OSError):  # a file system without locks: lines are appended whole
                    fcntl.flock(log, fcntl.LOCK_EX)
            if leads_to(path, log):  # a process that mended it has put another in its place
                yield log
                return
        finally:
            os.close(log)


def _append(log: int, path: Path, data: bytes) -> None:
    """In one piece, so that a reader sees whole lines; what a full disk leaves of it is mended by the next run."""
    try:
        written = os.write(log, data)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    if written < len(data):
        raise FileError(f"{path}: cannot be written (is the disk full?)")


def _sheets(run: Run) -> Iterator[Path]:
    """Contact sheets of a run that is complete, a hundred images on each, read from their files one by one."""
    images = run.images
    if len(images) < 2 or not all((run.out / image.name).exists() for image in images):
        return
    seeds = len({image.request.seed for image in images})
    groups = len(images) // seeds
    columns = seeds if 1 < seeds <= 10 and groups > 1 and groups * seeds == len(images) else None
    pages = [images[begin : begin + _SHEET] for begin in range(0, len(images), _SHEET)]
    shared = {name: value for name, value in images[0].settings.items() if _same(images, name, value)}
    for number, page in enumerate(pages, 1):
        stem = f"{run.sheet}-{number}" if len(pages) > 1 else run.sheet
        captions = [" + ".join(filter(None, (p.request.prompt, p.request.english))) for p in page]
        if seeds > 1 and columns:
            captions = [f"{caption} {p.request.seed}" for caption, p in zip(captions, page, strict=True)]
        sheet = contact_sheet((read_image(run.out / image.name) for image in page), captions, columns)
        names = [image.name for image in page]
        yield _write_sheet(run.out, stem, names, encode_png(sheet, text_chunks({"sheet": names, "settings": shared})))


def _write_sheet(out: Path, stem: str, names: Sequence[str], data: bytes) -> Path:
    """Under the first name where no sheet is that shows other images; one of some of these is replaced."""
    for number in itertools.count(1):
        path = out / (f"{stem}.png" if number == 1 else f"{stem} ({number}).png")
        try:
            _write_new(path, data)
        except FileExistsError:
            if not _shown(path) <= {*names}:
                continue
            with atomic_file(path) as file:
                file.write(data)
        return path


def _shown(path: Path) -> set[str | None]:
    """The images on a contact sheet; None among them for a file that is none of ours."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {str(name) for name in json.loads(image.text[KEY])["sheet"]}
    except Exception:  # whatever PIL finds wrong with it
        return {None}


def _same(images: Sequence[PlannedImage], name: str, value: Any) -> bool:
    return all(image.settings.get(name) == value for image in images)


def _tidy(out: Path, images: Sequence[PlannedImage]) -> None:
    """Remove what a killed run of these images has left half-written."""
    remove_leftovers(out, {image.name for image in images} | {LOG, PREVIEW})
    (out / PREVIEW).unlink(missing_ok=True)
