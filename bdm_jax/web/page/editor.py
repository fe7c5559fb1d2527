"""An image with what is painted over it, as the browser sends them: kept as bytes until they are checked and read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorData, EditorDataBlobs
from gradio.data_classes import FileData

from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import MAX_BYTES, decode_cutout, decode_image, read_bytes

_MAX_LAYERS = 20
_MAX_SENT = 1 << 28  # bytes that browsers have sent and not asked for yet, all of them together


@dataclass(frozen=True)
class Painted:
    """Encoded images, untrusted."""

    background: bytes | None
    layers: tuple[bytes, ...] = ()

    def image(self) -> np.ndarray | None:
        """(H,W,3) uint8; None where there is no image. Raises UserError for what cannot be read."""
        return None if self.background is None else decode_image(self.background, name="the image")

    def mask(self) -> np.ndarray | None:
        """(H,W) uint8, 255 where there is paint; None where there is none. Raises UserError for what cannot be read."""
        paint = [_paint(layer) for layer in self.layers]
        found = [one for one in paint if one.any()]
        if len({one.shape for one in found}) > 1:
            raise UserError("the layers of paint have several sizes: paint again")
        return np.maximum.reduce(found) if found else None


def painted_image(**options: Any) -> gr.ImageEditor:
    """Gradio's image editor; its value in Python is `Painted`, or None.

    Its methods are replaced in the object: for a subclass Gradio would write a .pyi file beside this one.
    """
    editor = gr.ImageEditor(**options)
    editor.preprocess = partial(_received, editor.blob_storage)
    editor.accept_blobs = server(partial(_accept, editor.blob_storage, editor.accept_blobs))
    return editor


def _received(storage: dict[str, EditorDataBlobs], payload: EditorData | None) -> Painted | None:
    if payload is None:
        return None
    sent = payload if payload.id is None else storage.pop(payload.id, None)
    if sent is None:
        return None
    return Painted(_content(sent.background), tuple(filter(None, map(_content, sent.layers or []))))


def _accept(storage: dict[str, EditorDataBlobs], accept: Callable[[AcceptBlobs], Any], data: AcceptBlobs) -> Any:
    """Bounded: a browser may send much and never ask for it."""
    index = str(data.data.get("index"))
    if index.isdecimal() and int(index) >= _MAX_LAYERS:
        raise gr.Error(f"more than {_MAX_LAYERS} layers")
    result = accept(data)
    while len(storage) > 1 and sum(map(_size, storage.values())) > _MAX_SENT:
        storage.pop(next(iter(storage)))
    return result


def _content(sent: FileData | bytes | None) -> bytes | None:
    return read_bytes(Path(sent.path), MAX_BYTES, "image file") if isinstance(sent, FileData) else sent


def _size(sent: EditorDataBlobs) -> int:
    return sum(len(one) for one in (sent.background, sent.composite, *sent.layers) if one)


def _paint(layer: bytes) -> np.ndarray:
    try:
        alpha = decode_cutout(layer, name="the paint")[..., 3]
    except BadRecord as error:
        if error.cause != "no transparency":
            raise
        height, width = decode_image(layer, name="the paint").shape[:2]
        return np.full((height, width), 255, np.uint8)  # painted all over
    return np.where(alpha >= 128, 255, 0).astype(np.uint8)
