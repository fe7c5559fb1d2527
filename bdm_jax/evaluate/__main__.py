"""What can a trained bridge do? `python -m bdm_jax.evaluate`, or `--claim NAME` for one of its claims.

    native         Chinese prompts, Chinese culture too, against English names on the bare backbone
    mixing         a thing said in Chinese, its ground, place, number or style in English
    ambiguity      words whose translation means another picture
    composition    grounds, places, counts, left and right in Chinese, for pairs held out of the training
    compatibility  plug-ins trained for the backbone, beside the unchanged branch

Each lies in `bdm_jax.evaluate.claims` and says there how it is measured. Everything is drawn from several seeds: a
table gives the mean and the range over them.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bdm_jax import command_line
from bdm_jax.errors import UserError
from bdm_jax.evaluate.claims import CLAIMS
from bdm_jax.evaluate.features import Features
from bdm_jax.evaluate.studio import EvaluateArgs, Line, Outcome, Studio
from bdm_jax.formats.files import write_json
from bdm_jax.images.pictures import write_png
from bdm_jax.paths import check_output
from bdm_jax.runtime import compile_cache
from bdm_jax.systems.fetch import written


def evaluate(
    settings: EvaluateArgs,
    features: Features | None = None,
    done: Callable[[str, Outcome, dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The claims that `settings.claim` names, all where it names none.

    Args:
        settings: what to measure.
        features: images (H,W,3) uint8 -> (N, regions, channels); EfficientNet-Lite0 where None.
        done: called after every claim with its name, its outcome and the report so far.

    Returns:
        The report (plain values) and the outcomes by claim.

    Raises:
        UserError, FileError: an unknown claim; no such model, no training.json, an unknown style, or the feature
        network is missing.
    """
    names = _names(settings.claim)
    studio = Studio(settings, features)
    values = {key: written(value) for key, value in asdict(studio.settings).items()}
    report: dict[str, Any] = {"settings": values, "claims": {}}
    outcomes: dict[str, Outcome] = {}
    for name in names:
        outcome = outcomes[name] = CLAIMS[name](studio)
        figures = {line.name: _figure(line) for line in outcome.lines}
        report["claims"][name] = {"figures": figures, "details": outcome.details, "notes": outcome.notes}
        if done is not None:
            done(name, outcome, report)
    return report, outcomes


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures and write what was asked for, after every claim; 2 for bad input."""

    def command() -> None:
        settings = command_line.parse(EvaluateArgs, args, prog="python -m bdm_jax.evaluate")
        check_output("--json", settings.json)
        if settings.sheets:
            check_output("--sheets", settings.sheets / "sheet.png")
        compile_cache.enable()

        def done(name: str, outcome: Outcome, report: dict[str, Any]) -> None:
            if len(report["claims"]) == 1:
                print(f"{'claim':13} {'figure':22} {'mean':>7}  {'range':>13} {'n':>4}  what it is")
            _print(name, outcome)
            if settings.json:
                write_json(settings.json, report)
            if settings.sheets:
                for title, sheet in outcome.sheets.items():
                    write_png(settings.sheets / f"{title}.png", sheet, palette=True)

        evaluate(settings, done=done)

    return command_line.run(command)


def _names(texts: Sequence[str]) -> list[str]:
    """The claims that --claim names, each once; all of them where it is not given."""
    known = ", ".join(CLAIMS)
    names = dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip())
    if texts and not names:
        raise UserError(f"--claim {','.join(texts)!r} names no claim; there are {known}")
    for name in names:
        if name not in CLAIMS:
            raise UserError(f"unknown claim {name!r}; there are {known}")
    return list(names or CLAIMS)


def _figure(line: Line) -> dict[str, Any]:
    spread = [min(line.values), max(line.values)]
    mean = float(np.mean(line.values))
    return {"means": line.means, "mean": mean, "range": spread, "values": list(line.values), "count": line.count}


def _print(name: str, outcome: Outcome) -> None:
    for line in outcome.lines:
        least, most = line.shown(min(line.values)), line.shown(max(line.values))
        spread, mean = f"{least} - {most}" if len(set(line.values)) > 1 else "", line.shown(np.mean(line.values))
        print(f"{name:13} {line.name:22} {mean:>7}  {spread:>13} {line.count:4}  {line.means}")
    for note in outcome.notes:
        print(f"{name:13} {note}")
    sys.stdout.flush()  # the next claim takes minutes


if __name__ == "__main__":
    sys.exit(main())
