"""Video question answering: a pretrained model is trained to answer, and scored by all conventions of the field.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.main --config=configs/question_answering.py:pretrained=my_vlab --workdir=workdir_answers

starts from the export of a run (or from published CLIP weights) and trains on questions: the question is a prefix, and
the loss covers only the answer. Parts of CLIP that the export's training kept frozen stay frozen, unless `end_to_end`
follows the weights. It evaluates, in percent, by type of question and over all questions:

- `QA …`: exact match of the generated answer after normalisation; for questions with options, the likeliest option;
- `QA ranked`: the likeliest of the most frequent training answers (`evaluation.closed_list` of them);
- `QA ceiling`: the share of answers that this list contains.

Every prediction is in `<workdir>/texts/…/questions.jsonl`. On other clips than the export's (their annotations need
`questions`; see docs/datasets.md):

    --config=configs/question_answering.py:pretrained=my_vlab,data=folder:/my/videos

and on a benchmark, `msrvtt_qa`, `msvd_qa`, `tgif_frameqa`, `tgif_action`, `tgif_transition` or `tgif_count`, with its
official files in `manual_dir`:

    --config=configs/question_answering.py:msrvtt_qa,pretrained=my_vlab,manual_dir=/data/msrvtt

How VLAB was fine-tuned is not known to us. On benchmarks, hyperparameters follow VALOR, each with its source in
`configs/benchmarks.py`; on other clips, learning rates and steps are a reconstruction.
"""

from ml_collections import ConfigDict

from configs.fine_tuning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on a benchmark or `data=<data set>` (default: the export's)."""
    config = fine_tuning("question_answering", argument)
    config.generation.beams = 1
    return config
