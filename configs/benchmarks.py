"""The field's benchmarks: the data set of each, and its fine-tuning hyperparameters, each with its source.

`configs/retrieval.py`, `configs/captioning.py` and `configs/question_answering.py` take a benchmark's name, and so does
`configs/evaluate.py`, with the task before it (`captioning/msvd`). How VLAB was fine-tuned is not known to us.
Retrieval follows CLIP4Clip; captioning and question answering follow VALOR, which shares authors with VLAB. Values from
neither are a reconstruction. If this package deviates from a source, the value's entry says so.

MSR-VTT's 1k-A, ActivityNet and TGIF-QA have no validation split. A part of their training split is held out for it
(`vlab_jax/datasets`), so that nothing is selected on test data. The names that end in `_all` train on all of it, as
published, and test the last checkpoint.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlab_jax.config import nearest, stage_config
from vlab_jax.errors import InputError

# The abbreviations of sources below.
SOURCES = {
    "CLIP4Clip": "arXiv 2104.08860; README.md of github.com/ArrowLuo/CLIP4Clip",
    "X-CLIP": "arXiv 2207.07285; main_xclip.py of github.com/xuguohai/X-CLIP, whose training is CLIP4Clip's",
    "VALOR": "arXiv 2304.08345; github.com/TXH-mercury/VALOR",
    "builder": "the counts of the official files, in vlab_jax/datasets",
    "reconstruction": "no published value is known to us",
}


class Sourced(NamedTuple):
    """A value and its source: a name in `SOURCES` and, after a colon, the place there or the reason."""

    value: Any
    source: str


class Benchmark(NamedTuple):
    """A data set and its fine-tuning hyperparameters; `select_on` and `select_by` belong to `config.checkpoint`."""

    data: str
    values: Mapping[str, Sourced]
    select_on: str = "validation"
    select_by: str = ""


# Keys are fields of the config (`frames` is used in evaluation) and of the stage (`training_frames` is its `frames`).
# `examples` in an epoch, `epochs`, `warmup_share` of all steps and the number of `evaluations` determine steps.
COMMON: dict[str, Sourced] = {
    "dtype": Sourced("bfloat16", "reconstruction: VALOR computes in float16"),
    "remat": Sourced("dots", "reconstruction: it saves memory, and costs time"),
    "image_frames": Sourced(4, "reconstruction: as in configs/pretrain.py"),
    "b1": Sourced(0.9, "VALOR: config/*.json; X-CLIP: BertAdam, the same"),
    "b2": Sourced(0.98, "VALOR: config/*.json; X-CLIP: BertAdam, the same"),
}

_RETRIEVAL = {
    **COMMON,
    "objective": Sourced("contrastive", "CLIP4Clip: symmetric cross entropy of the similarities of a batch"),
    "frame_pooling": Sourced("normalise_then_mean", "CLIP4Clip: modules/modeling.py, _loose_similarity"),
    "frames": Sourced(12, "CLIP4Clip: --max_frames 12"),
    "training_frames": Sourced(12, "CLIP4Clip: --max_frames 12"),
    "batch_size": Sourced(128, "CLIP4Clip: --batch_size=128"),
    "epochs": Sourced(5, "CLIP4Clip: --epochs=5"),
    "learning_rate": Sourced(1e-4, "CLIP4Clip: --lr 1e-4, of what is not CLIP's: here the video adapter"),
    "clip_learning_rate": Sourced(1e-7, "CLIP4Clip: --lr 1e-4 times --coef_lr 1e-3"),
    "warmup_share": Sourced(0.1, "X-CLIP: warmup_proportion, then a cosine"),
    "weight_decay": Sourced(0.2, "X-CLIP: prep_optimizer"),
    "clip_norm": Sourced(1.0, "X-CLIP: max_grad_norm"),
    "evaluations": Sourced(5, "CLIP4Clip: after each epoch (there on the test split)"),
}
# The context is 77 tokens; CLIP4Clip cuts texts at 32, and paragraphs at 64.
_PARAGRAPHS = {
    **_RETRIEVAL,
    "frames": Sourced(64, "CLIP4Clip: --max_frames 64 for ActivityNet and DiDeMo"),
    "training_frames": Sourced(64, "CLIP4Clip: --max_frames 64 for ActivityNet and DiDeMo"),
}

_VALOR = {
    **COMMON,
    "batch_size": Sourced(64, "VALOR: config/*.json"),
    "clip_learning_rate": Sourced(5e-7, "VALOR: train_utils.py, clip_lr"),
    "warmup_share": Sourced(0.1, "VALOR: config/*.json; then linearly down, here a cosine"),
    "weight_decay": Sourced(0.01, "VALOR: config/*.json"),
    "clip_norm": Sourced(5.0, "VALOR: config/*.json, grad_norm"),
    "evaluations": Sourced(10, "VALOR: train_utils.py, valid_freq (there on the test split)"),
}

_CAPTIONING = {
    **_VALOR,
    "objective": Sourced("captioning", "reconstruction: each next word; VALOR's caption_type is unimlm, masked words"),
    "label_smoothing": Sourced(0.0, "VALOR: train_utils.py"),
    "beams": Sourced(3, "VALOR: train_utils.py, beam_size"),
    "length_penalty": Sourced(1.0, "reconstruction: the mean log-likelihood of a beam's tokens"),
    "max_tokens": Sourced(30, "VALOR: train_utils.py, max_generation_len"),
}

_QUESTIONS = {
    **_VALOR,
    "objective": Sourced("question_answering", "VALOR: the answer is generated behind the question"),
    "label_smoothing": Sourced(0.0, "VALOR: train_utils.py"),
    "frames": Sourced(8, "VALOR: scripts/finetune_qa.sh, test_video_sample_num"),
    "training_frames": Sourced(4, "VALOR: scripts/finetune_qa.sh, train_video_sample_num"),
    "learning_rate": Sourced(2e-5, "VALOR: scripts/finetune_qa.sh"),
    "beams": Sourced(1, "VALOR: train_utils.py, beam_size_qa"),
    "length_penalty": Sourced(1.0, "reconstruction: without beams it has no effect"),
    "max_tokens": Sourced(0, "reconstruction: an answer has a quarter of the context"),
    "closed_list": Sourced(1000, "reconstruction: the usual size of a closed list"),
}

_TGIF = {
    **_QUESTIONS,
    "epochs": Sourced(10, "VALOR: config/VQA-tgif-frame.json; an epoch is one question of each clip"),
}
_OPTIONS = {
    **_TGIF,
    "epochs": Sourced(10, "reconstruction: as for FrameQA"),
    "closed_list": Sourced(0, "reconstruction: options need none"),
}


def _by_valor(examples: int, frames: int, training_frames: int, learning_rate: float) -> dict[str, Sourced]:
    """Captioning with the values of VALOR's script for a data set of `examples` clips."""
    script = "VALOR: scripts/finetune_cap.sh"
    return _with(
        _CAPTIONING,
        examples=Sourced(examples, "builder: clips"),
        epochs=Sourced(100, f"{script}, train_epoch; one caption of each clip"),
        frames=Sourced(frames, f"{script}, test_video_sample_num"),
        training_frames=Sourced(training_frames, f"{script}, train_video_sample_num"),
        learning_rate=Sourced(learning_rate, script),
    )


