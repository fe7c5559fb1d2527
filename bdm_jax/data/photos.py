"""A plain folder of images, usual for LoRA and DreamBooth training: `dog.jpg`, with a caption in `dog.txt` if any."""

import hashlib
import posixpath
from typing import Any

from fsspec import AbstractFileSystem

from bdm_jax.data.source import make_record, parse_text
from bdm_jax.errors import BadRecord
from bdm_jax.images.decode import MAX_BYTES

_KINDS = (".png", ".jpg", ".jpeg", ".webp")


class PhotoSource:
    """One record per image directly in `root`, sorted by name; each line of its text file is a caption."""

    def __init__(self, fs: AbstractFileSystem, root: str):
        self._fs, self._root = fs, root
        names = [posixpath.basename(path) for path in fs.ls(root, detail=False)]
        self._names = sorted(name for name in names if name.lower().endswith(_KINDS) and not name.startswith("."))
        self._texts = {name for name in names if name.lower().endswith(".txt")}
        self.fingerprint = hashlib.sha256("\n".join(self._names).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._names[int(index)]
        data = self._fs.cat_file(posixpath.join(self._root, name), 0, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadRecord(name, "too large", f"larger than {MAX_BYTES >> 20} MiB")
        text = f"{posixpath.splitext(name)[0]}.txt"
        lines = parse_text(name, self._fs.cat_file(posixpath.join(self._root, text))) if text in self._texts else ""
        return make_record(name, {"image": data, "captions": [line.strip() for line in lines.splitlines()]})

    def __repr__(self) -> str:
        return f"PhotoSource({self._root}, {len(self)} records)"
