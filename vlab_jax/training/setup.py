"""What a run starts from: random parameters, or a pretrained model's and random ones beside them; its tokenizer."""

import logging
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.data import pipeline, schema
from vlab_jax.data import sources as mixtures
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.crash_guard import default_workers
from vlab_jax.data.media import MediaLimits
from vlab_jax.data.pieces import PrefetchMemory, plan_prefetch
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, copied_from_clip, example_inputs, parameter_shapes, start_from_clip
from vlab_jax.pretrained.load import Pretrained, check_model, format_origins, load_parameters, open_checkpoint
from vlab_jax.runtime import sharding
from vlab_jax.runtime.disk import writing
from vlab_jax.runtime.sharding import Neighbours


def random_parameters(model: VLAB, frames: int, seed: int, mesh: Mesh, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Random parameters, each created where it will lie; `without` names top-level parts to leave out."""

    def initialise():
        parameters = model.init(jax.random.key(seed), *example_inputs(model, frames))["params"]
        return {part: leaves for part, leaves in parameters.items() if part not in without}

    shapes = jax.eval_shape(initialise)
    return jax.jit(initialise, out_shardings=sharding.shardings(shapes, mesh))()


def pretrained_parameters(pretrained: Pretrained, model: VLAB, frames: int, seed: int, mesh: Mesh) -> dict[str, Any]:
    """A checkpoint's parameters, and random ones for what it lacks; where each came from is logged as a table.

    From a CLIP, the decoder and a separate image encoder start as copies of its towers.

    Raises:
      InputError: the checkpoint does not hold this model.
    """
    shapes = parameter_shapes(model, frames)
    loaded, origins = load_parameters(pretrained, shapes, sharding.shardings(shapes, mesh))
    table = format_origins(origins, _others(shapes, loaded))
    logging.info("%s (%s)\n%s", pretrained.name, pretrained.architecture.format, table)
    if pretrained.whole:
        return loaded
    parameters = start_from_clip({**random_parameters(model, frames, seed, mesh, without=tuple(loaded)), **loaded})
    return {part: parameters[part] for part in shapes}


def _others(shapes: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """What did not come from the checkpoint: number of parameters and origin, by part and its first submodule."""
    rows: dict[str, tuple[int, str]] = {}
    for path, leaf in flatten_dict({part: shapes[part] for part in shapes if part not in loaded}, sep="/").items():
        name = "/".join(path.split("/")[:2])
        source = copied_from_clip(name)
        size, _ = rows.get(name, (0, ""))
        rows[name] = (size + math.prod(leaf.shape), f"a copy of {source}" if source else "new")
    return rows


def validates(config: ConfigDict, options: BuildOptions) -> bool:
    """Whether the data set that is evaluated has a validation split.

    Raises:
      InputError: it has none, and needs one.
    """
    spec = config.data.evaluate
    if "validation" in registry.prepare(spec, options).info.splits:
        return True
    if config.checkpoint.select_on != "validation":
        return False
    raise InputError(
        f"data set {spec!r} has no validation split to select the checkpoint on; set config.checkpoint.select_on='last'"
    )


def open_pretrained(config: ConfigDict) -> Pretrained:
    """The checkpoint that a run starts from, compared with the config's model; what is made to fit is logged.

    Raises:
      InputError: there is none, it is damaged, or its sizes are not the model's.
    """
    pretrained = open_checkpoint(config.model.pretrained)
    for note in check_model(pretrained, configuration.plain(config.model.to_dict())):
        logging.info("%s", note)
    return pretrained


def origin(pretrained: Pretrained) -> dict[str, Any]:
    """What a run started from, to be noted in its workdir: for the model card of an export."""
    return {"name": pretrained.name, "format": pretrained.architecture.format, "licence": pretrained.licence()}


def make_tokenizer(
    config: ConfigDict, workdir: pathlib.Path, fresh: bool, pretrained: Pretrained | None, sources: Sequence[Sequence]
) -> tokenizers.Tokenizer:
    """The tokenizer of an export that the run starts from, or CLIP's, or a BPE of the texts of training `sources`.

    It is kept in the workdir, so that this suffices later.

    Raises:
      InputError: there is no such tokenizer, or it has more ids than the model.
      CannotWrite: it cannot be kept.
    """
    vocab_size, length = config.model.text.vocab_size, config.model.text.context_length
    if not fresh:
        made = tokenizers.load(workdir, length)
    elif pretrained is not None and pretrained.whole:
        made = tokenizers.load(pretrained.files.folder, length)
    elif config.tokenizer.kind == "clip":
        beside = "" if pretrained is None else str(pretrained.files.folder)
        made = tokenizers.load_clip(config.tokenizer.path or beside, length)
    else:
        asks = any(config.stage[name].objectives.question_answering for name in config.stages)
        without = tuple(config.evaluation.multiple_choice) if asks else None
        made = tokenizers.train_bpe(_texts(sources, without), vocab_size, length)
    if fresh:
        with writing(workdir):
            made.save(workdir)
    if made.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer has {made.vocab_size} ids, config.model.text.vocab_size={vocab_size}; raise the latter"
        )
    return made


def training_sets(config: ConfigDict) -> list[str]:
    """The data sets that the stages train on, each once."""
    trained = [config.stage[name].train or config.data.train for name in config.stages]
    return list(dict.fromkeys(spec for entries in trained for spec, _ in mixtures.parse_mixture(entries)))


def _texts(sources: Sequence[Sequence], without: tuple[str, ...] | None, limit: int = 100_000) -> Iterator[str]:
    """Texts of the training splits, to train a tokenizer on: captions, and questions of other types than `without`
    with their answers (None: no questions)."""
    for source in sources:
        for index in range(min(len(source), limit)):
            clip = schema.from_example(source[index])
            yield from clip.captions
            for question in clip.questions if without is not None else ():
                if question.type not in without:
                    yield from (question.question, question.answer)


# FOLDED vlab_jax/training/setup.py: What a run reads: the splits of its data sets, each opened once, and the
# batches that a stage learns from.


class RunData:
    """The data sets of a training config.

    A split is opened once: where its directory vanishes later, it must not be taken for one that is to be prepared.

    Args:
      neighbours: the processes of the run on this host, which share its cores and memory.
      free: bytes that are free in shared memory; None: no bound is known.

    Attributes:
      workers: processes that decode, at most; 0: threads.
      memory: what the batches made ahead may take, of training and of evaluation each.
      validated: whether the data set that is evaluated has a validation split.

    Raises:
      InputError: a data set, or a split of it, is missing, or there is too little memory for decoding ahead.
    """

    def __init__(self, config: ConfigDict, neighbours: Neighbours, free: int | None) -> None:
        self._config = config
        self._options = BuildOptions.from_fields(dict(config.data))
        self._sources: dict[tuple[str, str], Any] = {}
        self.workers = default_workers(config.data.workers, neighbours.cores)
        # Training's batches wait while a stage is evaluated on the way.
        self.memory = PrefetchMemory(config.data.prefetch_gigabytes, free, 2 * neighbours.host)
        self._check_memory()
        self.validated = validates(config, self._options)
        for split in ("validation", "test") if self.validated else ("test",):
            self.open(config.data.evaluate, split)  # missing, it would be missed only after training
        self.training()

    def _check_memory(self) -> None:
        """Says once, before the first stage, what the memory is too little for."""
        config = self._config
        stages = [config.stage[name] for name in config.stages]
        asked = [(stage.frames or config.frames, stage.batch_size // jax.process_count()) for stage in stages]
        asked.append((config.frames, config.evaluation.batch_size))
        plans = [
            plan_prefetch(self.memory, batch=batch, frame_bytes=self.frames(count).nbytes, workers=self.workers)
            for count, batch in asked
        ]
        for note in dict.fromkeys(plan.note for plan in plans if plan.note):
            logging.warning("%s", note)

    def open(self, spec: str, split: str) -> Any:
        """A split of a data set."""
        if (spec, split) not in self._sources:
            retry = self._config.data.retry_seconds
            self._sources[spec, split] = registry.open_split(spec, split, self._options, retry)
        return self._sources[spec, split]

    def training(self) -> list[Any]:
        """The training splits of all stages."""
        return [self.open(spec, "train") for spec in training_sets(self._config)]

    def evaluated(self, split: str) -> Any:
        """A split of the data set that is evaluated."""
        return self.open(self._config.data.evaluate, split)

    def mixture(self, name: str) -> tuple[list[Any], list[float]]:
        """The training splits that a stage learns from, and their weights."""
        mixture = self._parsed(name)
        return [self.open(spec, "train") for spec, _ in mixture], [weight for _, weight in mixture]

    def _parsed(self, name: str) -> list[tuple[str, float]]:
        return mixtures.parse_mixture(self._config.stage[name].train or self._config.data.train)

    def frames(self, count: int) -> pipeline.FrameOptions:
        """How a clip becomes so many frames."""
        size, data = self._config.model.vision.image_size, self._config.data
        return pipeline.FrameOptions(count, size, data.short, MediaLimits.from_fields(data.limits))

    def batches(self, name: str, tokenizer: Tokenizer, first: int, without: Sequence[str]) -> pipeline.Batches:
        """This process's share of a stage's batches, from number `first` on."""
        stage = self._config.stage[name]
        sources, weights = self.mixture(name)
        return pipeline.training_batches(
            sources,
            weights,
            self.frames(stage.frames or self._config.frames),
            tokenizer,
            batch_size=stage.batch_size,
            seed=self._config.seed + 1000 * self._config.stages.index(name),
            first=first,
            process=jax.process_index(),
            processes=jax.process_count(),
            workers=self.workers,
            memory=self.memory,
            questions=stage.questions_per_clip if stage.objectives.question_answering else 0,
            without=tuple(without),
            captions=any(weight for each, weight in stage.objectives.items() if each != "question_answering"),
            datasets=mixtures.dataset_names([spec for spec, _ in self._parsed(name)]),
        )
