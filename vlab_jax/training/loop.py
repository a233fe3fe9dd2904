"""A training run, top to bottom: mesh, data, tokenizer, model; then each stage: optimiser, steps, checkpoint,
evaluation; at the end the test split and the report.
"""

import contextlib
import dataclasses
import logging
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.data import crash_guard, pipeline, sampling
from vlab_jax.data.pieces import Batch, free_shared_memory
from vlab_jax.errors import CannotRead, RunPreempted
from vlab_jax.evaluation import encoder as evaluation
from vlab_jax.evaluation import sheets
from vlab_jax.evaluation.registry import Outcome, Plan
from vlab_jax.models.attention_check import with_sound_kernels
from vlab_jax.models.generation import Search
from vlab_jax.models.vlab import VLAB, parameter_shapes, start_from_clip
from vlab_jax.runtime import metrics as meters
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import PROGRESS, Checkpoints, DamagedCheckpoint
from vlab_jax.runtime.disk import only_run, write_json, writing
from vlab_jax.runtime.metrics import StepRecord
from vlab_jax.runtime.profiling import StepTrace
from vlab_jax.runtime.stop_signal import StopSignal
from vlab_jax.training import frozen, optim
from vlab_jax.training import setup as start
from vlab_jax.training import stage as stages
from vlab_jax.training.health import Anomalies, keep_batch
from vlab_jax.training.selection import Selection
from vlab_jax.training.setup import RunData
from vlab_jax.training.step import TrainState
from vlab_jax.training.workdir import RESULTS, check_workdir, read_results


@dataclasses.dataclass
class RunProgress:
    """How far a run is: saved with each checkpoint. `step` counts within the stage, `total` over all stages."""

    stage: int = 0
    step: int = 0
    total: int = 0
    seen: int = 0
    failed: int = 0


class Interrupted(Exception):
    """`stop_after` steps are done; everything is saved."""


def train(config: ConfigDict, workdir: pathlib.Path, profile: bool = False) -> dict[str, dict[str, float]]:
    """Runs, or resumes, all stages of a config.

    Args:
      config: fields of `config.training_config`, checked.
      workdir: where checkpoints, metrics and the report go.
      profile: whether a trace of a few steps goes there too.

    Returns:
      The metrics of each stage on validation data, and of the last one on test data.

    Raises:
      InputError: the workdir belongs to another config or another run is at work in it, or the data cannot be read.
      RunStopped: gradients are not finite, step after step.
      RunPreempted: SIGTERM came; what was trained is saved.
      CannotWrite: a checkpoint, or another file, could not be written.
      CannotRead: the data was out of reach for too long; what was trained is saved.
    """
    config = configuration.resolved(config)
    mesh = sharding.make_mesh(**config.mesh)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with (
        only_run(workdir) if sharding.is_primary() else contextlib.nullcontext(),
        StopSignal() as stop_signal,
        jax.set_mesh(mesh),
        jax.default_matmul_precision(config.matmul_precision),
    ):
        with writing(workdir):
            crash_guard.take_over(workdir / f".process-{jax.process_index()}")
        while True:
            try:
                return _train(config, workdir, mesh, stop_signal, StepTrace(workdir / "profile" if profile else None))
            except DamagedCheckpoint as error:
                with sharding.primary_first("damaged"):
                    aside = error.set_aside() if sharding.is_primary() else "damaged/"
                logging.warning("%s; it is put aside as %s, and the run goes on from the one before", error, aside)


def _train(
    config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, stop_signal: StopSignal, trace: StepTrace
) -> dict[str, dict[str, float]]:
    with (
        Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        meters.MetricWriter(workdir) if sharding.is_primary() else meters.NoWriter() as writer,
    ):
        run = Run(config, workdir, mesh, checkpoints, writer, trace, stop_signal)
        progress, parameters = run.begin()
        for number in range(progress.stage, len(config.stages)):
            try:
                parameters, progress = run.stage(number, parameters, progress)
            except Interrupted:
                checkpoints.wait()
                return run.results
        return run.finish(parameters)


