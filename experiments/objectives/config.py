"""One arm of the experiment on objectives: a tiny model on `motion`, taught by some of them.

    python -m vlab_jax.main --config=experiments/objectives/config.py:contrastive --workdir=workdir_contrastive

Each arm learns from the same clips in as many steps, on both streams; `README.md` says what the arms are for.
"""

from ml_collections import ConfigDict

from experiments import recipe
from vlab_jax.errors import InputError

BLEND_STEPS = 500
# What is left out of both stages, `adapt` and `blend`.
CONTRASTIVE = ("contrastive",)
GENERATIVE = ("captioning", "masked_lm", "question_answering")
LEFT_OUT: dict[str, tuple[str, ...]] = {"both": (), "contrastive": GENERATIVE, "generative": CONTRASTIVE}
ARMS = dict.fromkeys(LEFT_OUT, 5)
ROW = "blend (test)"
FIGURES = {
    "R@1": "text_to_video/R@1",
    "twins": "twin_accuracy",
    "CIDEr": "CIDEr",
    "QA appearance": "QA appearance",
    "QA motion": "QA motion",
    "QA order": "QA order",
}
COMPARED = (("both", "contrastive"), ("both", "generative"))


def get_config(arm: str = "both") -> ConfigDict:
    """The config of an arm.

    Raises:
      InputError: there is no such arm.
    """
    if arm not in LEFT_OUT:
        raise InputError(f"experiments/objectives/config.py takes one of {', '.join(LEFT_OUT)}, not {arm!r}")
    config = recipe.tiny(BLEND_STEPS)
    for stage in (config.stage.adapt, config.stage.blend):
        for objective in LEFT_OUT[arm]:
            stage.objectives[objective] = 0.0
    return config
