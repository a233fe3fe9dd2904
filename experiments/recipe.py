"""What the experiments have in common: how their tiny models are trained (`configs/pretrain.py:long`, in a quarter of
the steps), and which figures are shown.
"""

from collections.abc import Collection

from ml_collections import ConfigDict

from configs import pretrain
from vlab_jax.errors import InputError

# The row of a run's results that is shown, and the figures of it that `motion` has, by their headings.
ROW = "blend (test)"
FIGURES = {
    "R@1": "text_to_video/R@1",
    "twins": "twin_accuracy",
    "CIDEr": "CIDEr",
    "QA appearance": "QA appearance",
    "QA motion": "QA motion",
    "QA order": "QA order",
}

# Lower rates than in `configs/pretrain.py`, and more weight for answers: questions are learned sooner like this.
ADAPTER, DECODER, ANSWERS = 5e-3, 1.5e-3, 4.0


def tiny(steps: int) -> ConfigDict:
    """A tiny model on `motion/large` that learns end to end for so many steps, from four questions a clip."""
    config = pretrain.get_config("tiny")
    config.data.train = ("motion/large",)
    for stage in (config.stage.adapt, config.stage.blend):
        rates = {"^video_adapter/": ADAPTER, "^decoder/": DECODER}
        stage.groups = tuple((pattern, rates.get(pattern, rate)) for pattern, rate in stage.groups)
    config.stage.blend.update({"steps": steps, "questions_per_clip": 4})
    config.stage.blend.objectives.question_answering = ANSWERS
    config.evaluation.closed_list = 0
    config.generation.beams = 1
    return config


def check_arm(experiment: str, arm: str, arms: Collection[str]) -> None:
    """Raises InputError if an experiment has no such arm."""
    if arm not in arms:
        raise InputError(f"experiments/{experiment}/config.py takes one of {', '.join(arms)}, not {arm!r}")
