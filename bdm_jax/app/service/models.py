"""What may be picked by name: the files below one folder, and nothing else."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from bdm_jax.errors import FileError, UserError, short, unknown
from bdm_jax.paths import DEMO

# Folders of each kind, as ComfyUI and as A1111's web UI call them; names of ours first.
KINDS = {
    "models": ("checkpoints", "Stable-diffusion", "diffusers"),
    "branches": ("branches",),
    "loras": ("loras", "Lora"),
    "embeddings": ("embeddings",),
    "controls": ("controlnet", "ControlNet"),
    "vaes": ("vae", "VAE"),
}
BUNDLED = "demo"
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_SYSTEM = ("model_index.json", "config.json")  # a folder with one of them is a model, not a folder of models
_MAX_DEPTH, _MAX_FILES, _SHOWN = 4, 10_000, 20


class ModelsFolder:
    """Models, branches, LoRAs, embeddings, ControlNets and autoencoders in a folder that is laid out as ComfyUI's or
    the web UI's `models`.

    A name is a file's path below its kind's folder, with `/` and its ending, as `style/ink.safetensors`. Names are
    looked up among those that there are and never made into paths; files that a link leads to outside of the folder are
    not among them. The bundled demo is there as the model `demo`, also without a folder.
    """

    def __init__(self, folder: Path | None = None):
        """Raises FileError for what is no folder."""
        if folder is not None and not folder.is_dir():
            raise FileError(f"{folder}: no such folder of models")
        self.folder = None if folder is None else folder.resolve()

    def names(self, kind: str) -> list[str]:
        """What there is of a kind (see `KINDS`), sorted; `demo` last. Raises UserError for no such kind."""
        return [*self._found(kind)]

    def path(self, kind: str, name: str) -> Path:
        """The file or folder of a name; an ending may be left out where only one has that name without it.

        Raises UserError with the names that there are.
        """
        found = self._found(kind)
        wanted = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
        if wanted in found:
            return found[wanted]
        stems = [own for own in found if stem(own) == wanted]
        if len(stems) == 1:
            return found[stems[0]]
        what = {"branches": "branch"}.get(kind, kind.removesuffix("s"))
        if len(stems) > 1:
            raise UserError(f"{what} {short(wanted)!r} is there as {' and as '.join(stems)}: name one of them")
        if not found:
            raise UserError(f"unknown {what} {short(str(name))!r}: there are none in the models folder")
        if len(found) > _SHOWN:
            raise UserError(f"unknown {what} {short(str(name))!r}: none of the {len(found)} in the models folder")
        raise unknown(what, short(str(name)), found)

    def _found(self, kind: str) -> dict[str, Path]:
        if kind not in KINDS:
            raise unknown("kind of model", str(kind), KINDS)
        found: dict[str, Path] = {}
        if self.folder is not None:
            for top in (self.folder / name for name in KINDS[kind]):
                for path in self._files(top):
                    found.setdefault(unicodedata.normalize("NFC", path.relative_to(top).as_posix()), path)
        found = dict(sorted(found.items()))
        if kind == "models" and DEMO.is_dir():
            found.setdefault(BUNDLED, DEMO)
        return found

    def _files(self, top: Path) -> Iterator[Path]:
        """Whole models below a folder: files of weights, and folders that are one model."""
        count = 0
        for place, folders, files in os.walk(top):
            place = Path(place)
            depth = len(place.relative_to(top).parts)
            inner = sorted(name for name in folders if not name.startswith("."))
            folders[:] = [] if depth >= _MAX_DEPTH else [name for name in inner if not _is_model(place / name)]
            whole = [name for name in inner if _is_model(place / name)]
            whole += sorted(name for name in files if name.lower().endswith(_SUFFIXES) and not name.startswith("."))
            for path in (place / name for name in whole):
                count += 1
                if count > _MAX_FILES:
                    return
                if self._within(path):
                    yield path

    def _within(self, path: Path) -> bool:
        """Whether it lies in the folder when all links are followed, and is there at all."""
        try:
            return path.resolve(strict=True).is_relative_to(self.folder)
        except (OSError, RuntimeError):  # a link to nothing, or in a circle
            return False


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SYSTEM)


def stem(name: str) -> str:
    """A name of `ModelsFolder` without its file's ending: `style/ink.pt` -> `style/ink`; a folder's has none."""
    return next((name[: -len(end)] for end in _SUFFIXES if name.lower().endswith(end)), name)
