"""The metrics of a run on Weights & Biases, where a project is named; its own variables (WANDB_MODE, ...) apply."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json

_FILE = "wandb.json"


def check_wandb(project: str) -> None:
    """Raises UserError for a name that is none, and where the package is missing."""
    if not project.strip() or any(sign in project for sign in "/\\#?%:"):
        raise UserError(f"wandb={project!r}: give the name of a project, without / \\ # ? % :")
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb={project}: needs the package wandb: pip install 'bdm_jax[wandb]'")


class WandB:
    """One run there for all sessions of a run here: its id lies in the run's folder.

    Raises UserError where it cannot be begun (no key, no network; `WANDB_MODE=offline` needs neither).
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]):
        import wandb

        if not (folder / _FILE).is_file():
            write_json(folder / _FILE, {"project": project, "id": secrets.token_hex(4)})
        own, self._wandb = read_json(folder / _FILE), wandb
        settings = wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, disable_code=True)
        try:
            self._run = wandb.init(
                project=project,
                id=own["id"],
                resume="allow",
                name=folder.name,
                dir=folder,
                config=config,
                settings=settings,
            )
        except wandb.errors.Error as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"wandb={project}: {why}; WANDB_MODE=offline logs without a network") from error
        # A session that resumes may log steps again, which W&B's own counter refuses.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """What TensorBoard gets."""
        self._run.log({**scalars, "step": step})

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """An image (H,W,3) uint8."""
        self._run.log({name: self._wandb.Image(image), "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
