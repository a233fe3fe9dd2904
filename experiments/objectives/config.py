"""One arm of the experiment on objectives: a tiny model on `motion`, trained with some of the objectives.

    python -m vlab_jax.main --config=experiments/objectives/config.py:contrastive --workdir=workdir_contrastive

Each arm trains on the same clips for the same number of steps, on both streams; `README.md` describes the arms.
"""

from ml_collections import ConfigDict

from experiments import recipe

BLEND_STEPS = 500
# The objectives that `adapt` and `blend` leave out.
CONTRASTIVE = ("contrastive",)
GENERATIVE = ("captioning", "masked_lm", "question_answering")
LEFT_OUT: dict[str, tuple[str, ...]] = {"both": (), "contrastive": GENERATIVE, "generative": CONTRASTIVE}
ARMS = dict.fromkeys(LEFT_OUT, 5)
ROW, FIGURES = recipe.ROW, recipe.FIGURES
COMPARED = (("both", "contrastive"), ("both", "generative"))


def get_config(arm: str = "both") -> ConfigDict:
    """The config of an arm.

    Raises:
      InputError: there is no such arm.
    """
    recipe.check_arm("objectives", arm, LEFT_OUT)
    config = recipe.tiny(BLEND_STEPS)
    for stage in (config.stage.adapt, config.stage.blend):
        for objective in LEFT_OUT[arm]:
            stage.objectives[objective] = 0.0
    return config
