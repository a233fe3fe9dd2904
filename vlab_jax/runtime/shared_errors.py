"""An error of one process ends all processes of a run, each with that process's line and exit status.

The others cannot be told by a collective: they may be in the next one already, where they wait for the process that
failed. So the error travels through the key-value store of JAX's coordination service, where a thread of each process
looks once a second:

1. The process that fails unwinds first. A checkpoint that is being saved is completed meanwhile: the threads that save
   run in all processes, whatever their main threads wait for, and none returns before the checkpoint has its name.
   Then the process publishes its line and status. The first error that is published is the run's.
2. A process whose thread finds it has `GRACE` seconds to come to an end of its own, since often all stop for the same
   reason and each has something to write. Then the thread ends it, wherever its main thread is. What is lost is what
   SIGKILL would lose: files get their names when they are complete, and the next start removes what is left over.
3. All wait for each other before they end, the first process longest: the coordination service lives in it, and JAX
   aborts a process that loses it.

A process that is done waits for the others too, so that one that fails at the very end still ends all with its status.
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
from jax._src import distributed  # nothing public gives the client of the coordination service

from vlab_jax.errors import RunPreempted

EVERY = 1.0  # seconds between two looks
GRACE = 5.0  # seconds in which a process may end by itself
FAULT = 1  # status of a fault of the program, of which the traceback is shown
_ERROR, _DONE, _END = (f"vlab_jax/{name}" for name in ("error", "done", "end"))
_LONGEST = 3600.0  # seconds that one process may be at what the others have done


Ending = tuple[str, int]  # the line and the exit status that a process ends with


class SharedErrors:
    """While it is entered, an error in any process ends all of them; with one process it does nothing.

    Args:
      ending: the line and the status of an exception.
    """

    def __init__(self, ending: Callable[[BaseException], Ending]) -> None:
        self._ending, self._number = ending, jax.process_index()
        self._client: Any = distributed.global_state.client if jax.process_count() > 1 else None
        self._over = threading.Event()
        self._last_words = threading.Lock()  # for the main thread or the other one, whichever is first, and for good
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
        self._wait_for_all(_DONE, _LONGEST)  # the thread goes on looking
        self._over.set()
        self._thread.join()

    def _fail(self, error: BaseException) -> None:
        """Publishes an error, unless another process was first, and ends this process."""
        self._last_words.acquire()
        line, status = self._ending(error)
        if status == FAULT:
            traceback.print_exception(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one already
            self._client.key_value_set(_ERROR, json.dumps([self._number, line, status]))
        self._end(*(self._published() or (self._number, (line, status))))

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            if found := self._published():
                if not self._over.wait(GRACE):
                    self._last_words.acquire()
                    self._end(*found)
                return

    def _published(self) -> tuple[int, Ending] | None:
        """The run's error, and the number of the process that it happened in."""
        try:
            number, line, status = json.loads(self._client.key_value_try_get(_ERROR))
        except jax.errors.JaxRuntimeError:  # there is none; or the service is gone, which JAX notices by itself
            return None
        return number, (line, status)

    def _end(self, number: int, ending: Ending) -> None:
        line, status = ending
        where = "" if number == self._number else f" (process {number} of {jax.process_count()}, counted from 0)"
        print(f"error: {line}{where}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._wait_for_all(_END, EVERY + 2 * GRACE)
        if self._number == 0:
            time.sleep(EVERY)
        os._exit(status)  # the main thread may be where no exception reaches it

    def _wait_for_all(self, name: str, seconds: float) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # one is gone
            self._client.wait_at_barrier(name, int(1000 * seconds))
