"""Is in a picture what a scene says? Its attribute and its things, each judged on its own; and the pictures themselves,
for what the measures make of them (their ceiling).

| kind of scene | the attribute is right when | the things are right when |
|---|---|---|
| ground | the border shows the ground | the artwork nearest to the picture, its ground made white, is the thing's |
| small | the centroid of what is seen lies at the place | the same, of the place's part of the picture |
| count | of one, two and three of the thing, so many look most alike | the same, of every spot |
| pair | each half looks more like its own thing than like the other's | the same, of both halves |

Whole things are searched for among the artwork of all concepts, parts of a picture among that of 30 at random and
their own: a thing of 42 or 64 pixels that went through the autoencoder cannot be told from all the others.
"""

from collections.abc import Sequence

import numpy as np

from bdm_jax.data.emoji.scenes import COUNTS, HALF, PAIR, PLACES, SIZE, Scene, compose
from bdm_jax.evaluate import measures
from bdm_jax.evaluate.gallery import Gallery
from bdm_jax.evaluate.studio import Images

_OTHERS = 30  # concepts that a part of a picture is told from


def attributes(gallery: Gallery, scenes: Sequence[Scene], images: Images) -> np.ndarray:
    """(N,) bool: whether each image (H,W,3) has the attribute of its scene."""
    right = np.zeros(len(scenes), bool)
    for kind, judge in {"ground": _grounds, "small": _places, "count": _counts, "pair": _sides}.items():
        own = [i for i, scene in enumerate(scenes) if scene.kind == kind]
        if own:
            right[own] = judge(gallery, [scenes[i] for i in own], [images[i] for i in own])
    return right


def things(gallery: Gallery, scenes: Sequence[Scene], images: Images) -> np.ndarray:
    """(N,) bool: whether all things of each scene are found where they should be."""
    right = np.ones(len(scenes), bool)
    others = np.random.default_rng(0).permutation(len(gallery.rows))[:_OTHERS]
    for whole in (True, False):
        parts, wanted, owners = [], [], []
        for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
            if (scene.kind in ("plain", "ground")) == whole:
                white = measures.on_white(image)
                for record, box in zip(scene.records * (scene.count or 1), boxes(scene), strict=True):
                    parts.append(measures.part(white, *box))
                    wanted.append(gallery.row_of(record["id"]))
                    owners.append(i)
        if parts:
            found = gallery.search(wanted, parts, None if whole else others).right
            np.logical_and.at(right, owners, found)
    return right


def boxes(scene: Scene) -> list[tuple[int, int, int]]:
    """Left and top edge and side of each thing, in pixels of a scene of 128."""
    if scene.kind == "small":
        return [(PLACES[scene.place].x, PLACES[scene.place].y, HALF)]
    if scene.kind == "count":
        return [(x, y, COUNTS[scene.count].side) for x, y in COUNTS[scene.count].spots]
    return [(x, y, HALF) for x, y in PAIR] if scene.kind == "pair" else [(0, 0, SIZE)]


def _grounds(gallery: Gallery, scenes: list[Scene], images: Images) -> list[bool]:
    return [measures.ground(image) == scene.ground for scene, image in zip(scenes, images, strict=True)]


def _places(gallery: Gallery, scenes: list[Scene], images: Images) -> list[bool]:
    return [measures.place(image) == scene.place for scene, image in zip(scenes, images, strict=True)]


def _counts(gallery: Gallery, scenes: list[Scene], images: Images) -> np.ndarray:
    numbers = (1, *COUNTS)
    candidates = [
        [compose(Scene("plain", s.records) if n == 1 else Scene("count", s.records, count=n)) for n in numbers]
        for s in scenes
    ]
    closest = gallery.closest([measures.on_white(image) for image in images], candidates)
    return np.array(numbers)[closest] == [scene.count for scene in scenes]


def _sides(gallery: Gallery, scenes: list[Scene], images: Images) -> np.ndarray:
    candidates = [[gallery.artwork[gallery.row_of(record["id"])] for record in scene.records] for scene in scenes]
    right = np.ones(len(scenes), bool)
    for side, (x, y) in enumerate(PAIR):
        parts = [measures.part(measures.on_white(image), x, y, HALF) for image in images]
        right &= gallery.closest(parts, candidates) == side
    return right
