"""Video question answering: a pretrained model learns to answer, and is scored by every convention of the field.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.main --config=configs/question_answering.py:pretrained=my_vlab --workdir=workdir_answers

starts from the export of a run (or from published CLIP weights), trains what answers on questions (the question is the
prefix, the loss is on the answer alone; what the export's training kept frozen of CLIP stays so, unless `end_to_end` is
said behind the weights), and evaluates, in percent, by type of question and over all:

- `QA …`: exact match of the model's own words after normalisation; of questions with options, the likeliest option;
- `QA ranked`: the likeliest of the most frequent training answers (`evaluation.closed_list` of them);
- `QA ceiling`: the share of answers that this list holds.

Every prediction is in `<workdir>/texts/…/questions.jsonl`. On other clips than the export's (their annotations need
`questions`; see the README):

    --config=configs/question_answering.py:pretrained=my_vlab,data=folder:/my/videos

and on a benchmark, `msrvtt_qa`, `msvd_qa`, `tgif_frameqa`, `tgif_action`, `tgif_transition` or `tgif_count`, with its
official files in `manual_dir`:

    --config=configs/question_answering.py:msrvtt_qa,pretrained=my_vlab,manual_dir=/data/msrvtt

VLAB's paper does not print how it was fine-tuned. On benchmarks, hyperparameters follow VALOR, each with its source in
`configs/benchmarks.py`; on other clips, learning rates and steps are a reconstruction.
"""

from ml_collections import ConfigDict

from configs.fine_tuning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on a benchmark or `data=<data set>` (default: the export's)."""
    config = fine_tuning("question_answering", argument)
    config.generation.beams = 1
    return config