class Run:
    """What the stages of a run have in common."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        mesh: Mesh,
        checkpoints: Checkpoints,
        writer: meters.MetricWriter | meters.NoWriter,
        trace: StepTrace,
        stop_signal: StopSignal,
    ) -> None:
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.checkpoints, self.writer, self.trace, self.stop_signal = checkpoints, writer, trace, stop_signal
        self.saved_config = configuration.plain(config.to_dict())
        self.results: dict[str, dict[str, float]] = {}
        self.originals: Any = None  # float32 values of what the stage in progress holds rounded, see frozen_storage.py
        last = config.stages[-1]
        self.selection = Selection(workdir, dict(config.checkpoint), self._tasks(last), last)
        check_workdir(checkpoints, self.saved_config)
        platform = sharding.platform_of(mesh)
        self.model = VLAB.from_fields(configuration.model_fields(self.saved_config, platform))
        stages.check(self.model, config, mesh)
        self.model = with_sound_kernels(self.model, stages.attention_shapes_of(self.model, config))
        neighbours = sharding.neighbours()
        with sharding.primary_first("data"):
            self.data = RunData(config, neighbours, free_shared_memory())
        fresh = checkpoints.latest() is None
        self.pretrained = start.open_pretrained(config) if fresh and config.model.pretrained else None
        with sharding.primary_first("tokenizer"):
            made_here = fresh and sharding.is_primary()
            self.tokenizer = start.make_tokenizer(config, workdir, made_here, self.pretrained, self.data.training())
        # Too long texts would be missed only when evaluated.
        Search.of(dict(config.generation), self.tokenizer.end, self.tokenizer.context_length)

    def begin(self) -> tuple[RunProgress, Any]:
        """Fresh parameters, or (None) those that the stage in progress will restore."""
        latest = self.checkpoints.latest()
        if sharding.is_primary():
            self.checkpoints.name_others()
        if latest is None:
            self.writer.truncate(0)  # of a run that ended before its first checkpoint
            self._write("config.json", self.saved_config)
            return RunProgress(), self._initial_parameters()
        progress = RunProgress(**self.checkpoints.read_json(latest, PROGRESS))
        self.writer.truncate(progress.total)
        self.selection.resume(progress.total)
        self.checkpoints.keep_also(self.selection.best())
        self.results = read_results(self.workdir)
        name = self.config.stages[progress.stage]
        logging.info(
            "resuming from %s: stage %s, step %d",
            self.checkpoints.directory / str(latest),
            name,
            progress.step,
        )
        return progress, None

    def _initial_parameters(self) -> Any:
        given = (self.model, self.config.frames, self.config.seed, self.mesh)
        if self.pretrained is None:
            return start.random_parameters(*given)
        self._write("pretrained.json", start.origin(self.pretrained))
        return start.pretrained_parameters(self.pretrained, *given)

    def _write(self, name: str, content: Any) -> None:
        if sharding.is_primary():
            write_json(self.workdir / name, content)

    def stage(self, number: int, parameters: Any, progress: RunProgress) -> tuple[Any, RunProgress]:
        """Trains one stage from `parameters`, or from the checkpoint that `progress` is of; evaluates it."""
        name = self.config.stages[number]
        stage = self.config.stage[name]
        if parameters is not None and stage.start_from_clip:
            parameters = start_from_clip(parameters)
        setup = stages.prepare(self.model, stage, self.config, self.mesh)
        logging.info("stage %s\n%s", name, optim.describe_groups(setup.shapes.parameters, setup.groups))
        if parameters is None:
            saved = self.checkpoints.restore(progress.total, setup.saved_shapes, setup.saved_shardings)
            self.originals, state = setup.originals(saved.parameters), setup.resumed(saved)
        else:
            self.originals, state = setup.originals(parameters), setup.initial(parameters)
            progress = dataclasses.replace(progress, stage=number, step=0)
        offset = progress.total - progress.step
        self._evaluate_on_the_way(name, state, progress)  # what a run that was interrupted has left out
        state, progress = self._steps(name, setup, state, progress, offset)
        if self.data.validated:
            self._evaluate(name, state.evaluated, "validation", progress.total)
        if number == len(self.config.stages) - 1:
            self._add_to_selection(name, state, progress)
        return self._placed(frozen.exact(state, self.originals).evaluated), progress

    def _placed(self, parameters: Any) -> Any:
        """The same on the devices, where some of it is on the host."""
        return jax.device_put(parameters, sharding.shardings(parameters, self.mesh))

    def _steps(
        self, name: str, setup: stages.Stage, state: TrainState, progress: RunProgress, offset: int
    ) -> tuple[TrainState, RunProgress]:
        stage = self.config.stage[name]
        failures = pipeline.FailureCount(self.config.data.max_failed_share, progress.seen, progress.failed)
        with (
            self.data.batches(name, self.tokenizer, progress.step, self.config.evaluation.multiple_choice) as batches,
            self.trace,
            meters.ProgressBar(name, stage.steps, initial_step=progress.step, stream=sharding.display()) as bar,
        ):
            recent: dict[int, tuple[Any, Any]] = {}  # ids and arrays; steps are read one behind

            def stopped(bad: int) -> str:
                return self._stopped(name, bad, recent[bad], state, progress)

            watch = Anomalies(name, self.config.most_skipped, stopped).watch
            given = (self.config.log_every, setup.schedule, setup.cost, watch)
            record = StepRecord(name, offset, self.writer, bar, *given)
            self.stop_signal.hold()
            for step in range(progress.step + 1, stage.steps + 1):
                self.trace.next_step()
                started = time.monotonic()
                batch = self._next(batches, record, state, progress)
                ready = time.monotonic()
                failures.update(len(batch["clip"]), batch.pop("failures"))
                ids = batch.pop("ids")
                recent = {step - 1: recent.get(step - 1), step: (ids, batch)}
                state, metrics = setup.step(state, sharding.to_global(batch, self.mesh))
                total = offset + step
                progress = RunProgress(progress.stage, step, total, failures.seen, failures.failed)
                record.add(step, metrics, started, ready, ids)
                self.checkpoints.check()
                preempted = self.stop_signal.asked(total)
                stop = preempted or total == self.config.stop_after
                on_the_way = self._is_on_the_way(name, step)
                if step == stage.steps or stop or on_the_way or total % self.config.checkpoint.every == 0:
                    record.flush()  # what is saved has a finite loss
                    failures.join(sharding.gathered)
                    progress = dataclasses.replace(progress, seen=failures.seen, failed=failures.failed)
                    self._save(state, progress)
                if stop:
                    raise RunPreempted if preempted else Interrupted
                self._evaluate_on_the_way(name, state, progress)
        self.stop_signal.release()
        return state, progress

    def _next(self, batches: pipeline.Batches, record: StepRecord, state: TrainState, progress: RunProgress) -> Batch:
        """The next batch. It may be long in coming, where the data is out of reach: SIGTERM is heard meanwhile.

        Raises:
          CannotRead: it does not come; what was trained is saved.
          RunPreempted: SIGTERM came; what was trained is saved.
        """
        try:
            self.stop_signal.release()
            batch = next(batches)
            self.stop_signal.hold()
        except (CannotRead, RunPreempted):
            self.stop_signal.hold()
            if jax.process_count() == 1 and progress.total:  # several save together, and the others go on
                record.flush()
                self._save(state, progress)
            raise
        return batch

    def _is_on_the_way(self, name: str, step: int) -> bool:
        """Whether a stage is evaluated after a step that is not its last."""
        every, steps = self.config.stage[name].evaluate_every, self.config.stage[name].steps
        return self._is_evaluated(name) and bool(every) and step % every == 0 and 0 < step < steps

    def _is_evaluated(self, name: str) -> bool:
        return self.data.validated or self.selection.split(name) == "test"

    def _evaluate_on_the_way(self, name: str, state: TrainState, progress: RunProgress) -> None:
        if self._is_on_the_way(name, progress.step):
            self._add_to_selection(name, state, progress)

    def _add_to_selection(self, name: str, state: TrainState, progress: RunProgress) -> None:
        """Evaluates, unless it is done already, and keeps the checkpoint if it is the best so far."""
        if not self.selection.has(progress.total):
            split = self.selection.split(name)
            row = f"{name} ({split})"
            if not self._is_evaluated(name):
                metrics = {}
            elif progress.step == self.config.stage[name].steps and row in self.results:
                metrics = self.results[row]
            else:
                metrics = self._evaluate(name, state.evaluated, split, progress.total, keep=False).metrics
            self.selection.add(progress.total, name, metrics)
        self.checkpoints.keep_also(self.selection.best())

    def _save(self, state: TrainState, progress: RunProgress) -> None:
        exact = frozen.exact(state, self.originals)
        self.checkpoints.save(progress.total, exact, dataclasses.asdict(progress), self.saved_config)

    def _stopped(self, name: str, bad: int, seen: tuple[Any, Any], state: TrainState, progress: RunProgress) -> str:
        """Keeps the batch of a bad step, and the state, to which bad steps do nothing; says where they are."""
        self._save(state, progress)
        self.checkpoints.wait()
        kept = keep_batch(self.workdir, name, bad, *seen)
        saved = self.checkpoints.directory / str(self.checkpoints.latest())
        return f"the batch is kept in {kept} (see --replay), what was learned before in {saved}"

    def _evaluate(
        self, name: str, parameters: Any, split: str, total: int, keep: bool = True, row: str = ""
    ) -> Outcome | None:
        """Evaluates on the run's own data set; with `keep`, once, and the figures go into the results."""
        row = row or f"{name} ({split})"
        if keep and row in self.results and split != "test":
            return None
        source = self.data.evaluated(split)
        encoder = self._encoder(parameters, self.config.stage[name])
        plan = self._plan(name) if keep else self._plan(name).headline(self.selection.by)
        folder = self.workdir / "texts" / row if keep and sharding.is_primary() else None
        with jax.set_mesh(encoder.mesh):
            outcome = plan.evaluate(encoder, source, row, folder)
        outcome = outcome._replace(metrics=sharding.agreed(lambda: outcome.metrics))
        if row not in self.results:
            figures = {f"{split}/{key}": value for key, value in outcome.metrics.items()}
            self.writer.write(total, figures, stage=name)
        if keep:
            self.results |= outcome.by_row(row)
            self._write(RESULTS, self.results)
        return outcome

    def _tasks(self, name: str) -> tuple[str, ...]:
        return tuple(self.config.stage[name].evaluate or self.config.evaluation.tasks)

    def _plan(self, name: str) -> Plan:
        return Plan.of(
            {**self.config.evaluation, "tasks": self._tasks(name)},
            dict(self.config.generation),
            self.tokenizer,
            lambda: self.data.mixture(name)[0],
            self.config.data.max_failed_share,
        )

    def _encoder(self, parameters: Any, stage: ConfigDict) -> evaluation.Encoder:
        frames = self.config.frames  # also where the stage saw fewer, so that stages can be compared
        mesh = sharding.own_mesh(self.mesh)  # each of several processes evaluates its share by itself
        return evaluation.Encoder(
            self.model,
            sharding.on_own_mesh(parameters, mesh),
            self.tokenizer,
            self.data.frames(frames),
            tuple(stage.streams),
            sampling.sample_image_frames(frames, self.config.image_frames),
            mesh,
            self.config.evaluation.batch_size,
            self.data.workers,
            self.data.memory,
        )

    def finish(self, parameters: Any) -> dict[str, dict[str, float]]:
        """Evaluates the selected checkpoint on the test split and writes the report."""
        last = self.config.stages[-1]
        total = sum(self.config.stage[name].steps for name in self.config.stages)
        selected = self.selection.select()
        if selected.step != total:
            parameters = self._saved_parameters(last, selected.step)
        self.results |= selected.rows(last, total)
        outcome = self._evaluate(last, parameters, "test", total, row=selected.test_row(last, total))
        if sharding.is_primary():
            self._report(outcome)
        return self.results

    def _report(self, outcome: Outcome) -> None:
        source = self.data.evaluated("test")
        with writing(self.workdir / "report"):
            sheets.write_report(
                self.workdir / "report",
                self.workdir / meters.METRICS_FILE,
                self.results,
                outcome,
                source,
                self.data.frames(self.config.frames),
                queries=self.config.report.queries,
                title="VLAB-JAX run",
            )

    def _saved_parameters(self, name: str, total: int) -> Any:
        self.checkpoints.wait()
        shapes = parameter_shapes(self.model, self.config.frames)
        averaged = bool(self.config.stage[name].average_decay)
        with Checkpoints(self.checkpoints.directory) as saved:  # Orbax restores parts by a manager that saved nothing
            return saved.restore_parameters(total, shapes, sharding.shardings(shapes, self.mesh), averaged)
