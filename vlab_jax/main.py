"""Trains and evaluates VLAB by a config.

    python -m vlab_jax.main --config=configs/pretrain.py --workdir=workdir
    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir

The first command trains the demo; if it is started again with the same workdir, it goes on where it stopped. The second
evaluates the result. A config's docstring says what it does, what it costs and which arguments it takes after a colon.
Any of its fields (`vlab_jax/config.py` lists them) can be set on the command line:

    python -m vlab_jax.main --config=configs/pretrain.py:data=folder:/my/videos --workdir=mine
    python -m vlab_jax.main --config=configs/pretrain.py --workdir=short --config.stage.blend.steps=200

Exit status: 0 done; 1 a fault of the program; 2 a mistake in the command, the config or the data; 3 the run cannot go
on; 4 stopped by SIGTERM, and saved; 5 a checkpoint or another file cannot be written (a full disk); 6 the data is out
of reach for too long. After 4, 5 and 6 the same command goes on.
"""

import contextlib
import errno
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import logging as absl_logging
from ml_collections import ConfigDict

from vlab_jax import config_file
from vlab_jax.errors import CannotRead, CannotWrite, InputError, RunPreempted, RunStopped

FLAGS = config_file.program_flags(
    "What to run: a file, and after a colon its argument, as in configs/pretrain.py:l14.",
    {
        "workdir": "The folder for checkpoints, metrics and the report of a training run, which resumes from what is "
        "there; or for the report of an evaluation (optional).",
        "checkpoint": "What to evaluate: a run's workdir (the checkpoint it was tested with, or its newest) or its "
        "checkpoints/<step>.",
        "replay": "The batch of a bad step, which the run in the workdir has kept: <workdir>/replay/*.npz. Prints its "
        "losses and gradients instead of training.",
    },
    {
        "multihost": "Train or evaluate with several processes, each started with this flag. On a TPU pod or under "
        "Slurm they find each other; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES "
        "and JAX_PROCESS_ID (from 0). All of them must see the same workdir.",
        "profile": "While training, write a trace of five steps into <workdir>/profile, for TensorBoard's profiler or "
        "Perfetto.",
    },
)


def run(
    config: ConfigDict,
    workdir: str | None,
    checkpoint: str | None,
    multihost: bool = False,
    profile: bool = False,
    batch: str | None = None,
) -> None:
    """Trains or evaluates, as the config says, or replays the kept batch in the file `batch`; see the flags. Raises
    `InputError`, `RunStopped` or `RunPreempted`."""
    from vlab_jax import config_check  # here, because it takes seconds: a mistake in the command is reported before

    config_check.check(config)
    if config.task == "evaluate":
        if not checkpoint:
            raise InputError("to evaluate, say of which run: --checkpoint=<workdir or checkpoints/<step>>")
        with _join_processes(multihost):
            from vlab_jax.evaluation.checkpoint import evaluate
            from vlab_jax.runtime.profiling import keep_compiled_programs

            keep_compiled_programs()
            evaluate(config, pathlib.Path(checkpoint), pathlib.Path(workdir) if workdir else None)
        return
    if not workdir:
        raise InputError("to train, say where checkpoints and the report go: --workdir=<directory>")
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--workdir={workdir} cannot be written to; name a directory of your own")
    with _join_processes(multihost):
        _train(config, folder, profile, batch)


def _join_processes(multihost: bool) -> contextlib.AbstractContextManager:
    """With `multihost`, joins the other processes; within the context, an error in one then ends all."""
    if not multihost:
        return contextlib.nullcontext()
    from vlab_jax.runtime import sharding
    from vlab_jax.runtime.shared_errors import SharedErrors

    sharding.connect()
    if not sharding.is_primary():
        logging.getLogger().setLevel(logging.WARNING)
    return SharedErrors(line_and_status)


def _train(config: ConfigDict, folder: pathlib.Path, profile: bool, batch: str | None) -> None:
    import jax

    from vlab_jax.runtime.profiling import keep_compiled_programs, keep_freed_memory
    from vlab_jax.training.health import replay
    from vlab_jax.training.loop import train

    keep_compiled_programs()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if batch:
        print(replay(config, folder, pathlib.Path(batch)))
    else:
        train(config, folder, profile)


def line_and_status(error: BaseException) -> tuple[str, int]:
    """The line and the exit status with which an error ends the program; 1: a fault of the program."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, RunStopped):
        return str(error), {CannotWrite: 5, CannotRead: 6}.get(type(error), 3)
    if isinstance(error, RunPreempted):
        return "stopped by SIGTERM; the training so far is saved, and the same command goes on", 4
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from vlab_jax.runtime.disk import cannot_write

        return str(cannot_write(pathlib.Path(error.filename or tempfile.gettempdir()), error)), 5
    return " ".join(f"{type(error).__name__}: {error}".split()), 1


def _log_plainly() -> None:
    """Logs messages without prefix, and of libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    # A failed save in Orbax's background is raised, and reported by its own line.
    handler.addFilter(lambda record: not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio")))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("absl", "orbax", "jax", "grain", "tensorflow_datasets", "etils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main(arguments: Sequence[str]) -> int:
    """The entry point of `python -m vlab_jax.main`."""
    if config_file.show_help(arguments, __doc__, FLAGS):
        return 0
    try:
        config_file.parse(arguments, FLAGS)
        _log_plainly()
        run(FLAGS.config, FLAGS.workdir, FLAGS.checkpoint, FLAGS.multihost, FLAGS.profile, FLAGS.replay)
    except Exception as error:
        line, status = line_and_status(error)
        if status == 1:
            raise
        print(f"error: {line}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
