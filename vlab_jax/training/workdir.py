"""What a run finds in its workdir when it is started again."""

import json
import pathlib
from typing import Any

from vlab_jax import config as configuration
from vlab_jax.errors import InputError
from vlab_jax.runtime.checkpoint import CONFIG, Checkpoints

RESULTS = "results.json"


def check_workdir(checkpoints: Checkpoints, saved: dict[str, Any]) -> None:
    """Refuses a workdir whose checkpoint belongs to another config, naming the fields that differ.

    A field that the package did not have yet when the checkpoint was saved is at its default there.
    """
    latest = checkpoints.latest()
    if latest is None:
        return
    changed = configuration.differences(configuration.with_defaults(checkpoints.read_json(latest, CONFIG)), saved)
    if changed:
        raise InputError(
            f"{checkpoints.directory.parent} holds a run of another config; use another --workdir, or set back: "
            + "; ".join(changed)
        )


def read_results(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """The figures that a run has written so far."""
    path = workdir / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}