def _tgif_questions(number: int) -> Sourced:
    return Sourced(number, "builder: questions, before a part is held out")


def _with(values: Mapping[str, Sourced], **changes: Sourced) -> dict[str, Sourced]:
    return {**values, **changes}


_NINE = Sourced(170_060, "builder: 20 captions of 8,503 clips; CLIP4Clip: --expand_msrvtt_sentences")
_NINE_ALL = Sourced(180_000, "builder: 20 captions of 9,000 clips; CLIP4Clip: --expand_msrvtt_sentences")
_OFFICIAL = Sourced(130_260, "builder: 20 captions of 6,513 clips; CLIP4Clip: --expand_msrvtt_sentences")
_SEVEN_ALL = Sourced(140_200, "builder: 20 captions of 7,010 clips; CLIP4Clip: --expand_msrvtt_sentences")
_ACTIVITYNET = Sourced(10_009, "builder: paragraphs, before a part is held out")

BENCHMARKS: dict[str, dict[str, Benchmark]] = {
    "retrieval": {
        "msrvtt_1ka": Benchmark("msrvtt/retrieval_9k", _with(_RETRIEVAL, examples=_NINE)),
        "msrvtt_1ka_all": Benchmark("msrvtt/retrieval_9k_all", _with(_RETRIEVAL, examples=_NINE_ALL), "last"),
        "msrvtt_7k": Benchmark("msrvtt/retrieval_7k", _with(_RETRIEVAL, examples=_OFFICIAL)),
        "msrvtt_7k_all": Benchmark("msrvtt/retrieval_7k_all", _with(_RETRIEVAL, examples=_SEVEN_ALL), "last"),
        "msrvtt_full": Benchmark("msrvtt/retrieval_full", _with(_RETRIEVAL, examples=_OFFICIAL)),
        "msvd": Benchmark(
            "msvd/captions", _with(_RETRIEVAL, examples=Sourced(48_774, "builder: captions of 1,200 clips"))
        ),
        "didemo": Benchmark("didemo/paragraphs", _with(_PARAGRAPHS, examples=Sourced(8395, "builder: paragraphs"))),
        "activitynet": Benchmark("activitynet/paragraphs", _with(_PARAGRAPHS, examples=_ACTIVITYNET)),
        "activitynet_all": Benchmark("activitynet/paragraphs_all", _with(_PARAGRAPHS, examples=_ACTIVITYNET), "last"),
        "vatex": Benchmark(
            "vatex/captions",
            _with(_RETRIEVAL, examples=Sourced(259_910, "builder: captions; CLIP4Clip has no VATEX: as for MSR-VTT")),
        ),
    },
    "captioning": {
        "msrvtt": Benchmark(
            "msrvtt/captioning",
            _with(
                _by_valor(6513, frames=10, training_frames=6, learning_rate=9e-6),
                epochs=Sourced(100, "VALOR: config/caption-msrvtt.json; an epoch is one caption of each clip"),
                warmup_share=Sourced(0.05, "VALOR: scripts/finetune_cap.sh; then linearly down, here a cosine"),
            ),
        ),
        "msvd": Benchmark("msvd/captions", _by_valor(1200, frames=12, training_frames=8, learning_rate=9e-6)),
        "vatex": Benchmark("vatex/captions", _by_valor(25_991, frames=20, training_frames=8, learning_rate=2e-5)),
        "tgif": Benchmark(
            "tgif/captions",
            _with(
                _CAPTIONING,
                examples=Sourced(80_000, "builder: GIFs, with a caption each"),
                epochs=Sourced(10, "reconstruction: as for TGIF-QA"),
                frames=Sourced(8, "reconstruction: as for TGIF-QA"),
                training_frames=Sourced(4, "reconstruction: as for TGIF-QA"),
                learning_rate=Sourced(2e-5, "reconstruction: as for VATEX"),
            ),
        ),
    },
    "question_answering": {
        "msrvtt_qa": Benchmark(
            "msrvtt_qa/questions",
            _with(
                _QUESTIONS,
                examples=Sourced(6513, "builder: clips"),
                epochs=Sourced(100, "VALOR: config/VQA-msrvtt.json; an epoch is one question of each clip"),
                closed_list=Sourced(1500, "VALOR: config/VQA-msrvtt.json, answer_candidate_1500.json"),
            ),
        ),
        "msvd_qa": Benchmark(
            "msvd_qa/questions",
            _with(
                _QUESTIONS,
                examples=Sourced(1200, "builder: clips 1 to 1200"),
                epochs=Sourced(250, "VALOR: config/VQA-msvd.json; an epoch is one question of each clip"),
                learning_rate=Sourced(1e-5, "VALOR: scripts/finetune_qa.sh"),
            ),
        ),
        "tgif_frameqa": Benchmark("tgif_qa/frameqa", _with(_TGIF, examples=_tgif_questions(39_392))),
        "tgif_action": Benchmark("tgif_qa/action", _with(_OPTIONS, examples=_tgif_questions(20_475))),
        "tgif_transition": Benchmark("tgif_qa/transition", _with(_OPTIONS, examples=_tgif_questions(52_704))),
        "tgif_count": Benchmark(
            "tgif_qa/count",
            _with(
                _TGIF,
                examples=_tgif_questions(26_843),
                epochs=Sourced(10, "reconstruction: as for FrameQA"),
            ),
            select_by="QA count MSE",
        ),
    },
}


