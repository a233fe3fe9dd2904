"""SIGTERM as a request: what is under way is saved before the run ends."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vlab_jax.errors import RunPreempted


class StopSignal:
    """Notices SIGTERM while it is entered.

    Between `hold` and `release` (a training step, a checkpoint) the request waits until it is asked for; at other times
    the run ends at once: what was trained is saved by then.
    """

    def __init__(self) -> None:
        self._asked = self._held = False
        self._before = None

    def __enter__(self) -> "StopSignal":
        # Only the main thread can; with several processes, JAX itself listens, so that all stop after the same step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def hold(self) -> None:
        """From here on the request waits."""
        self._held = True

    def release(self) -> None:
        """It waits no longer.

        Raises:
          RunPreempted: it came meanwhile.
        """
        self._held = False
        if self._asked:
            raise RunPreempted

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; in all processes alike."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._held:
            raise RunPreempted
