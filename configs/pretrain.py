"""Pre-training in two stages, adapt and blend; without pretrained weights, a first stage trains a CLIP.

    python -m vlab_jax.main --config=configs/pretrain.py --workdir=workdir

trains a tiny model on the rendered data set `motion`, on two cores; docs/results.md has its results. Arguments after a
colon, separated by commas, change it:

    --config=configs/pretrain.py:long              more clips and steps: an hour, for better answers
    --config=configs/pretrain.py:no_adapter        the control without adapters, all else equal
    --config=configs/pretrain.py:end_to_end        the last stage trains everything, which is how we read the abstract
                                                   of VLAB; by default, the image stream's CLIP stays frozen
    --config=configs/pretrain.py:data=folder:/my/videos
                                                   on your own clips (a directory with annotations.jsonl)
    --config=configs/pretrain.py:b16               ViT-B/16; also b32, l14, l14_336, h14, g14, bigg14, eva_g14,
                                                   eva02_b16, eva02_l14: for accelerators
    --config=configs/pretrain.py:l14,data=folder:/my/videos
    --config=configs/pretrain.py:pretrained=openai/clip-vit-base-patch16
                                                   from published CLIP weights, at their size: a model on the hub, a
                                                   directory or a .safetensors file (Hugging Face, OpenCLIP, EVA-CLIP)

Any field can also be set by a flag, as in --config.stage.blend.steps=200; `vlab_jax/config.py` describes all fields.
Frame counts, the blocks that carry an adapter, the stages and their frozen parameters, and learning rates are a
reconstruction: of VLAB's paper, only the abstract is known to us.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs.pretrained import start_from
from configs.sizes import SIZES
from vlab_jax.config import stage_config, training_config
from vlab_jax.errors import InputError


class Learning(NamedTuple):
    """Learning rates of the adapters and of the decoder, and the weight of the question-answering loss."""

    adapter: float
    decoder: float
    answers: float


# Answers have a larger weight because they are few of a text's tokens; most belong to the question. These values come
# from trials for `experiments/`: with (2e-2, 4e-3, 2) and one question for each clip, the same number of steps reached
# R@1 17.4 instead of 29.7, and 40.3 % of answers on order instead of 72.0 (one seed each). `:long` keeps the higher
# rates with which it was measured.
LEARNING, LONG_LEARNING = Learning(5e-3, 1.5e-3, 4.0), Learning(2e-2, 4e-3, 2.0)

VARIANTS = ("long", "no_adapter", "end_to_end")
# The parameter group of a separate image encoder that stays frozen.
KEPT_IMAGE_ENCODER = ("^image_encoder/", "frozen")


def get_config(argument: str = "tiny") -> ConfigDict:
    """The config of a size (default `tiny`), changed by `long` (of `tiny`), `no_adapter`, `end_to_end`,
    `data=<data set>` and `pretrained=<weights>`."""
    size, options = "", {}
    for part in filter(None, argument.split(",")):
        name, _, value = part.partition("=")
        if part in SIZES:
            size = part
        elif part in VARIANTS or (name in ("data", "pretrained") and value):
            options[name] = value
        else:
            raise InputError(
                f"configs/pretrain.py takes {', '.join((*SIZES, *VARIANTS))}, data=<data set> and "
                f"pretrained=<weights>, not {part!r}"
            )
    config = training_config()
    if size or "pretrained" not in options:
        size = size or "tiny"
        config.model.update(SIZES[size])
        config.model.adapter.width = config.model.vision.width // 2
        config.model.pretrained = options.get("pretrained", "")
    if size == "tiny":
        _tiny(config, LONG_LEARNING if "long" in options else LEARNING)
    else:
        _accelerator(config)
    # Chosen by `experiments/blending`: with a frozen image encoder, `stacked` keeps nearly all that the model learned
    # from stills, and `concat` about two thirds of it. `parallel` does as well as `stacked`.
    config.model.decoder.blending = "stacked"
    if "end_to_end" not in options:
        _keep_image_encoder(config)
    if not size:
        start_from(config, options["pretrained"])
    if "long" in options:
        if size != "tiny":
            raise InputError("configs/pretrain.py: `long` is for the tiny model; set config.stage.<name>.steps instead")
        _long(config)
    if "no_adapter" in options:
        config.model.adapter.blocks = "none"
    if "data" in options:
        config.data.train = (options["data"],)
        config.data.evaluate = options["data"]
        config.stage.clip.train = ()
    for name in config.stages:
        config.stage[name].unused = "frozen"
    return config


def _tiny(config: ConfigDict, learning: Learning) -> None:
    """Minutes on two cores.

    `experiments/adapting` supports the adapter, a convolution over 5 frames in every block, and 8 frames: attention
    over time learned less, a narrower kernel and fewer blocks or frames retrieved fewer clips, and 16 frames were no
    better. `experiments/objectives` supports contrastive and generative objectives in one model.
    """
    rates = {"learning_rate": learning.adapter, "decoder_learning_rate": learning.decoder}
    config.frames, config.image_frames = 8, 2
    config.model.adapter.heads = 4
    config.model.adapter.kernel = (5, 1, 1)  # 5 of 8 frames, so that a few minutes suffice to learn motion
    config.model.decoder.cross_attention_every = 2
    # Only the video stream knows the direction of time; the image stream's share in the embedding dilutes it.
    config.model.embedding_blend = 0.1
    config.model.unroll = 4  # on a CPU, a loop over blocks is slower than unrolled blocks
    config.stages = ("clip", "adapt", "blend")
    config.stage.clip = _clip(steps=130, batch_size=96, learning_rate=1e-3)
    config.stage.adapt = _adapt(steps=60, batch_size=48, **rates)
    # The tiny CLIP has read only the captions of stills, so in `blend` its text tower has most to learn.
    config.stage.blend = _blend(
        steps=700,
        batch_size=48,
        text_learning_rate=2e-3,
        clip_learning_rate=1e-3,
        **rates,
    )
    config.stage.blend.questions_per_clip = 4  # two fifths more time than 1: they share keys and values
    config.stage.blend.objectives.masked_lm = 0.0  # to save time; `adapt` trains it
    config.stage.blend.objectives.question_answering = learning.answers
    config.evaluation.tasks = ("retrieval", "captioning", "question_answering")
    for name in ("clip", "adapt"):  # they do not finish training captions and answers
        config.stage[name].evaluate = ("retrieval",)
    for name in config.stages:
        config.stage[name].warmup_steps = 20
        config.stage[name].b2 = 0.95
    config.checkpoint.every = 100


def _keep_image_encoder(config: ConfigDict) -> None:
    """Gives the image stream its own CLIP, which stays frozen in `blend`.

    Chosen by `experiments/blending`: if the image stream's CLIP is tuned on videos, the model forgets what it learned
    only from stills: with every seed for `concat`, with most seeds for `stacked`.
    """
    config.model.image_encoder = "separate"
    config.stage.blend.groups = (KEPT_IMAGE_ENCODER, *config.stage.blend.groups)


def _long(config: ConfigDict) -> None:
    """Trains the tiny model longer, on four times the clips, so that it generalises to other clips."""
    config.data.train = ("motion/large",)
    config.stage.clip.update({"steps": 400, "batch_size": 192})
    config.stage.blend.steps = 2200


def _accelerator(config: ConfigDict) -> None:
    """From scratch on your own clips, at a published size: bfloat16, recomputation, large batches."""
    config.dtype = "bfloat16"
    config.frames, config.image_frames = 8, 4
    config.model.remat = "dots"
    config.model.image_encoder = "separate"
    config.model.adapter.heads = config.model.vision.heads
    config.stages = ("clip", "adapt", "blend")
    config.stage.clip = _clip(steps=20_000, batch_size=1024, learning_rate=5e-4)
    config.stage.adapt = _adapt(steps=10_000, batch_size=512, learning_rate=1e-4, decoder_learning_rate=1e-4)
    config.stage.blend = _blend(
        steps=20_000,
        batch_size=512,
        learning_rate=5e-5,
        decoder_learning_rate=5e-5,
        text_learning_rate=2e-6,
        clip_learning_rate=2e-6,
    )
    config.checkpoint.every = 1000
    config.log_every = 50


def _clip(steps: int, batch_size: int, learning_rate: float) -> ConfigDict:
    """Trains CLIP on stills, so that there is something to adapt."""
    return stage_config(
        steps=steps,
        batch_size=batch_size,
        train=("motion/still",),
        frames=1,
        streams=("video",),
        groups=(("^(vision|text)/", learning_rate), ("^logit_scale$", 10 * learning_rate), (".*", "frozen")),
        objectives={"contrastive": 1.0, "captioning": 0.0, "masked_lm": 0.0},
        only_from_scratch=True,
    )


def _adapt(steps: int, batch_size: int, learning_rate: float, decoder_learning_rate: float) -> ConfigDict:
    """Trains adapters and decoder on the video stream alone; CLIP is frozen."""
    return stage_config(
        steps=steps,
        batch_size=batch_size,
        streams=("video",),
        groups=(("^video_adapter/", learning_rate), ("^decoder/", decoder_learning_rate), (".*", "frozen")),
        start_from_clip=True,
    )


def _blend(
    steps: int,
    batch_size: int,
    learning_rate: float,
    decoder_learning_rate: float,
    text_learning_rate: float,
    clip_learning_rate: float,
) -> ConfigDict:
    """Trains everything, on both streams."""
    return stage_config(
        steps=steps,
        batch_size=batch_size,
        groups=(
            ("^video_adapter/", learning_rate),
            ("^decoder/", decoder_learning_rate),
            ("^text/", text_learning_rate),
            ("^logit_scale$", 10 * clip_learning_rate),
            (".*", clip_learning_rate),
        ),
    )
