"""Ambiguity: words whose plain translation means another picture (the sources' argument against translating prompts).

`ambiguity.txt` lists concepts whose Chinese name a translator, who does not see the picture, puts into English words
that are another concept's or nobody's: 手掌 "palm", 蝴蝶结 "bow", 灰心 "discouraged". The branch reads the Chinese
name, the bare backbone its translation; beside it, for comparison, CLDR's own English name, which the backbone was
trained on (other than for Chinese culture).
"""

from pathlib import Path

import numpy as np

from bdm_jax.evaluate.studio import Images, Outcome, Studio, line, shown, some
from bdm_jax.images.pictures import table

WORDS = Path(__file__).with_name("ambiguity.txt")


def words() -> dict[str, str]:
    """Id of the concept -> translation of its Chinese name."""
    rows = (line.split("\t") for line in WORDS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#")
    return {id_: translation for id_, _, translation in rows}


def measure(studio: Studio) -> Outcome:
    """Lines `branch`, `translation`; `branch_seen`, `translation_seen` and `english_name_seen` without Chinese culture,
    which the backbone never saw.
    """
    gallery, listed = studio.gallery, words()
    wanted = some(studio, [i for i in studio.known if gallery.rows[i]["id"] in listed])
    if not wanted:
        return Outcome([], notes=[f"the model was trained on none of the words of {WORDS.name}: nothing to ask"])
    seen = [n for n, i in enumerate(wanted) if not gallery.rows[i]["zh_only"]]
    translations = [listed[gallery.rows[i]["id"]] for i in wanted]
    asked = {
        "branch": [studio.request(i, chinese=studio.name(i, "zh")) for i in wanted],
        "translation": [studio.request(i, english=text) for i, text in zip(wanted, translations, strict=True)],
        "English name": [studio.request(i, english=studio.name(i, "en")) for i in wanted],
    }
    drawn = {name: studio.draw(name, requests, bare=name != "branch") for name, requests in asked.items()}
    right = {name: [gallery.search(wanted, images).right for images in every] for name, every in drawn.items()}
    lines = [
        line("branch", "ambiguous words in Chinese, by the branch", right["branch"]),
        line("translation", "their translation, by the bare backbone", right["translation"]),
    ]
    if seen:
        known = {name: [one[seen] for one in every] for name, every in right.items()}
        lines += [
            line("branch_seen", "by the branch, without Chinese culture", known["branch"]),
            line("translation_seen", "their translation, without Chinese culture", known["translation"]),
            line("english_name_seen", "the same by the names of the training", known["English name"]),
        ]
    columns = shown(range(len(wanted)))

    def row(images: Images) -> Images:
        return [images[n] for n in columns]

    rows = {"artwork": row([gallery.artwork[i] for i in wanted]), "Chinese": row(drawn["branch"][0])}
    rows["translation"] = row(drawn["translation"][0])
    names = [f"{gallery.rows[wanted[n]]['zh']} {translations[n]}" for n in columns]
    shares = {name: np.mean(every, axis=0) for name, every in right.items()}
    details = {
        gallery.rows[i]["zh"]: {
            "translation": translations[n],
            "english_name": gallery.rows[i]["en"],
            "right": {name: float(share[n]) for name, share in shares.items()},
        }
        for n, i in enumerate(wanted)
    }
    return Outcome(lines, {"ambiguity": table(list(rows.values()), names, list(rows))}, {"words": details})
