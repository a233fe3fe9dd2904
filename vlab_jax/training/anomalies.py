"""Steps that go wrong: gradients that are not finite, and losses that jump."""

import collections
import logging
import math
import statistics
from collections.abc import Callable, Sequence

from vlab_jax.errors import RunStopped

_NAMED = 8  # clips that a message names


class Anomalies:
    """Watches the steps of a stage, in order.

    A step whose gradients are not finite changed nothing (`step.make_train_step`): it is logged with the ids of its
    clips. So many in a row end the run. A loss that is far above those before it is logged with its clips, too.

    Args:
      stage: its name.
      most_skipped: steps in a row that may be skipped; one more stops.
      stopped: called with the step that the run stops at, so that what led there is kept; says what was.
      window: losses that a loss is compared with.
    """

    def __init__(self, stage: str, most_skipped: int, stopped: Callable[[int], str], window: int = 50) -> None:
        self._stage, self._most, self._stopped = stage, most_skipped, stopped
        self._skipped = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=window)

    def watch(self, step: int, loss: float, finite: bool, ids: Sequence[str]) -> None:
        """Takes a step of the stage.

        Raises:
          RunStopped: too many steps in a row were skipped.
        """
        where = f"step {step} of stage {self._stage!r}"
        if finite and math.isfinite(loss):
            if self._is_spike(loss):
                usual = statistics.median(self._losses)
                logging.warning("the loss is %.4g at %s, usually %.4g; its clips: %s", loss, where, usual, named(ids))
            self._losses.append(loss)
            self._skipped = 0
            return
        self._skipped += 1
        logging.warning("skipped %s: loss %s, gradients not finite; its clips: %s", where, loss, named(ids))
        if self._skipped > self._most:
            raise RunStopped(
                f"gradients are not finite in {self._skipped} steps in a row, the last of them {where}; "
                f"{self._stopped(step)}; lower the learning rate or clip_norm, or look at the clips"
            )

    def _is_spike(self, loss: float) -> bool:
        """Further above the median than eight times the usual distance from it, and by a fifth at least."""
        if len(self._losses) < 20:
            return False
        median = statistics.median(self._losses)
        spread = statistics.median(abs(each - median) for each in self._losses)
        return loss - median > max(8 * spread, 0.2 * abs(median))


def named(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(map(str, ids[:_NAMED])) + more
