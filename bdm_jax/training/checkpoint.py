"""Checkpoints of a run, through Orbax: the whole train state, every so many steps, and the newest one back."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from bdm_jax.errors import UserError
from bdm_jax.sharding import tree_sharding
from bdm_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints in one folder; saving runs in the background."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Write the state under its step, unless it is there already."""
        step = int(state.step)
        if step != self.newest():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState, mesh: Mesh) -> TrainState:
        """The newest state, in the shapes of `like`, placed on the mesh whatever mesh wrote it.

        Raises:
            UserError: the checkpoint cannot be read, or is of another run; nothing is trained from scratch instead.
        """
        step = self.newest()
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            tree_sharding(mesh, like),
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            folder = self._manager.directory
            raise UserError(f"{folder}: the checkpoint of step {step} cannot be restored ({reason})") from error

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
