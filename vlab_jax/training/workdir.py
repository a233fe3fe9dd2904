"""What a run finds in its workdir when it is started again."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vlab_jax import config as configuration
from vlab_jax.errors import InputError
from vlab_jax.runtime.checkpoint import CONFIG, Checkpoints
from vlab_jax.training.config_differences import differences

RESULTS = "results.json"


def check_workdir(checkpoints: Checkpoints, saved: dict[str, Any]) -> None:
    """Refuses a workdir whose checkpoint belongs to another config, naming the fields that differ.

    A field that the package did not have yet when the checkpoint was saved is at its default there.
    """
    latest = checkpoints.latest()
    if latest is None:
        return
    changed = differences(_with_defaults(checkpoints.read_json(latest, CONFIG)), saved)
    if changed:
        raise InputError(
            f"{checkpoints.directory.parent} holds a run of another config; use another --workdir, or set back: "
            + "; ".join(changed)
        )


def _with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved training config (plain, as from JSON) with the fields that the package got later, at their defaults."""
    defaults = configuration.plain(configuration.training_config().to_dict())
    defaults["stage"] = {name: configuration.plain(configuration.stage_config().to_dict()) for name in saved["stage"]}
    return _filled(saved, defaults)


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **given}
    both = [key for key in given if isinstance(given[key], Mapping) and isinstance(defaults.get(key), Mapping)]
    return filled | {key: _filled(given[key], defaults[key]) for key in both}


def read_results(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """The figures that a run has written so far."""
    path = workdir / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}
