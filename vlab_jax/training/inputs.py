"""What a run reads: its data sets, its tokenizer, and the parameters that it starts from."""

import collections
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vlab_jax.data import pipeline, schema
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.batches import PrefetchMemory, plan_prefetch
from vlab_jax.data.crash_guard import default_workers
from vlab_jax.data.media import MediaLimits
from vlab_jax.data.sources import dataset_names
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, copied_from_clip, example_inputs, parameter_shapes, start_from_clip
from vlab_jax.pretrained.load import Pretrained, check_model, format_origins, load_parameters, open_checkpoint
from vlab_jax.runtime import sharding
from vlab_jax.runtime.sharding import Neighbours
from vlab_jax.training.stage import StageSettings

_TOKENIZER_CLIPS = 100_000  # of each data set, whose texts a tokenizer is trained on


def random_parameters(model: VLAB, seed: int, mesh: Mesh, without: Sequence[str] = ()) -> dict[str, Any]:
    """Random parameters, each created where it will lie; `without` names top-level parts to leave out."""

    def initialise():
        parameters = model.init(jax.random.key(seed), *example_inputs(model, model.frames))["params"]
        return {part: leaves for part, leaves in parameters.items() if part not in without}

    shapes = jax.eval_shape(initialise)
    return jax.jit(initialise, out_shardings=sharding.shardings(shapes, mesh))()


def pretrained_parameters(pretrained: Pretrained, model: VLAB, seed: int, mesh: Mesh) -> dict[str, Any]:
    """A checkpoint's parameters, and random ones for what it lacks; a table in the log says where each came from. From
    a CLIP, the decoder and a separate image encoder start as copies of its towers. Raises as `load_parameters`."""
    shapes = parameter_shapes(model, model.frames)
    loaded, origins = load_parameters(pretrained, shapes, sharding.shardings(shapes, mesh))
    table = format_origins(origins, _not_loaded(shapes, loaded))
    logging.info("%s (%s)\n%s", pretrained.name, pretrained.architecture.format, table)
    if pretrained.whole:
        return loaded
    parameters = start_from_clip({**random_parameters(model, seed, mesh, without=tuple(loaded)), **loaded})
    return {part: parameters[part] for part in shapes}


