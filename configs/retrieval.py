"""Retrieval: fine-tunes a pretrained model on a benchmark by the field's protocol, and tests it.

    python -m vlab_jax.main --workdir=workdir_msrvtt \
        --config=configs/retrieval.py:msrvtt_1ka,pretrained=openai/clip-vit-base-patch32,manual_dir=/data/msrvtt

`pretrained` is a CLIP or the export of a run (`configs/captioning.py` shows how to make one); `manual_dir` contains the
benchmark's official files and its videos. The benchmarks are `msrvtt_1ka` (trained on 9k), `msrvtt_7k`, `msrvtt_full`,
`msvd`, `didemo`, `activitynet` and `vatex`. If the published split has no validation part, a part of training is held
out for it; `msrvtt_1ka_all`, `msrvtt_7k_all` and `activitynet_all` train on everything and test the last checkpoint.

The hyperparameters follow CLIP4Clip, each with its source in `configs/benchmarks.py`, and so does the pooling: the mean
of frame embeddings of unit length. Parts of CLIP that an export's training kept frozen stay frozen, unless `end_to_end`
follows the weights. The checkpoint that is best on validation data is tested. This adds dual softmax and QB-Norm, as
rows of their own:

    --config.evaluation.query_normalisation="('dual_softmax', 'querybank')"

Without a benchmark, `:pretrained=my_vlab,data=folder:/my/videos` fine-tunes on your own clips; its steps and learning
rates are a reconstruction.
"""

from ml_collections import ConfigDict

from configs.fine_tuning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on a benchmark or on `data=<data set>`."""
    return fine_tuning("retrieval", argument)
