"""SIGTERM as a request: the run saves its work before it ends."""

import contextlib
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vlab_jax.errors import RunPreempted


class StopSignal(contextlib.AbstractContextManager):
    """Handles SIGTERM while it is entered.

    Between `hold` and `release` (a training step, a checkpoint) the request waits until the run asks for it. At other
    times the run ends at once: everything is saved by then.
    """

    def __init__(self) -> None:
        self._received = self._held = False
        self._previous = None

    def __enter__(self) -> "StopSignal":
        # Only the main thread can; with several processes, JAX itself listens, so that all stop after the same step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def hold(self) -> None:
        """From here on, a request waits."""
        self._held = True

    def release(self) -> None:
        """From here on, a request ends the run at once; raises `RunPreempted` if one has come meanwhile."""
        self._held = False
        if self._received:
            raise RunPreempted

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; the same in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if not self._held:
            raise RunPreempted
