"""What a run finds in its workdir when it is started again."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vlab_jax import config as configuration
from vlab_jax.errors import InputError
from vlab_jax.runtime.checkpoint import CONFIG, Checkpoints

# FOLDED vlab_jax/training/workdir.py: In what two configs differ, as far as it matters: whether a run
# may go on, and whether two runs compute the same.

# What may change between a checkpoint and the run that resumes from it: how it runs, not what it computes.
FREE_ON_RESUME = (
    "data.directory",
    "data.manual_dir",
    "data.workers",
    "data.prefetch_gigabytes",
    "data.max_failed_share",
    "data.limits",
    "data.retry_seconds",
    "checkpoint.every",
    "checkpoint.keep",
    "log_every",
    "most_skipped",
    "attention",
    "mesh",
    "stop_after",
    "report",
)


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configs differ, as `name: saved → given`, without those that are free on resume."""
    lines = []
    for key in dict.fromkeys([*saved, *given]):
        name = f"{prefix}{key}"
        if any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME):
            continue
        old, new = saved.get(key), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: {old!r} → {new!r}")
    return lines


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
