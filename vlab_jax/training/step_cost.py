"""What one step of training goes through, by which its speed and utilisation are reckoned."""

from typing import NamedTuple


class StepCost(NamedTuple):
    """What one step goes through: clips, frames of all of them, model FLOPs (`models.flops.step_flops`), and the FLOP/s
    that all devices together can do (None: not known)."""

    clips: int
    frames: int
    flops: float
    peak: float | None
