"""Trains and evaluates VLAB: runs what a config says.

    python -m vlab_jax.main --config=configs/pretrain.py --workdir=workdir
    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir

The first trains the demo; started again with the same workdir, it goes on where it stopped. The second evaluates what
the first has trained. A config's docstring says what it does, what it costs and which arguments it takes, behind a
colon; any of its fields (`vlab_jax/config.py` lists them) can be set behind that:

    python -m vlab_jax.main --config=configs/pretrain.py:data=folder:/my/videos --workdir=mine
    python -m vlab_jax.main --config=configs/pretrain.py --workdir=short --config.stage.blend.steps=200

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command, the config or the data; 3 the run
cannot go on; 4 stopped by SIGTERM, and saved; 5 a checkpoint or another file cannot be written (a full disk); 6 the
data is out of reach for too long. After 4, 5 and 6 the same command goes on.
"""

import contextlib
import errno
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from vlab_jax import config_check, config_file
from vlab_jax.errors import CannotRead, CannotWrite, InputError, RunPreempted, RunStopped

CONFIG = config_flags.DEFINE_config_file(
    config_file.FLAG, None, "What to run: a file, and after a colon its argument, as in configs/pretrain.py:l14."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "To train: where checkpoints, metrics and the report go; a run resumes from what it finds there. "
    "To evaluate: where a report goes, if one is wanted.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "To evaluate: a run's workdir (the checkpoint it was tested with, or its newest) or its checkpoints/<step>.",
)
MULTIHOST = flags.DEFINE_bool(
    "multihost",
    False,
    "To train or evaluate with several processes, each started with this: on a TPU pod or under Slurm they find each "
    "other; elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID say where "
    "they are. The workdir must be one that all of them see.",
)
PROFILE = flags.DEFINE_bool(
    "profile",
    False,
    "To train: write a trace of five steps into <workdir>/profile, for TensorBoard's profiler or Perfetto.",
)
REPLAY = flags.DEFINE_string(
    "replay",
    None,
    "A batch that the run in the workdir stopped at, <workdir>/replay/*.npz: its losses and gradients are printed, and "
    "nothing is trained.",
)


def run(
    config: ConfigDict,
    workdir: str | None,
    checkpoint: str | None,
    multihost: bool = False,
    profile: bool = False,
    batch: str | None = None,
) -> None:
    """Runs a config; with `multihost` as one of several processes, with `profile` with a trace of some steps.

    A kept `batch` is computed again instead.

    Raises:
      InputError: something to mend in the command, the config or the data.
      RunStopped: the run cannot go on.
      RunPreempted: SIGTERM came.
    """
    config_check.check(config)
    if config.task == "evaluate":
        if not checkpoint:
            raise InputError("to evaluate, say of which run: --checkpoint=<workdir or checkpoints/<step>>")
        with _all_processes(multihost):
            from vlab_jax.evaluation.checkpoint import evaluate
            from vlab_jax.runtime.profiling import keep_compiled_programs

            keep_compiled_programs()
            evaluate(config, pathlib.Path(checkpoint), pathlib.Path(workdir) if workdir else None)
        return
    if not workdir:
        raise InputError("to train, say where checkpoints and the report go: --workdir=<directory>")
    folder = _made(workdir)
    with _all_processes(multihost):
        _train(config, folder, profile, batch)


@contextlib.contextmanager
def _all_processes(multihost: bool) -> Iterator[None]:
    """With `multihost` joins the other processes; what goes wrong in one then ends all."""
    if not multihost:
        yield
        return
    from vlab_jax.runtime import sharding
    from vlab_jax.runtime.shared_errors import SharedErrors

    sharding.connect()
    if not sharding.is_primary():
        logging.getLogger().setLevel(logging.WARNING)
    with SharedErrors(_ending):
        yield


def _train(config: ConfigDict, folder: pathlib.Path, profile: bool, batch: str | None) -> None:
    import jax  # here, because all this takes seconds: a mistake is named at once

    from vlab_jax.runtime.profiling import keep_compiled_programs, keep_freed_memory
    from vlab_jax.training.loop import train

    keep_compiled_programs()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if batch:
        from vlab_jax.training.health import replay

        print(replay(config, folder, pathlib.Path(batch)))
        return
    train(config, folder, profile)


def _made(workdir: str) -> pathlib.Path:
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--workdir={workdir} cannot be written to; name a directory of your own")
    return folder


def _main(_: Sequence[str]) -> None:
    _log_plainly()
    try:
        run(CONFIG.value, WORKDIR.value, CHECKPOINT.value, MULTIHOST.value, PROFILE.value, REPLAY.value)
    except Exception as error:
        line, status = _ending(error)
        if status == 1:
            raise
        _exit(line, status)


def _ending(error: BaseException) -> tuple[str, int]:
    """The line and the exit status that an error ends the program with; 1: a fault of the program."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, RunStopped):
        return str(error), {CannotWrite: 5, CannotRead: 6}.get(type(error), 3)
    if isinstance(error, RunPreempted):
        return "stopped by SIGTERM; what was trained is saved, and the same command goes on", 4
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from vlab_jax.runtime.disk import cannot_write

        return str(cannot_write(pathlib.Path(error.filename or tempfile.gettempdir()), error)), 5
    return " ".join(f"{type(error).__name__}: {error}".split()), 1


def _exit(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _log_plainly() -> None:
    """Messages without prefix; libraries only where something is wrong."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    # What fails in Orbax's background is raised, and said in a line of its own.
    handler.addFilter(lambda record: not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio")))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("absl", "orbax", "jax", "grain", "tensorflow_datasets", "etils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _parse(arguments: Sequence[str]) -> list[str]:
    """Parses the command line; what is wrong with it is one line."""
    _, *given = arguments
    if any(argument in config_file.HELP for argument in given):
        print(_help())
        sys.exit(0)
    if not given:
        print(_help())
    try:
        config_file.parse(arguments, flags.FLAGS, CONFIG)
    except InputError as error:
        _exit(str(error), 2)
    return list(arguments[:1])


def _help() -> str:
    listed = (CONFIG, WORKDIR, CHECKPOINT, MULTIHOST, PROFILE, REPLAY)
    return config_file.described(__doc__, listed, flags.FLAGS)


def main() -> None:
    """The entry point of `python -m vlab_jax.main`."""
    app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
    main()