def _not_loaded(shapes: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """By part and its first submodule, the number of parameters that the checkpoint lacks, and their origin."""
    sizes: collections.Counter[str] = collections.Counter()
    for path, leaf in flatten_dict({part: shapes[part] for part in shapes if part not in loaded}).items():
        sizes["/".join(path[:2])] += math.prod(leaf.shape)
    sources = {name: copied_from_clip(name) for name in sizes}
    return {name: (size, f"a copy of {sources[name]}" if sources[name] else "new") for name, size in sizes.items()}


def open_pretrained(name: str, model: Mapping[str, Any]) -> Pretrained:
    """Opens the checkpoint that a run starts from, and logs what is adapted to the fields `config.model`; raises
    `InputError` if it does not exist or is damaged, or its sizes are not the model's."""
    pretrained = open_checkpoint(name)
    for note in check_model(pretrained, model):
        logging.info("%s", note)
    return pretrained


def make_tokenizer(
    kind: str, path: str, text: Mapping[str, Any], pretrained: Pretrained | None, texts: Iterator[str]
) -> Tokenizer:
    """The tokenizer of a new run, by the fields of `config.tokenizer` and `config.model.text`: that of an export that
    it starts from, or CLIP's (raises `InputError` if it is not there), or a BPE trained on `texts`."""
    length = text["context_length"]
    if pretrained is not None and pretrained.whole:
        return tokenizers.load(pretrained.files.folder, length)
    if kind == "clip":
        beside = "" if pretrained is None else str(pretrained.files.folder)
        return tokenizers.load_clip(path or beside, length)
    return tokenizers.train_bpe(texts, text["vocab_size"], length)


def load_tokenizer(workdir: pathlib.Path, text: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a run keeps in its workdir; raises `InputError` if it has more ids than the text tower."""
    tokenizer = tokenizers.load(workdir, text["context_length"])
    if tokenizer.vocab_size > text["vocab_size"]:
        size = f"config.model.text.vocab_size={text['vocab_size']}"
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids, {size}; raise the latter")
    return tokenizer


class RunData:
    """The data sets of a run. Raises `InputError` if one does not exist or lacks a split, or the memory is too small.

    A split is opened once: if its directory vanishes later, it must not be taken for one that is to be prepared.

    Args:
      fields: `config.data`, plain.
      model: gives the size of frames, and their number in evaluation.
      evaluation_batch: clips of a batch in evaluation.
      needs_validation: whether the checkpoint is selected on validation data.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        stages: Sequence[StageSettings],
        model: VLAB,
        evaluation_batch: int,
        needs_validation: bool,
        neighbours: Neighbours,
    ) -> None:
        self._fields, self._stages, self._frame_size = fields, stages, model.vision["image_size"]
        self._options = BuildOptions.from_fields(fields)
        self._sources: dict[tuple[str, str], Any] = {}
        self.workers = default_workers(fields["workers"], neighbours.cores)  # at most; 0: threads
        # A half each for training and evaluation: training's batches wait while a stage is evaluated between its steps.
        self.memory = PrefetchMemory(fields["prefetch_gigabytes"], 2 * neighbours.host)
        batches = [(stage.frames, stage.batch_size // jax.process_count()) for stage in stages]
        plans = [
            plan_prefetch(self.memory, batch=batch, frame_bytes=self.frames(count).nbytes, workers=self.workers)
            for count, batch in [*batches, (model.frames, evaluation_batch)]
        ]
        for note in dict.fromkeys(plan.note for plan in plans if plan.note):
            logging.warning("%s", note)
        spec = fields["evaluate"]
        self.has_validation = "validation" in registry.prepare(spec, self._options).info.splits
        if needs_validation and not self.has_validation:
            hint = "set config.checkpoint.select_on='last'"
            raise InputError(f"data set {spec!r} has no validation split to select the checkpoint on; {hint}")
        # Else a split that is missing would be noticed only after training.
        for split in ("validation", "test") if self.has_validation else ("test",):
            self.evaluated(split)
        for stage in stages:
            self.training(stage)

    def _open(self, spec: str, split: str) -> Any:
        if (spec, split) not in self._sources:
            retry = self._fields["retry_seconds"]
            self._sources[spec, split] = registry.open_split(spec, split, self._options, retry)
        return self._sources[spec, split]

    def evaluated(self, split: str) -> Any:
        """A split of the data set that is evaluated."""
        return self._open(self._fields["evaluate"], split)

    def training(self, stage: StageSettings) -> list[Any]:
        """The training splits of a stage."""
        return [self._open(spec, "train") for spec, _ in stage.mixture]

    def texts(self, without: Sequence[str]) -> Iterator[str]:
        """The texts that a tokenizer is trained on: captions, and if a stage answers questions, questions of other
        types than `without`, with their answers."""
        with_questions = any(stage.questions for stage in self._stages)
        for spec in dict.fromkeys(spec for stage in self._stages for spec, _ in stage.mixture):
            source = self._open(spec, "train")
            for index in range(min(len(source), _TOKENIZER_CLIPS)):
                clip = schema.from_example(source[index])
                yield from clip.captions
                for question in clip.questions if with_questions else ():
                    if question.type not in without:
                        yield from (question.question, question.answer)

    def frames(self, count: int) -> pipeline.FrameOptions:
        """How a clip becomes so many frames."""
        limits = MediaLimits(**self._fields["limits"])
        return pipeline.FrameOptions(count, self._frame_size, self._fields["short"], limits)

    def batches(self, number: int, tokenizer: Tokenizer, first: int, without: Sequence[str]) -> pipeline.Batches:
        """This process's share of the batches of stage `number`, from batch `first` on; questions of the types in
        `without` are not trained on."""
        stage = self._stages[number]
        return pipeline.training_batches(
            self.training(stage),
            [weight for _, weight in stage.mixture],
            self.frames(stage.frames),
            tokenizer,
            batch_size=stage.batch_size,
            seed=stage.seed + 1000 * number,
            first=first,
            process=jax.process_index(),
            processes=jax.process_count(),
            workers=self.workers,
            memory=self.memory,
            questions=stage.questions,
            without=tuple(without),
            captions=any(w for name, w in stage.objective.weights.items() if name != "question_answering"),
            datasets=dataset_names([spec for spec, _ in stage.mixture]),
        )
