"""Captioning: a pretrained model is trained to describe clips, and scored by the field's own scorers.

    python -m vlab_jax.export --checkpoint=workdir --out=my_vlab
    python -m vlab_jax.main --config=configs/captioning.py:pretrained=my_vlab --workdir=workdir_captioning

starts from the export of a run (or from published CLIP weights, as `configs/pretrain.py` does), trains on captions
alone, and evaluates BLEU, METEOR, ROUGE-L and CIDEr (times 100) on the validation and test splits. Captions and
references go to `<workdir>/texts/` in COCO's format. On other clips than the export's:

    --config=configs/captioning.py:pretrained=my_vlab,data=folder:/my/videos

and on a benchmark, `msrvtt`, `msvd`, `vatex` or `tgif`, with its official files in `manual_dir`:

    --config=configs/captioning.py:msvd,pretrained=my_vlab,manual_dir=/data/msvd

Parts of CLIP that the export's training kept frozen, such as the image stream's copy, stay frozen without `end_to_end`:

    --config=configs/captioning.py:pretrained=my_vlab,end_to_end

To score the captions of a trained model without further training:

    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir --config.tasks="('captioning',)"

How VLAB was fine-tuned is not known to us. On benchmarks, hyperparameters follow VALOR, each with its source in
`configs/benchmarks.py`; on other clips, learning rates, steps and beams are a reconstruction.
"""

from ml_collections import ConfigDict

from configs.fine_tuning import fine_tuning


def get_config(argument: str = "") -> ConfigDict:
    """The config of fine-tuning `pretrained=<weights>` on a benchmark or `data=<data set>` (default: the export's)."""
    return fine_tuning("captioning", argument)
