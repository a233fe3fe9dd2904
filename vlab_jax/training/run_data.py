"""What a run reads: the splits of its data sets, each opened once, and the batches that a stage learns from."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vlab_jax.data import builders, mixtures, pipeline
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.limits import MediaLimits
from vlab_jax.data.prefetch import PrefetchMemory, plan_prefetch
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.data.workers import default_workers
from vlab_jax.runtime.processes import Neighbours
from vlab_jax.training import start


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
        self.validated = start.validates(config, self._options)
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
            self._sources[spec, split] = builders.open_split(spec, split, self._options, retry)
        return self._sources[spec, split]

    def training(self) -> list[Any]:
        """The training splits of all stages."""
        return [self.open(spec, "train") for spec in start.training_sets(self._config)]

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
