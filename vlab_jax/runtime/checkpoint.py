"""Checkpoints: a train state, the progress of the run, and its config, saved together by Orbax.

A checkpoint is a directory `<workdir>/checkpoints/<step>`. It is written under another name, and gets its own in one
move when it is complete, so a kill or a full disk leaves none that is half-written.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers, multihost

from vlab_jax.errors import CannotRead, CannotWrite, InputError
from vlab_jax.runtime.disk import cannot_write, number_of, writing

STATE, PROGRESS, CONFIG = "state", "progress", "config"
# What Orbax says of a checkpoint that is whole, but of another structure or of other shapes.
_UNLIKE = ("do not match", "not compatible")
SELECTION = "selection.json"  # in the workdir; its `selected` is the step of the checkpoint that was tested


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read; `path` is its directory."""

    def __init__(self, path: pathlib.Path, reason: object) -> None:
        said = str(reason).strip().splitlines() or [type(reason).__name__]
        super().__init__(f"{path} cannot be read: {said[0][:200]}")
        self.path = path

    def set_aside(self) -> pathlib.Path:
        """Moves the checkpoint to `damaged/` in the workdir, so that the one before it is the newest; where it is."""
        folder = self.path.parent.parent / "damaged"
        folder.mkdir(exist_ok=True)
        return self.path.rename(folder / f"{self.path.name}-{time.time_ns()}")


class Checkpoints:
    """The checkpoints of one run. Saving goes on in the background; `close` waits for it.

    A save that failed is raised as `CannotWrite` by whichever of `save`, `check`, `wait` and `close` comes first.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 3):
        self.directory = pathlib.Path(directory).absolute()
        self._kept = _Kept(keep)
        self._failure: BaseException | None = None  # of a save
        with writing(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept,
                    create=True,
                    async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_for_others),
                ),
                item_names=(STATE, PROGRESS, CONFIG),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CannotWrite:
            # Of what the run ends with, a save that failed is said first, but once.
            if kind is None or not issubclass(kind, CannotWrite):
                raise

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def name_others(self) -> None:
        """Says in the log what lies beside the checkpoints and is passed over: what a kill left half-written, and
        whatever else is none."""
        complete = {str(step) for step in self._manager.all_steps()}
        others = sorted(set(os.listdir(self.directory)) - complete)
        if others:
            logging.warning("no complete checkpoints, and passed over, in %s: %s", self.directory, ", ".join(others))

    def keep_also(self, step: int | None) -> None:
        """Keeps the checkpoint of a step beside the newest ones, in place of the one that was kept so before."""
        self._kept.step = step

    def save(self, step: int, state: Any, progress: dict[str, Any], config: dict[str, Any]) -> None:
        """Saves a tree of arrays with two JSON trees; a step that is there already is left as it is."""
        if step in self._manager.all_steps():
            return
        items = {
            STATE: ocp.args.StandardSave(state),
            PROGRESS: ocp.args.JsonSave(progress),
            CONFIG: ocp.args.JsonSave(config),
        }
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Orbax raises what failed in the background as it is: errors of the disk as words in a ValueError."""
        try:
            yield
        except Exception as error:
            self._failure = error
            if number_of(error) is None:
                raise
            raise cannot_write(self.directory, error) from error

    def check(self) -> None:
        """Raises `CannotWrite` where a save has failed meanwhile; waits for nothing."""
        with self._saving():
            self._manager.check_for_errors()
            if self._failure is not None:
                raise self._failure

    def _wait_for_others(self, *, key: str, timeout_ms: int) -> None:
        """Where the threads that save in several processes wait for each other.

        Orbax's thread comes here, to say that it is done, even while the error of a save that failed in this process is
        on its way up. The others wait at another place by then: the thread would stay here, and nobody would learn of
        the error.
        """
        if jax.process_count() > 1 and threading.current_thread() is not threading.main_thread():
            self._failure = self._failure or sys.exc_info()[1]
            if self._failure is not None:
                raise self._failure
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """The progress or the config of a checkpoint.

        Raises:
          DamagedCheckpoint: it is damaged.
          CannotRead: the disk fails.
        """
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))
            return restored[item]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(self.directory / str(step), error) from error

    def restore(self, step: int, like: Any, shardings: Any) -> Any:
        """The saved tree, placed by `shardings`; `like` gives its structure, shapes and dtypes.

        Raises:
          InputError: the checkpoint's structure or shapes are not those of `like`.
          DamagedCheckpoint: it is damaged.
          CannotRead: the disk fails.
        """
        return self._restore(step, ocp.args.StandardRestore(_placed(like, shardings)))

    def restore_parameters(self, step: int, like: Any, shardings: Any, averaged: bool) -> Any:
        """The parameters alone (of those with a moving average, that, where the run kept one), without optimiser state.

        Raises:
          InputError: there is no such checkpoint, or it is of another model.
          DamagedCheckpoint: it is damaged.
          CannotRead: the disk fails.
        """
        if step not in self._manager.all_steps():
            raise InputError(f"{self.directory / str(step)} is missing; without it the run cannot be evaluated")
        kept = set(self._saved_paths(step, "average")) if averaged else set()
        placed = flatten_dict(_placed(like, shardings))
        target = {
            "average": unflatten_dict({path: leaf for path, leaf in placed.items() if path in kept}),
            "parameters": unflatten_dict({path: leaf for path, leaf in placed.items() if path not in kept}),
        }
        target = {key: part for key, part in target.items() if part}
        partial = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        found = self._restore(step, partial)
        leaves = {path: leaf for part in found.values() for path, leaf in flatten_dict(part).items()}
        return unflatten_dict({path: leaves[path] for path in placed})

    def _saved_paths(self, step: int, part: str) -> list[tuple[str, ...]]:
        """The paths of the arrays that a part of a saved state holds."""
        try:
            with ocp.StandardCheckpointer() as reader:
                tree = reader.metadata(self.directory / str(step) / STATE).item_metadata.tree
            return [path for path, leaf in flatten_dict(tree[part]).items() if leaf is not None]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(self.directory / str(step), error) from error

    def _restore(self, step: int, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=how))[STATE]
        except Exception as error:  # tensorstore raises plain ones
            where = self.directory / str(step)
            if any(said in str(error) for said in _UNLIKE):
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"{where} does not fit this model: {reason}") from error
            raise _unreadable(where, error) from error

    def wait(self) -> None:
        """Until what is being saved is saved."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved, and lets go of the directory.

        Where saving failed, several processes are about to end, and nothing can be waited for.
        """
        if self._failure is not None and jax.process_count() > 1:
            return
        try:
            self.wait()
        finally:
            self._manager.close()


