"""Composition: attributes that a Chinese prompt says, for pairs of concept and attribute held out of the training.

A ground, a number (two or three), a place (small, on the left ...): pairs of the rule `held_out`. Two things, left and
right: pairs at random, of which there are so many that hardly any was trained on. What counts as right is in
`bdm_jax.evaluate.recognise`; `..._ceiling` is what the same measures make of the true pictures through the autoencoder.
"""

import numpy as np

from bdm_jax.data.emoji.scenes import COUNTS, GROUNDS, PLACES, Scene, captions, compose, held_out
from bdm_jax.evaluate import recognise
from bdm_jax.evaluate.studio import Outcome, Studio, line, shown, some
from bdm_jax.images.pictures import table
from bdm_jax.latents.moments import round_trip

_MEANS = {
    "ground": "the ground is the one that the prompt names",
    "count": "two or three, as the prompt says",
    "place": "small and where the prompt says",
    "sides": "of two things each is on its side",
}
_EXAMPLES = 3  # of each attribute on the sheet


def measure(studio: Studio) -> Outcome:
    """For each attribute lines `NAME`, `NAME_and_thing` (the thing, too, is the right one), `NAME_ceiling` and
    `NAME_things_ceiling`; an attribute that is held out with none of the concepts is left out.
    """
    lines, pictures, names = [], [], []
    for name, scenes in questions(studio).items():
        truth = [compose(scene) for scene in scenes]
        requests = [
            studio.request(studio.gallery.row_of(scene.records[0]["id"]), chinese=captions(scene)["zh"])
            for scene in scenes
        ]
        drawn = studio.draw(name, requests)
        right = [recognise.attributes(studio.gallery, scenes, images) for images in drawn]
        both = [
            own & recognise.things(studio.gallery, scenes, images) for own, images in zip(right, drawn, strict=True)
        ]
        through = round_trip(studio.pipeline.vae, truth)
        ceiling = [recognise.attributes(studio.gallery, scenes, through)]
        found = [recognise.things(studio.gallery, scenes, through)]
        lines += [
            line(name, _MEANS[name], right),
            line(f"{name}_and_thing", "and the thing is the prompt's", both),
            line(f"{name}_ceiling", "the measure on true pictures, through the autoencoder", ceiling),
            line(f"{name}_things_ceiling", "the same for the things", found),
        ]
        for i in shown(range(len(scenes)))[:_EXAMPLES]:
            pictures.append((truth[i], *(images[i] for images in drawn[:3])))
            names.append(requests[i].prompt)
    if not lines:
        return Outcome([], notes=["of the model's concepts none is held out with an attribute: nothing to ask"])
    rows = ["composed", *(f"seed {n}" for n in range(len(pictures[0]) - 1))]
    return Outcome(lines, {"composition": table([list(row) for row in zip(*pictures, strict=True)], names, rows)})


def questions(studio: Studio) -> dict[str, list[Scene]]:
    """By attribute, the scenes that are asked for."""
    rng = np.random.default_rng(studio.settings.seed)
    records = [studio.gallery.rows[i] for i in studio.known]
    several = studio.settings.count if len(records) > 1 else 0
    pairs = [rng.choice(len(records), 2, replace=False) for _ in range(several)]
    found = {
        "ground": some(
            studio, [Scene("ground", (r,), ground=g) for r in records for g in GROUNDS if held_out(r["id"], g)]
        ),
        "count": some(
            studio, [Scene("count", (r,), count=n) for r in records for n in COUNTS if held_out(r["id"], f"x{n}")]
        ),
        "place": some(studio, [Scene("small", (r,), place=p) for r in records for p in PLACES if held_out(r["id"], p)]),
        "sides": [Scene("pair", (records[a], records[b])) for a, b in pairs],
    }
    return {name: scenes for name, scenes in found.items() if scenes}
