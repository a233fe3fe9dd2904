"""A trace of some training steps, to see where their time goes."""

import logging
import pathlib

import jax


class StepTrace:
    """Records a few steps once the first ones, which compile, are over.

    Args:
      folder: where the trace goes, for TensorBoard's profiler or Perfetto; None: none is made.
      first: the step (of those seen, from 1) before which it begins.
      steps: how many steps it holds.
    """

    def __init__(self, folder: pathlib.Path | None, first: int = 6, steps: int = 5) -> None:
        self._folder, self._first, self._last, self._seen = folder, first, first + steps, 0
        self._running = False

    def next_step(self) -> None:
        """To be called before each step."""
        self._seen += 1
        if self._folder is None:
            return
        if self._seen == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._seen == self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one was begun; a second call does nothing."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("a trace of the steps is in %s", self._folder)

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
