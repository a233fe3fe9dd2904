"""Captioning: a pretrained model learns to describe clips, and what it writes is scored by the field's own scorers.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.main --config=configs/captioning.py:pretrained=my_vlab --workdir=workdir_captioning

starts from the export of a run (or from published CLIP weights, as `configs/pretrain.py` does), trains what writes
captions on captions alone, and evaluates BLEU, METEOR, ROUGE-L and CIDEr (times 100) on the validation and test splits.
Captions and references go to `<workdir>/texts/` in COCO's format. On other clips than the export's:

    --config=configs/captioning.py:pretrained=my_vlab,data=folder:/my/videos

and on a benchmark, `msrvtt`, `msvd`, `vatex` or `tgif`, with its official files in `manual_dir`:

    --config=configs/captioning.py:msvd,pretrained=my_vlab,manual_dir=/data/msvd

What the export's training kept frozen of CLIP, as the image stream's copy, stays so, unless `end_to_end` is said:

    --config=configs/captioning.py:pretrained=my_vlab,end_to_end

What a trained model writes is scored without any training by

    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir --config.tasks="('captioning',)"

VLAB's paper does not print how it was fine-tuned. On benchmarks, hyperparameters follow VALOR, each with its source in
`configs/benchmarks.py`; on other clips, learning rates, steps and the beams of the search are a reconstruction.
"""

from ml_collections import ConfigDict

from configs.fine_tuning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on a benchmark or `data=<data set>` (default: the export's)."""
    return fine_tuning("captioning", argument)
