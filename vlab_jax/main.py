"""Trains and evaluates VLAB: runs what a config says.

    python -m vlab_jax.main --config=configs/pretrain.py --workdir=workdir
    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir

The first trains the demo; started again with the same workdir, it goes on where it stopped. A config's docstring says
what it does, what it costs and which arguments it takes (`--config=configs/pretrain.py:l14`); any of its fields can be
set on the command line (`--config.stage.blend.steps=200`).

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command, the config or the data; 3 the run
cannot go on.
"""

import logging
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from vlab_jax import config as configuration
from vlab_jax.errors import InputError, RunStopped

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run, as in configs/pretrain.py:l14.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the report go; a run resumes from what it finds there."
)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "To evaluate: a run's workdir, or one of its checkpoints/<step>.")


def run(config: ConfigDict, workdir: str | None, checkpoint: str | None) -> None:
    """Runs a config.

    Raises:
      InputError: something to mend in the command, the config or the data.
      RunStopped: the run cannot go on.
    """
    configuration.check(config)
    if config.task == "evaluate":
        from vlab_jax.evaluation.checkpoint import evaluate

        if not checkpoint:
            raise InputError("to evaluate, say of which run: --checkpoint=<workdir or checkpoints/<step>>")
        evaluate(config, pathlib.Path(checkpoint), pathlib.Path(workdir) if workdir else None)
        return
    from vlab_jax.training.loop import train

    if not workdir:
        raise InputError("to train, say where checkpoints and the report go: --workdir=<directory>")
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be created: {error.strerror}") from error
    train(config, folder)


def _main(_: Sequence[str]) -> None:
    _log_plainly()
    if CONFIG.value is None:
        _exit("say what to run, as in --config=configs/pretrain.py (see --help)", 2)
    try:
        run(CONFIG.value, WORKDIR.value, CHECKPOINT.value)
    except InputError as error:
        _exit(str(error), 2)
    except RunStopped as error:
        _exit(str(error), 3)


def _exit(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _log_plainly() -> None:
    """Messages without prefix; libraries only where something is wrong."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("absl", "orbax", "jax", "grain", "tensorflow_datasets", "etils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _parse(arguments: Sequence[str]) -> list[str]:
    """Parses the command line; what is wrong with it is one line."""
    try:
        return flags.FLAGS(list(arguments))
    except (flags.Error, InputError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _exit(_explain(error), 2)


def _explain(error: Exception) -> str:
    """One line for what absl and ml_collections say about a flag."""
    text = " ".join(str(error).split())
    unknown = re.search(r"Unknown command line flag 'config\.([\w.]+)'", text)
    return _nearest_field(unknown.group(1)) if unknown else text


def _nearest_field(name: str) -> str:
    return f"unknown config field {name!r}"


def main() -> None:
    """The entry point of `python -m vlab_jax.main`."""
    app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
    main()
