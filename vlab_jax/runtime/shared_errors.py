"""An error of one process ends all processes of a run, each with that process's line and exit status.

A collective cannot tell the others: they may already wait in the next one for the process that failed. So the error
travels through the key-value store of JAX's coordination service, which a thread of each process reads once a second:

1. The process that fails unwinds first, so that a checkpoint that is being saved is completed (by threads of all
   processes), and publishes its line and status. The first error that is published is the run's.
2. A process whose thread finds it has `GRACE` seconds to end by itself, since often all stop for the same reason and
   each has something to write. Then the thread ends it, which loses what SIGKILL would lose.
3. All wait for each other before they end, the first process longest: the coordination service lives in it, and JAX
   aborts a process that loses the service. A process that is done waits, too: another may fail at the very end.

SIGTERM is no error: JAX tells all processes, and they stop after the same step.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed  # no public API gives the client of the coordination service

from vlab_jax.errors import RunPreempted

EVERY = 1.0  # seconds between two reads
GRACE = 5.0  # seconds in which a process may end by itself
FAULT = 1  # status of a fault of the program, whose traceback is shown
_ERROR, _DONE, _END = (f"vlab_jax/{name}" for name in ("error", "done", "end"))
_LONGEST = 3600.0  # seconds that a process waits for the others to be done


class SharedErrors(contextlib.AbstractContextManager):
    """While it is entered, an error in any process ends all of them; with a single process it does nothing. `ending`
    turns an exception into its line and exit status."""

    def __init__(self, ending: Callable[[BaseException], tuple[str, int]]) -> None:
        self._ending, self._number = ending, jax.process_index()
        self._client: Any = distributed.global_state.client if jax.process_count() > 1 else None
        self._over = threading.Event()
        self._exit_lock = threading.Lock()  # the thread that is first to end the process keeps it
        self._thread = threading.Thread(target=self._watch, name="shared-errors", daemon=True)

    def __enter__(self) -> "SharedErrors":
        if self._client is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._client is None:
            return
        if error is not None and not isinstance(error, RunPreempted):
            self._fail(error)
        self._wait_for_all(_DONE, _LONGEST)  # the thread goes on reading
        self._over.set()
        self._thread.join()

    def _fail(self, error: BaseException) -> None:
        """Publishes an error, unless another process was first, and ends this process."""
        self._exit_lock.acquire()
        line, status = self._ending(error)
        if status == FAULT:
            traceback.print_exception(error)
        own = self._number, line, status
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # an error is published already
            self._client.key_value_set(_ERROR, json.dumps(own))
        self._end(*(self._published() or own))

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            if found := self._published():
                if not self._over.wait(GRACE):
                    self._exit_lock.acquire()
                    self._end(*found)
                return

    def _published(self) -> tuple[int, str, int] | None:
        """The number of the process that failed, and its line and status; None if none has failed."""
        try:
            return tuple(json.loads(self._client.key_value_try_get(_ERROR)))
        except jax.errors.JaxRuntimeError:  # no error; or the service is gone, which JAX notices by itself
            return None

    def _end(self, number: int, line: str, status: int) -> None:
        where = "" if number == self._number else f" (process {number} of {jax.process_count()}, counted from 0)"
        print(f"error: {line}{where}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._wait_for_all(_END, EVERY + 2 * GRACE)
        if self._number == 0:
            time.sleep(EVERY)
        os._exit(status)  # no exception may reach the main thread where it is

    def _wait_for_all(self, name: str, seconds: float) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process is gone
            self._client.wait_at_barrier(name, int(1000 * seconds))
