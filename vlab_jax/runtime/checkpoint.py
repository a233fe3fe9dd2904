"""Checkpoints: a train state, the progress of the run, and its config, saved together by Orbax.

A checkpoint is a directory `<workdir>/checkpoints/<step>`. It is written under another name and renamed when it is
complete, so a kill or a full disk leaves none that is half written.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers, multihost

from vlab_jax.errors import CannotRead, CannotWrite, InputError
from vlab_jax.runtime.disk import cannot_write, errno_of, writing
from vlab_jax.runtime.sharding import with_shardings

STATE, PROGRESS, CONFIG = "state", "progress", "config"
# Words of Orbax's message about a checkpoint that is whole, but has another structure or other shapes.
_MISMATCH = ("do not match", "not compatible")
SELECTION = "selection.json"  # in the workdir; its `selected` is the step of the checkpoint that was tested


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read; `path` is its directory."""

    def __init__(self, path: pathlib.Path, reason: Exception) -> None:
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        super().__init__(f"{path} cannot be read: {lines[0][:200]}")
        self.path = path

    def set_aside(self) -> pathlib.Path:
        """Moves the checkpoint to `damaged/` in the workdir, so that the one before is the newest; its new path."""
        folder = self.path.parent.parent / "damaged"
        folder.mkdir(exist_ok=True)
        return self.path.rename(folder / f"{self.path.name}-{time.time_ns()}")


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run. Saving goes on in the background; `close` waits for it.

    A failed save is raised as `CannotWrite` by whichever of `save`, `check`, `wait` and `close` is called first.
    Methods that read raise `DamagedCheckpoint`, or `CannotRead` where the disk fails.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 3):
        self.directory = pathlib.Path(directory).absolute()
        self._kept = [checkpoint_managers.LatestN(keep)]  # policies
        self._failure: BaseException | None = None  # of a save
        with writing(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(self._kept),
                    create=True,
                    async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
                ),
                item_names=(STATE, PROGRESS, CONFIG),
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CannotWrite:
            # A failed save takes precedence over the run's own error, but is raised once.
            if kind is None or not issubclass(kind, CannotWrite):
                raise

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def warn_of_incomplete(self) -> None:
        """Logs the names in the directory that are no complete checkpoints, such as what a kill left half written."""
        complete = {str(step) for step in self._manager.all_steps()}
        others = sorted(set(os.listdir(self.directory)) - complete)
        if others:
            logging.warning("ignoring, in %s, what is no complete checkpoint: %s", self.directory, ", ".join(others))

    def keep_best(self, step: int | None) -> None:
        """Keeps the checkpoint of this step beside the newest ones, no longer that of an earlier call."""
        self._kept[1:] = [] if step is None else [checkpoint_managers.CustomSteps([step])]

    def save(self, step: int, state: Any, progress: dict[str, Any], config: dict[str, Any]) -> None:
        """Saves a tree of arrays with two JSON trees, unless the step is saved already."""
        if step in self._manager.all_steps():
            return
        json_items = {PROGRESS: ocp.args.JsonSave(progress), CONFIG: ocp.args.JsonSave(config)}
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), **json_items))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Keeps a failure. Orbax raises errors of its background threads, those of the disk as the text of others."""
        try:
            yield
        except Exception as error:
            self._failure = error
            if errno_of(error) is None:
                raise
            raise cannot_write(self.directory, error) from error

    def check(self) -> None:
        """Raises `CannotWrite` if a save has failed meanwhile, without waiting."""
        with self._saving():
            self._manager.check_for_errors()
            if self._failure is not None:
                raise self._failure

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """The barrier at which the saving threads of several processes wait for each other.

        When a save fails in this process, Orbax's thread still comes here while the error propagates. The others wait
        at another barrier by then: without the check, the thread would stay here, and the error would be lost.
        """
        if jax.process_count() > 1 and threading.current_thread() is not threading.main_thread():
            self._failure = self._failure or sys.exc_info()[1]
            if self._failure is not None:
                raise self._failure
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """The progress or the config of a checkpoint."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(self.directory / str(step), error) from error

    def restore(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The saved tree, of this structure, shapes and dtypes (else it raises `InputError`), placed by `shardings`."""
        return self._restore(step, ocp.args.StandardRestore(with_shardings(shapes, shardings)))

    def restore_parameters(self, step: int, shapes: Any, shardings: Any, averaged: bool) -> Any:
        """The parameters without the optimiser's state; with `averaged`, the moving average of those that have one.
        Raises `InputError` if there is no such checkpoint, or it is of another model."""
        if step not in self._manager.all_steps():
            raise InputError(f"{self.directory / str(step)} is missing; without it the run cannot be evaluated")
        averages = self._averages(step) if averaged else set()
        placed = flatten_dict(with_shardings(shapes, shardings))
        part_of = {path: "average" if path in averages else "parameters" for path in placed}
        target = unflatten_dict({(part_of[path], *path): leaf for path, leaf in placed.items()})
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        partial = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        leaves = flatten_dict(self._restore(step, partial))
        return unflatten_dict({path: leaves[part_of[path], *path] for path in placed})

    def _averages(self, step: int) -> set[tuple[str, ...]]:
        """The paths of the parameters of which a moving average is saved."""
        try:
            with ocp.StandardCheckpointer() as reader:
                tree = reader.metadata(self.directory / str(step) / STATE).item_metadata.tree
            return {path for path, leaf in flatten_dict(tree["average"]).items() if leaf is not None}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(self.directory / str(step), error) from error

    def _restore(self, step: int, item: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=item))[STATE]
        except Exception as error:  # tensorstore raises errors of many types
            path = self.directory / str(step)
            if any(words in str(error) for words in _MISMATCH):
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"{path} does not fit this model: {reason}") from error
            raise _unreadable(path, error) from error

    def wait(self) -> None:
        """Waits until all saves are complete."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all saves are complete, and closes Orbax's manager."""
        if self._failure is not None and jax.process_count() > 1:  # all processes are about to end
            return
        try:
            self.wait()
        finally:
            self._manager.close()


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The workdir and the step of a path: `checkpoints/<step>` in a workdir; or a workdir, for the checkpoint that the
    run was tested with, or the newest one of an unfinished run. Raises `InputError` if there is none."""
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
    """The error to raise; a checkpoint that a failing disk does not return is not damaged."""
    if (number := errno_of(error)) is None:
        return DamagedCheckpoint(path, error)
    return CannotRead(
        f"{path} cannot be read: {os.strerror(number)}; check the disk, and the same command goes on, or move the "
        "checkpoint away, and it goes on from the one before"
    )
