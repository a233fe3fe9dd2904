"""Video question answering: a pretrained model learns to answer, and is scored by every convention of the field.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.main --config=configs/question_answering.py:pretrained=my_vlab --workdir=workdir_answers

starts from the export of a run (or from published CLIP weights), trains the whole model on questions (the question is
the prefix, the loss is on the answer alone), and evaluates, in percent, by type of question and over all:

- `QA …`: exact match of the model's own words after normalisation; of questions with options, the likeliest option;
- `QA ranked`: the likeliest of the most frequent training answers (`evaluation.closed_list` of them);
- `QA ceiling`: the share of answers that this list holds.

Every prediction is in `<workdir>/texts/…/questions.jsonl`. On other clips than the export's (their annotations need
`questions`; see the README):

    --config=configs/question_answering.py:pretrained=my_vlab,data=folder:/my/videos

Learning rates and steps are a reconstruction: VLAB's paper does not print them.
"""

from ml_collections import ConfigDict

from configs.captioning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on `data=<data set>` (default: the export's own)."""
    config = fine_tuning("question_answering", argument)
    config.generation.beams = 1
    return config
