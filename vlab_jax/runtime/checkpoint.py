"""Checkpoints: a train state, the progress of the run, and its config, saved together by Orbax.

A checkpoint is a directory `<workdir>/checkpoints/<step>`; it appears when it is complete, so what is there can be
restored.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from vlab_jax.errors import InputError

STATE, PROGRESS, CONFIG = "state", "progress", "config"


class Checkpoints:
    """The checkpoints of one run. Saving goes on in the background; `close` waits for it."""

    def __init__(self, directory: pathlib.Path, keep: int = 3):
        self.directory = pathlib.Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=(STATE, PROGRESS, CONFIG),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], config: dict[str, Any]) -> None:
        """Saves a tree of arrays with two JSON trees; a step that is there already is left as it is."""
        if step in self._manager.all_steps():
            return
        items = {
            STATE: ocp.args.StandardSave(state),
            PROGRESS: ocp.args.JsonSave(progress),
            CONFIG: ocp.args.JsonSave(config),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """The progress or the config of a checkpoint."""
        restored = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))
        return restored[item]

    def restore(self, step: int, like: Any, shardings: Any) -> Any:
        """The saved tree, placed by `shardings`; `like` gives its structure, shapes and dtypes.

        Raises:
          InputError: the checkpoint's structure or shapes are not those of `like`.
        """
        target = _placed(like, shardings)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self.directory / str(step)} does not fit this model: {reason}") from error
        return restored[STATE]

    def restore_parameters(self, step: int, like: Any, shardings: Any, averaged: bool) -> Any:
        """The parameters alone (their moving average where the run kept one), without optimiser state."""
        key = "average" if averaged else "parameters"
        target = {key: _placed(like, shardings)}
        partial = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=partial))[STATE][key]

    def wait(self) -> None:
        """Until what is being saved is saved."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved, and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The workdir and the step of a path: a workdir (its newest checkpoint) or its `checkpoints/<step>`.

    Raises:
      InputError: there is no checkpoint.
    """
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        return path.parent.parent, int(path.name)
    if not (path / "checkpoints").is_dir():
        raise InputError(f"no checkpoint at {path}; name a run's workdir or its checkpoints/<step>")
    with Checkpoints(path / "checkpoints") as checkpoints:
        step = checkpoints.latest()
    if step is None:
        raise InputError(f"{path / 'checkpoints'} holds no complete checkpoint")
    return path, step


def _placed(like: Any, shardings: Any) -> Any:
    """Shapes, dtypes and placements for what is to be restored."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
    )
