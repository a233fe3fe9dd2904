"""A training run, top to bottom: mesh, model, data, tokenizer; then each stage: optimiser, steps, checkpoints,
evaluation; at the end the test split and the report.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.data import pipeline, sampling
from vlab_jax.data.batches import Batch
from vlab_jax.errors import CannotRead, RunPreempted
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.evaluation.plan import Outcome, Plan
from vlab_jax.evaluation.report import write_report
from vlab_jax.models.attention_check import with_checked_kernels
from vlab_jax.models.vlab import parameter_shapes, start_from_clip
from vlab_jax.runtime import metrics, sharding
from vlab_jax.runtime.checkpoint import PROGRESS, Checkpoints, DamagedCheckpoint
from vlab_jax.runtime.disk import exclusive_lock, write_json, writing
from vlab_jax.runtime.profiling import StepTrace
from vlab_jax.runtime.stop_signal import StopSignal
from vlab_jax.training import frozen, inputs, optim, setup
from vlab_jax.training import stage as stages
from vlab_jax.training.health import StepMonitor, keep_batch
from vlab_jax.training.selection import Selection
from vlab_jax.training.stage import StageSettings
from vlab_jax.training.step import TrainState

RESULTS = "results.json"


@dataclasses.dataclass
class RunProgress:
    """How far a run is, saved with each checkpoint. `step` counts within the stage, `total` over all stages; `seen` and
    `failed` are numbers of clips."""

    stage: int = 0
    step: int = 0
    total: int = 0
    seen: int = 0
    failed: int = 0


class Interrupted(Exception):
    """`stop_after` steps are done; everything is saved."""


def train(config: ConfigDict, workdir: pathlib.Path, profile: bool = False) -> dict[str, dict[str, float]]:
    """Runs, or resumes, all stages of a checked training config; checkpoints, metrics and the report go to `workdir`,
    with `profile` also a trace of a few steps.

    Returns the metrics of each stage on validation data, and of the last one on test data, by row of the results.

    Raises:
      InputError: the workdir belongs to another config or is in use by another run, or the data cannot be read.
      RunStopped: gradients are not finite, step after step; or as its subclasses `CannotWrite` and `CannotRead` say.
      RunPreempted: SIGTERM came; the training so far is saved.
    """
    config = configuration.resolved(config)
    mesh = sharding.make_mesh(**config.mesh)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    in_use = f"another run is at work in {workdir}; wait until it ends, or use another --workdir"
    with (
        exclusive_lock(workdir / "run.lock", in_use) if sharding.is_primary() else contextlib.nullcontext(),
        StopSignal() as stop_signal,
        jax.set_mesh(mesh),
        jax.default_matmul_precision(config.matmul_precision),
    ):
        while True:
            try:
                with (
                    Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
                    metrics.MetricWriter(workdir, active=sharding.is_primary()) as writer,
                ):
                    trace = StepTrace(workdir / "profile" if profile else None)
                    return Run(config, workdir, mesh, checkpoints, writer, trace, stop_signal).run()
            except DamagedCheckpoint as error:
                with sharding.primary_first("damaged"):
                    aside = error.set_aside() if sharding.is_primary() else "damaged/"
                logging.warning("%s; it is moved to %s, and the run goes on from the one before", error, aside)


@dataclasses.dataclass
class Run:
    """What the stages of a run have in common."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    checkpoints: Checkpoints
    writer: metrics.MetricWriter
    trace: StepTrace
    stop_signal: StopSignal

    def __post_init__(self) -> None:
        config, checkpoints = self.config, self.checkpoints
        self.saved_config = configuration.plain(config.to_dict())
        self.results: dict[str, dict[str, float]] = {}
        self.originals: Any = None  # float32 values of the parameters that the current stage holds rounded
        setup.check_workdir(checkpoints, self.saved_config)
        self.stages = setup.read_stages(config)
        self.last = self.stages[-1]
        self.selection = Selection(self.workdir, dict(config.checkpoint), self.last.tasks, self.last.name)
        model = setup.make_model(config, self.mesh)
        stages.check_stages(model, self.stages, self.mesh)
        self.model = with_checked_kernels(model, stages.stage_attention_shapes(model, self.stages))
        neighbours = sharding.neighbours()
        with sharding.primary_first("data"):
            needs_validation = config.checkpoint.select_on == "validation"
            self.data = inputs.RunData(
                config.data.to_dict(), self.stages, model, config.evaluation.batch_size, needs_validation, neighbours
            )
        fresh, self.pretrained = checkpoints.latest() is None, None
        if fresh and config.model.pretrained:
            self.pretrained = inputs.open_pretrained(config.model.pretrained, self.saved_config["model"])
        with sharding.primary_first("tokenizer"):
            if fresh and sharding.is_primary():
                texts = self.data.texts(config.evaluation.multiple_choice)
                kind, path = config.tokenizer.kind, config.tokenizer.path
                tokenizer = inputs.make_tokenizer(kind, path, model.text, self.pretrained, texts)
                with writing(self.workdir):
                    tokenizer.save(self.workdir)
            self.tokenizer = inputs.load_tokenizer(self.workdir, model.text)
        self._plan(self.last)  # else texts that are too long would be noticed only in the first evaluation

    def run(self) -> dict[str, dict[str, float]]:
        """Trains the stages that remain, and evaluates; returns the results."""
        progress, parameters = self.begin()
        for number in range(progress.stage, len(self.stages)):
            try:
                parameters, progress = self.train_stage(number, parameters, progress)
            except Interrupted:
                self.checkpoints.wait()
                return self.results
        return self.finish(parameters)

    def begin(self) -> tuple[RunProgress, Any]:
        """The progress, and the parameters of a new run, or None where the current stage will restore them."""
        latest = self.checkpoints.latest()
        if sharding.is_primary():
            self.checkpoints.warn_of_incomplete()
        if latest is None:
            self.writer.truncate(0)  # lines of a run that ended before its first checkpoint
            self._write("config.json", self.saved_config)
            if self.pretrained is None:
                return RunProgress(), inputs.random_parameters(self.model, self.config.seed, self.mesh)
            # For the model card of an export.
            origin = {"name": self.pretrained.name, "format": self.pretrained.architecture.format}
            self._write("pretrained.json", {**origin, "licence": self.pretrained.licence()})
            parameters = inputs.pretrained_parameters(self.pretrained, self.model, self.config.seed, self.mesh)
            return RunProgress(), parameters
        progress = RunProgress(**self.checkpoints.read_json(latest, PROGRESS))
        self.writer.truncate(progress.total)
        self.selection.resume(progress.total)
        self.checkpoints.keep_best(self.selection.best())
        results = self.workdir / RESULTS
        self.results = json.loads(results.read_text()) if results.exists() else {}
        checkpoint, name = self.checkpoints.directory / str(latest), self.stages[progress.stage].name
        logging.info("resuming from %s: stage %s, step %d", checkpoint, name, progress.step)
        return progress, None

    def _write(self, name: str, content: Any) -> None:
        if sharding.is_primary():
            write_json(self.workdir / name, content)

    def train_stage(self, number: int, parameters: Any, progress: RunProgress) -> tuple[Any, RunProgress]:
        """Trains a stage from `parameters`, or from the checkpoint of `progress` if these are None; evaluates it."""
        stage = self.stages[number]
        if parameters is not None and stage.start_from_clip:
            parameters = start_from_clip(parameters)
        prepared = stages.prepare(self.model, stage, self.mesh)
        logging.info("stage %s\n%s", stage.name, optim.describe_groups(prepared.shapes.parameters, prepared.groups))
        if parameters is None:
            saved = self.checkpoints.restore(progress.total, prepared.saved_shapes, prepared.saved_shardings)
            self.originals, state = prepared.originals(saved.parameters), prepared.resumed(saved)
        else:
            self.originals, state = prepared.originals(parameters), prepared.initial(parameters)
            progress = dataclasses.replace(progress, stage=number, step=0)
        self._evaluate_if_due(stage, state, progress)  # an interrupted run may have left it out
        state, progress = self._train_steps(stage, prepared, state, progress)
        if self.data.has_validation:
            self._evaluate(stage, state.evaluated, "validation", progress.total)
        if stage is self.last:
            self._evaluate_for_selection(stage, state, progress)
        # Some originals are on the host: back to the devices.
        parameters = frozen.with_originals(state, self.originals).evaluated
        return jax.device_put(parameters, sharding.shardings(parameters, self.mesh)), progress

    def _train_steps(
        self, stage: StageSettings, prepared: stages.Stage, state: TrainState, progress: RunProgress
    ) -> tuple[TrainState, RunProgress]:
        config, offset = self.config, progress.total - progress.step
        failures = pipeline.FailureCount(config.data.max_failed_share, progress.seen, progress.failed)
        without = config.evaluation.multiple_choice
        with (
            self.data.batches(progress.stage, self.tokenizer, progress.step, without) as batches,
            self.trace,
            metrics.ProgressBar(stage.name, stage.steps, initial=progress.step, shown=sharding.is_primary()) as bar,
        ):
            recent: dict[int, tuple[Any, Any]] = {}  # ids and arrays of two steps, since metrics are read one step late

            def on_stop(bad: int) -> str:
                return self._keep_bad_step(stage.name, bad, recent[bad], state, progress)

            monitor = StepMonitor(stage.name, config.most_skipped, on_stop)
            record = metrics.StepRecord(
                self.writer, bar, stage.name, offset, config.log_every, prepared.schedule, prepared.cost, monitor.check
            )
            self.stop_signal.hold()
            for step in range(progress.step + 1, stage.steps + 1):
                self.trace.next_step()
                started = time.monotonic()
                batch = self._next_batch(batches, record, state, progress)
                ready = time.monotonic()
                failures.update(len(batch["clip"]), batch.pop("failures"))
                ids = batch.pop("ids")
                recent = {step - 1: recent.get(step - 1), step: (ids, batch)}
                state, step_metrics = prepared.step(state, sharding.to_global(batch, self.mesh))
                total = offset + step
                progress = RunProgress(progress.stage, step, total, failures.seen, failures.failed)
                record.add(step, step_metrics, started, ready, ids)
                self.checkpoints.check()
                preempted = self.stop_signal.is_due(total)
                stop = preempted or total == config.stop_after
                is_due = total % config.checkpoint.every == 0 or step == stage.steps
                if is_due or stop or self._is_eval_step(stage, step):
                    record.flush()  # a checkpoint must have a finite loss
                    failures.join(sharding.all_gather)
                    progress = dataclasses.replace(progress, seen=failures.seen, failed=failures.failed)
                    self._save(state, progress)
                if stop:
                    raise RunPreempted if preempted else Interrupted
                self._evaluate_if_due(stage, state, progress)
        self.stop_signal.release()
        return state, progress

    def _next_batch(
        self, batches: pipeline.Batches, record: metrics.StepRecord, state: TrainState, progress: RunProgress
    ) -> Batch:
        """The next batch; if it does not come or SIGTERM comes meanwhile, the training so far is saved."""
        try:
            self.stop_signal.release()  # it may take long, where the data is out of reach
            batch = next(batches)
            self.stop_signal.hold()
        except (CannotRead, RunPreempted):
            self.stop_signal.hold()
            if jax.process_count() == 1 and progress.total:  # several save together, and the others go on
                record.flush()
                self._save(state, progress)
            raise
        return batch

    def _is_eval_step(self, stage: StageSettings, step: int) -> bool:
        """Whether the stage is evaluated after this step, which is not its last."""
        due = 0 < step < stage.steps and bool(stage.evaluate_every) and step % stage.evaluate_every == 0
        return due and self._can_evaluate(stage)

    def _can_evaluate(self, stage: StageSettings) -> bool:
        return self.data.has_validation or self.selection.split(stage.name) == "test"

    def _evaluate_if_due(self, stage: StageSettings, state: TrainState, progress: RunProgress) -> None:
        if self._is_eval_step(stage, progress.step):
            self._evaluate_for_selection(stage, state, progress)

    def _evaluate_for_selection(self, stage: StageSettings, state: TrainState, progress: RunProgress) -> None:
        """Evaluates, unless that is done already, and keeps the checkpoint if it is the best so far."""
        if not self.selection.has(progress.total):
            split = self.selection.split(stage.name)
            row = f"{stage.name} ({split})"
            if not self._can_evaluate(stage):
                figures = {}
            elif progress.step == stage.steps and row in self.results:
                figures = self.results[row]
            else:
                figures = self._evaluate(stage, state.evaluated, split, progress.total, keep=False).metrics
            self.selection.add(progress.total, stage.name, figures)
        self.checkpoints.keep_best(self.selection.best())

    def _save(self, state: TrainState, progress: RunProgress) -> None:
        exact = frozen.with_originals(state, self.originals)
        self.checkpoints.save(progress.total, exact, dataclasses.asdict(progress), self.saved_config)

    def _keep_bad_step(
        self, name: str, bad: int, recent: tuple[Any, Any], state: TrainState, progress: RunProgress
    ) -> str:
        """Keeps the batch of a bad step, and the state, which bad steps do not change; returns where they are."""
        self._save(state, progress)
        self.checkpoints.wait()
        kept = keep_batch(self.workdir, name, bad, *recent)
        saved = self.checkpoints.directory / str(self.checkpoints.latest())
        return f"the batch is kept in {kept} (see --replay), the training before it in {saved}"

    def _evaluate(
        self, stage: StageSettings, parameters: Any, split: str, total: int, keep: bool = True, row: str = ""
    ) -> Outcome | None:
        """Evaluates on a split of the run's own data set; with `keep`, only once, and the figures go into the results.

        Without `keep`, only the figure to select by and those that cost no more are computed.
        """
        row = row or f"{stage.name} ({split})"
        if keep and row in self.results and split != "test":
            return None
        encoder = self._encoder(parameters, stage, row)
        plan = self._plan(stage) if keep else self._plan(stage).headline(self.selection.by)
        folder = self.workdir / "texts" / row if keep and sharding.is_primary() else None
        with jax.set_mesh(encoder.mesh):
            outcome = plan.evaluate(encoder, self.data.evaluated(split), folder)
        outcome = outcome._replace(metrics=sharding.from_primary(lambda: outcome.metrics))
        if row not in self.results:
            figures = {f"{split}/{key}": value for key, value in outcome.metrics.items()}
            self.writer.write(total, figures, stage=stage.name)
        if keep:
            self.results |= outcome.by_row(row)
            self._write(RESULTS, self.results)
        return outcome

    def _plan(self, stage: StageSettings) -> Plan:
        return Plan.of(
            {**self.config.evaluation, "tasks": stage.tasks},
            dict(self.config.generation),
            self.tokenizer,
            lambda: self.data.training(stage),
        )

    def _encoder(self, parameters: Any, stage: StageSettings, row: str) -> Encoder:
        frames = self.config.frames  # even if the stage had fewer, so that stages can be compared
        mesh = sharding.local_mesh(self.mesh)  # each of several processes evaluates its share by itself
        return Encoder(
            self.model,
            sharding.copy_to_local_mesh(parameters, mesh),
            self.tokenizer,
            self.data.frames(frames),
            stage.objective.streams,
            sampling.sample_image_frames(frames, self.config.image_frames),
            mesh,
            self.config.evaluation.batch_size,
            self.data.workers,
            self.data.memory,
            self.config.data.max_failed_share,
            row,
        )

    def finish(self, parameters: Any) -> dict[str, dict[str, float]]:
        """Evaluates the selected checkpoint on the test split and writes the report."""
        total, selected = sum(stage.steps for stage in self.stages), self.selection.select()
        if selected != total:
            self.checkpoints.wait()
            shapes, averaged = parameter_shapes(self.model, self.model.frames), bool(self.last.average_decay)
            # Orbax restores parts by a manager that saved nothing.
            with Checkpoints(self.checkpoints.directory) as saved:
                placement = sharding.shardings(shapes, self.mesh)
                parameters = saved.restore_parameters(selected, shapes, placement, averaged)
        rows, test_row = self.selection.rows(total)
        self.results |= rows
        outcome = self._evaluate(self.last, parameters, "test", total, row=test_row)
        if sharding.is_primary():
            folder = self.workdir / "report"
            with writing(folder):
                write_report(
                    folder,
                    "VLAB-JAX run",
                    self.workdir / metrics.METRICS_FILE,
                    self.results,
                    outcome,
                    self.data.evaluated("test"),
                    self.data.frames(self.config.frames),
                    self.config.report.queries,
                )
        return self.results
