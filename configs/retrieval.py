"""Retrieval: a pretrained model is fine-tuned on a benchmark by the field's protocol, and tested on it.

    python -m vlab_jax.main --workdir=workdir_msrvtt \
        --config=configs/retrieval.py:msrvtt_1ka,pretrained=openai/clip-vit-base-patch32,manual_dir=/data/msrvtt

`pretrained` is a CLIP or the export of a run (`configs/captioning.py` says how to make one); `manual_dir` holds the
benchmark's official files and its videos. There are `msrvtt_1ka` (9k as training), `msrvtt_7k`, `msrvtt_full`, `msvd`,
`didemo`, `activitynet` and `vatex`. Where the published split has no validation, a part of training is held out for it;
`msrvtt_1ka_all`, `msrvtt_7k_all` and `activitynet_all` train on everything and test the last checkpoint.

The hyperparameters follow CLIP4Clip, each with its source in `configs/benchmarks.py`, and so does the mean over frames,
each at unit length. What an export's training kept frozen of CLIP stays so, unless `end_to_end` is said behind the
weights. The checkpoint that is best on validation data is tested. Dual softmax and QB-Norm are added as rows of their
own by

    --config.evaluation.query_normalisation="('dual_softmax', 'querybank')"

Without a benchmark it fine-tunes on one's own clips, `:pretrained=my_vlab,data=folder:/my/videos`, by steps and
learning rates that are a reconstruction.
"""

from ml_collections import ConfigDict

from configs.fine_tuning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on a benchmark or on `data=<data set>`."""
    return fine_tuning("retrieval", argument)