def find(task: str, name: str) -> Benchmark:
    """The benchmark with a name.

    Raises:
      InputError: the task has no benchmark of that name.
    """
    known = BENCHMARKS[task]
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"there is no benchmark {name!r} of {task}; {hint}")
    return known[name]


def follow(config: ConfigDict, task: str, benchmark: Benchmark) -> None:
    """Sets a training config to a benchmark: its data, its one stage, and its evaluation."""
    values = {key: sourced.value for key, sourced in benchmark.values.items()}
    config.data.train, config.data.evaluate = (benchmark.data,), benchmark.data
    config.dtype, config.model.remat = values["dtype"], values["remat"]
    config.model.frame_pooling = values.get("frame_pooling", config.model.frame_pooling)
    config.frames, config.image_frames = values["frames"], min(values["image_frames"], values["frames"])
    steps = round(values["epochs"] * values["examples"] / values["batch_size"])
    config.stages = (task,)
    config.stage[task] = stage_config(
        steps=steps,
        batch_size=values["batch_size"],
        frames=values["training_frames"],
        groups=groups(values["learning_rate"], values["clip_learning_rate"]),
        unused="frozen",
        warmup_steps=round(values["warmup_share"] * steps),
        weight_decay=values["weight_decay"],
        clip_norm=values["clip_norm"],
        b1=values["b1"],
        b2=values["b2"],
        objectives=alone(values["objective"]),
        label_smoothing=values.get("label_smoothing", 0.0),
        evaluate_every=-(-steps // values["evaluations"]),
    )
    config.checkpoint.every, config.checkpoint.select_on = -(-steps // values["evaluations"]), benchmark.select_on
    config.checkpoint.select_by = benchmark.select_by
    evaluate(config.evaluation, config.generation, task, benchmark)


def evaluate(fields: ConfigDict, generation: ConfigDict, task: str, benchmark: Benchmark) -> None:
    """Sets the task of a benchmark's evaluation, and how texts are generated."""
    fields.tasks = (task,)
    for group, key in ((fields, "closed_list"), (generation, "beams"), (generation, "length_penalty")):
        if key in benchmark.values:
            group[key] = benchmark.values[key].value
    if "max_tokens" in benchmark.values:
        generation.max_tokens = benchmark.values["max_tokens"].value


def alone(objective: str) -> dict[str, float]:
    """The weights of a stage's objectives: 1 for one of them, 0 for the others."""
    return {**dict.fromkeys(stage_config().objectives, 0.0), objective: 1.0}


def groups(learning_rate: float, clip_learning_rate: float) -> tuple[tuple[str, Any], ...]:
    """Parameter groups of fine-tuning: the parts that CLIP lacks, and CLIP."""
    return (("^(decoder|video_adapter)/", learning_rate), (".*", clip_learning_rate))
