"""Captioning: a pretrained model learns to describe clips, and what it writes is scored by the field's own scorers.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.main --config=configs/captioning.py:pretrained=my_vlab --workdir=workdir_captioning

starts from the export of a run (or from published CLIP weights, as `configs/pretrain.py` does), trains the whole model
on captions alone, and evaluates BLEU, METEOR, ROUGE-L and CIDEr (times 100) on the validation and the test split.
Captions and references go to `<workdir>/texts/` in COCO's format. On other clips than the export's:

    --config=configs/captioning.py:pretrained=my_vlab,data=folder:/my/videos

What a trained model writes is scored without any training by

    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir --config.tasks="('captioning',)"

Learning rates, steps and the beams of the search are a reconstruction: VLAB's paper does not print them.
"""

from ml_collections import ConfigDict

from configs.pretrained import start_from
from vlab_jax.config import stage_config, training_config
from vlab_jax.errors import InputError


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on `data=<data set>` (default: the export's own)."""
    return fine_tuning("captioning", argument)


def fine_tuning(task: str, argument: str) -> ConfigDict:
    """A config that trains and evaluates one generative task, `captioning` or `question_answering`.

    Raises:
      InputError: the argument lacks `pretrained=<weights>`, or says something else than that and `data=<data set>`.
    """
    options = dict(part.partition("=")[::2] for part in argument.split(",") if part)
    unknown = [name for name, value in options.items() if name not in ("pretrained", "data") or not value]
    if unknown or "pretrained" not in options:
        raise InputError(f"configs/{task}.py takes pretrained=<weights> and data=<data set>, the former always")
    config = training_config()
    start_from(config, options["pretrained"])
    if "data" in options:
        config.data.train, config.data.evaluate = (options["data"],), options["data"]
    config.stages = (task,)
    objectives = {"contrastive": 0.0, "captioning": 0.0, "masked_lm": 0.0, "question_answering": 0.0, task: 1.0}
    config.stage[task] = stage_config(
        steps=1000,
        batch_size=48,
        groups=(("^(decoder|video_adapter)/", 1e-4), ("^logit_scale$", "frozen"), (".*", 1e-5)),
        objectives=objectives,
    )
    config.evaluation.tasks = (task,)
    config.checkpoint.every = 200
    return config