class _Kept(checkpoint_managers.PreservationPolicy):
    """Which checkpoints are not deleted: the newest, and the one of `step`."""

    def __init__(self, newest: int) -> None:
        self.newest, self.step = newest, None

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """One answer for each of the checkpoints, which are in the order of their steps."""
        first = len(checkpoints) - self.newest
        return [place >= first or each.step == self.step for place, each in enumerate(checkpoints)]


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The workdir and the step of a path: a workdir or its `checkpoints/<step>`.

    Of a workdir it is the checkpoint that the run was tested with, or the newest while it is not finished.

    Raises:
      InputError: there is no checkpoint.
    """
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        return path.parent.parent, int(path.name)
    if not (path / "checkpoints").is_dir():
        raise InputError(f"no checkpoint at {path}; name a run's workdir or its checkpoints/<step>")
    selection = path / SELECTION
    step = json.loads(selection.read_text())["selected"] if selection.is_file() else None
    if step is not None and (path / "checkpoints" / str(step)).is_dir():
        return path, step
    with Checkpoints(path / "checkpoints") as checkpoints:
        step = checkpoints.latest()
    if step is None:
        raise InputError(f"{path / 'checkpoints'} holds no complete checkpoint")
    return path, step


def _unreadable(path: pathlib.Path, error: Exception) -> DamagedCheckpoint | CannotRead:
    """What to raise of a checkpoint: what a failing disk does not give now is not damaged."""
    number = number_of(error)
    if number is None:
        return DamagedCheckpoint(path, error)
    return CannotRead(
        f"{path} cannot be read: {os.strerror(number)}; see to the disk, and the same command goes on, or move the "
        "checkpoint away, and it goes on from the one before"
    )


def _placed(like: Any, shardings: Any) -> Any:
    """Shapes, dtypes and placements for what is to be restored."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
    )
