"""Native concepts: does the branch draw what a Chinese prompt says, and what no English caption was ever about?

The paper's first claim (arXiv 2309.00952, section 4) at the scale of the bundled set. Each image is searched for among
the artwork of all concepts of one style, by the cosine of EfficientNet-Lite0 features; it is right when the nearest
artwork is that of its prompt. Features are the network's last 7 x 7 map averaged over 3 x 3 regions, so that the
arrangement counts too ("where is the hand of the clock"); the JSON has the shares with features averaged over the
whole map beside them (`pooled`).
"""

import numpy as np

from bdm_jax.evaluate.gallery import SearchResult, results_sheet
from bdm_jax.evaluate.studio import Images, Line, Outcome, Studio, line, shown
from bdm_jax.evaluate.twins import twins
from bdm_jax.images.pictures import table
from bdm_jax.latents.moments import round_trip


def measure(studio: Studio) -> Outcome:
    """Lines `branch`, `branch_zh_only`, `backbone_zh_only`, `backbone`, `ceiling`, `autoencoder`, `twins`,
    `branch_or_twin`; those without a concept, as where none of Chinese culture was trained on, are left out.
    """
    gallery, chosen, chinese = studio.gallery, studio.chosen(), studio.chinese
    others = [i for i in chosen if not gallery.rows[i]["zh_only"]]
    figures = {
        "branch": (chosen, "zh", "Chinese name, by the branch"),
        "branch_zh_only": (chinese, "zh", "the same for Chinese culture, which the backbone never saw"),
        "backbone_zh_only": (chinese, "en", "the English name of these, by the bare backbone"),
        "backbone": (others, "en", "English names of the others, by the bare backbone"),
    }
    lines, drawn, details = [], {}, {}
    for name, (wanted, language, means) in figures.items():
        if not wanted:
            continue
        results = _search(studio, name, wanted, language)
        lines.append(line(name, means, [result.right for result in results]))
        drawn[name] = results
        details[name] = {"pooled": [float(r.pooled.mean()) for r in results], "wrong": _wrong(studio, results)}
    artwork = [gallery.artwork[i] for i in chosen]
    through = round_trip(studio.pipeline.vae, artwork)
    ceiling = gallery.search(chosen, through)
    lines.append(line("ceiling", "the artwork itself, through the autoencoder and back", [ceiling.right]))
    means = "PSNR of the artwork, through the autoencoder and back"
    lines.append(Line("autoencoder", means, (_psnr(artwork, through),), len(chosen), decibels=True))
    lines += _twins(studio, drawn["branch"])
    details |= {"gallery": len(gallery.rows), "same_artwork": gallery.duplicates}
    return Outcome(lines, _sheets(studio, drawn), details)


def _psnr(images: Images, others: Images) -> float:
    """The mean over the images of 10 log10(255^2 / mean squared difference)."""
    squares = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(images, others, strict=True)]
    return float(np.mean(10 * np.log10(255**2 / np.maximum(squares, 1e-9))))


def _search(studio: Studio, name: str, wanted: list[int], language: str) -> list[SearchResult]:
    key = "chinese" if language == "zh" else "english"
    requests = [studio.request(i, **{key: studio.name(i, language)}) for i in wanted]
    return [studio.gallery.search(wanted, images) for images in studio.draw(name, requests, bare=language == "en")]


def _twins(studio: Studio, results: list[SearchResult]) -> list[Line]:
    rows = studio.gallery.rows
    near = [
        np.array([twins(rows[a], rows[b]) for a, b in zip(result.wanted, result.nearest, strict=True)])
        for result in results
    ]
    wrong = [~result.right for result in results]
    both = [n & w for n, w in zip(near, wrong, strict=True)]
    lines = []
    if all(w.any() for w in wrong):
        shares = tuple(float(b.sum() / w.sum()) for b, w in zip(both, wrong, strict=True))
        means = "of the branch's wrong ones: the same artwork in another sex, direction, colour or hour"
        lines.append(Line("twins", means, shares, round(np.mean([w.sum() for w in wrong]))))
    either = [result.right | b for result, b in zip(results, both, strict=True)]
    return [*lines, line("branch_or_twin", "the branch, where such a near twin counts as right", either)]


def _wrong(studio: Studio, results: list[SearchResult]) -> list[dict[str, str]]:
    """Of each sampling the Chinese names of the concepts that were missed, and of what was drawn instead."""
    names = [row["zh"] for row in studio.gallery.rows]
    return [{names[a]: names[b] for a, b in zip(r.wanted[~r.right], r.nearest[~r.right], strict=True)} for r in results]


def _sheets(studio: Studio, drawn: dict[str, list[SearchResult]]) -> dict[str, np.ndarray]:
    """All of the first sampling; and a row of each figure."""
    first = {name: results[0] for name, results in drawn.items()}
    sheets = {"native": results_sheet(first, studio.gallery)}
    if "branch_zh_only" in first:
        columns = shown(range(len(first["branch_zh_only"].wanted)))

        def row(images: Images) -> Images:
            return [images[i] for i in columns]

        wanted = [first["branch_zh_only"].wanted[i] for i in columns]
        rows = {
            "artwork": [studio.gallery.artwork[i] for i in wanted],
            "Chinese, branch": row(first["branch_zh_only"].images),
            "English, backbone": row(first["backbone_zh_only"].images),
        }
        names = [studio.gallery.rows[i]["zh"] for i in wanted]
        sheets["native-culture"] = table(list(rows.values()), names, list(rows))
    return sheets
