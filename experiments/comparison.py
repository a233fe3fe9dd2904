"""Statistics of a grid's records: means with standard errors, and paired tests of two arms."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of `count` values and its standard error (nan for a single value)."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """The mean of some values.

        Raises:
          ValueError: there are no values.
        """
        array = np.asarray(list(values), np.float64)
        if not array.size:
            raise ValueError("a mean of nothing")
        error = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
        return cls(float(array.mean()), error, array.size)

    def __str__(self) -> str:
        return f"{self.value:.1f}" if math.isnan(self.error) else f"{self.value:.1f} ± {self.error:.1f}"


@dataclasses.dataclass(frozen=True)
class Paired:
    """The mean difference of two arms on the seeds that both have, and the p-value of a paired t-test."""

    difference: Mean
    p: float


def values(records: Iterable[Mapping[str, Any]], arm: str, row: str, figure: str) -> dict[int, float]:
    """An arm's recorded values of one score, by seed; the newest record of a seed counts."""
    found = {}
    for record in records:
        given = record["rows"].get(row, {}).get(figure)
        if record["arm"] == arm and given is not None:
            found[record["seed"]] = float(given)
    return found


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """The difference of two arms over their common seeds; None for fewer than two seeds.

    The p-value is that of the two-sided paired t-test; if all differences are equal it is 0, or 1 if they are 0.
    """
    seeds = sorted(set(one) & set(other))
    if len(seeds) < 2:
        return None
    differences = [one[seed] - other[seed] for seed in seeds]
    if np.ptp(differences) == 0:
        return Paired(Mean.of(differences), float(differences[0] == 0))
    test = stats.ttest_rel([one[seed] for seed in seeds], [other[seed] for seed in seeds])
    return Paired(Mean.of(differences), float(test.pvalue))
