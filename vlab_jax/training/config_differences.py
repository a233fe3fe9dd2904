"""In what two configs differ, as far as it matters: whether a run may go on, and whether two runs compute the same."""

from collections.abc import Mapping
from typing import Any

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
