"""A folder of images as LoRA and DreamBooth training has them, captions beside the images.

    dog.jpg, dog.txt or dog.caption     each line is a caption
    10_sks dog/a.jpg                    kohya's: "sks dog" is the caption of images without one; each counts ten times
    dog/a.jpg, cat/b.jpg                folders of classes: likewise, each counts once

Subfolders are read where the folder itself holds no images, or one of them is kohya's. Endings may be
written in any case.
"""

import hashlib
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from bdm_jax.data.contents import digest_files
from bdm_jax.data.source import make_record, parse_text
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import MAX_BYTES, SUFFIXES

CAPTIONS = (".txt", ".caption")
_REPEATS = re.compile(r"(\d+)_(.*)")
_MAX_REPEATS = 10_000
_MAX_CAPTION = 1 << 20  # bytes
_LOOKED_AT = 20  # folders of a folder, for one with images


@dataclass(frozen=True)
class _Photo:
    """An image's path in the set, those of its captions, and what it is called without any."""

    path: str
    captions: tuple[str, ...]
    otherwise: str


class PhotoSource:
    """One record per image, sorted by path. `repeats`: (N,) int64, how often each is wanted in an epoch.

    Raises UserError for a folder of more repeats than 10,000.
    """

    def __init__(self, fs: AbstractFileSystem, root: str):
        self._fs, self._root = fs, root
        files, folders = _listing(fs, root)
        found = [(photo, 1) for photo in _photos("", files, "")]
        inner = {name: _listing(fs, posixpath.join(root, name)) for name in folders}
        images = {name: sum(map(_is_image, files)) for name, (files, _) in inner.items()}
        filled = [name for name in folders if images[name]]
        if any((match := _REPEATS.fullmatch(name)) and int(match[1][:9]) for name in filled):
            if found:
                warnings.warn(
                    f"{root} holds kohya's folders ({_some(filled)}), and images beside them, which are not read: "
                    f"{_some([photo.path for photo, _ in found])}",
                    stacklevel=3,
                )
            found = []
        if found and filled:
            warnings.warn(
                f"{root} holds images, and so do folders in it, which are not read: {_some(filled)}", stacklevel=3
            )
        if not found:
            found = [pair for name in filled for pair in _repeated(root, name, inner[name][0])]
        self._photos = [photo for photo, _ in found]
        self.repeats = np.array([count for _, count in found], np.int64)
        names = [photo.path if count == 1 else f"{count} x {photo.path}" for photo, count in found]
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        endings = Counter(posixpath.splitext(name)[1].lower() or "no ending" for name in files)
        self.found = ", ".join(
            [*(f"{count} {ending}" for ending, count in endings.most_common(4)), f"{len(folders)} folders"]
        )
        if not found:
            self.found += _deeper(fs, root, {name: folders for name, (_, folders) in inner.items()})

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo = self._photos[int(index)]
        data = self._read(photo.path, MAX_BYTES, photo.path)
        lines = [
            line.strip()
            for text in photo.captions
            for line in parse_text(photo.path, self._read(text, _MAX_CAPTION, photo.path), self._root).splitlines()
        ]
        captions = [line for line in lines if line] or [photo.otherwise]
        return make_record(photo.path, {"image": data, "captions": captions})

    def contents(self) -> str:
        """See `Source`."""
        names = [name for photo in self._photos for name in (photo.path, *photo.captions)]
        return digest_files(self._fs, [posixpath.join(self._root, name) for name in names])

    def _read(self, name: str, limit: int, key: str) -> bytes:
        path = posixpath.join(self._root, name)
        # a local read allocates as much as it is asked for; on a bucket, asking for the size costs another request
        local = "file" in np.atleast_1d(self._fs.protocol)
        try:
            data = self._fs.cat_file(path, 0, min(self._fs.size(path) if local else limit, limit) + 1)
        except FileNotFoundError as error:
            raise BadRecord(key, "missing file", f"{name} is gone") from error
        if len(data) > limit:
            raise BadRecord(key, "too large", f"{name} is larger than {limit >> 20} MiB")
        return data

    def __repr__(self) -> str:
        return f"PhotoSource({self._root}, {len(self)} records)"


def _listing(fs: AbstractFileSystem, folder: str) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in it, sorted, without hidden ones."""
    found = {entry["name"].rstrip("/"): entry["type"] for entry in fs.ls(folder, detail=True)}
    found.pop(folder.rstrip("/"), None)  # stores keep empty files in the place of folders
    entries = sorted((posixpath.basename(path), kind) for path, kind in found.items())
    entries = [entry for entry in entries if not entry[0].startswith(".")]
    return [name for name, kind in entries if kind != "directory"], [n for n, kind in entries if kind == "directory"]


def _photos(folder: str, files: Sequence[str], otherwise: str) -> Iterator[_Photo]:
    texts: dict[str, list[str]] = {}
    for name in files:
        stem, ending = posixpath.splitext(name)
        if ending.lower() in CAPTIONS:
            for known in {stem, stem.lower()}:
                texts.setdefault(known, []).append(name)
    for name in files:
        if _is_image(name):
            stem = posixpath.splitext(name)[0]
            captions = texts.get(stem) or texts.get(stem.lower(), [])
            yield _Photo(
                posixpath.join(folder, name), tuple(posixpath.join(folder, text) for text in captions), otherwise
            )


def missing_caption(key: str) -> str:
    """What would have been the caption of an image without one, by its path in the set."""
    folder, name = posixpath.split(key)
    stem = posixpath.splitext(name)[0]
    nameless = _REPEATS.fullmatch(folder)
    why = f" (the folder's name {folder} gives none)" if nameless and not nameless[2].strip() else ""
    return f"{' or '.join(stem + ending for ending in CAPTIONS)} beside {name}{why}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _deeper(fs: AbstractFileSystem, root: str, inner: Mapping[str, Sequence[str]]) -> str:
    """Where images lie one folder further down, as in kohya's projects (img/10_dog, log, model); "" for nowhere."""
    for name, folders in inner.items():
        for folder in folders[:_LOOKED_AT]:
            if any(map(_is_image, _listing(fs, posixpath.join(root, name, folder))[0])):
                return f"; images lie in {name}/{folder}: give {posixpath.join(root, name)}"
    return ""


def _repeated(root: str, name: str, files: Sequence[str]) -> Iterator[tuple[_Photo, int]]:
    """The images of a subfolder, and how often each of them counts."""
    match = _REPEATS.fullmatch(name)
    count, otherwise = (int(match[1][:9]), match[2]) if match else (1, name)
    if count > _MAX_REPEATS:
        path = posixpath.join(root, name)
        raise UserError(f"{path}: the number before _ says how often its images count; at most {_MAX_REPEATS}")
    if not count:
        warnings.warn(f"{root}: images of {name} are not read, as in kohya's scripts: 0 times", stacklevel=4)
        return
    for photo in _photos(name, files, otherwise.strip()):
        yield photo, count


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
