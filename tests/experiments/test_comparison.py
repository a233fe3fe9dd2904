"""Means, standard errors and paired tests of experiments, against SciPy's own and against hand-made cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.comparison import Mean, paired, values

figures = st.floats(0, 100, allow_subnormal=False)


@given(st.lists(figures, min_size=2, max_size=9))
def test_the_standard_error_is_scipy_s(numbers):
    mean = Mean.of(numbers)
    assert mean.value == pytest.approx(np.mean(numbers)) and mean.count == len(numbers)
    assert mean.error == pytest.approx(stats.sem(numbers), abs=1e-9)


def test_one_run_has_no_error_and_none_has_no_mean():
    assert math.isnan(Mean.of([3.0]).error) and str(Mean.of([3.0])) == "3.0"
    assert str(Mean.of([1.0, 3.0])) == "2.0 ± 1.0"
    with pytest.raises(ValueError, match="nothing"):
        Mean.of([])


def test_arms_are_paired_by_seed_and_what_one_lacks_is_left_out():
    one, other = {0: 50.0, 1: 60.0, 2: 55.0, 7: 0.0}, {2: 20.0, 1: 31.0, 0: 18.0, 9: 99.0}
    found = paired(one, other)
    assert found.difference.value == pytest.approx((32 + 29 + 35) / 3) and found.difference.count == 3
    assert found.p == pytest.approx(stats.ttest_1samp([32, 29, 35], 0).pvalue)


def test_equal_differences_and_single_seeds_are_defined():
    assert paired({0: 1.0}, {0: 2.0}) is None
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
    assert paired({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0}).p == 0


def test_the_newest_record_of_a_seed_counts():
    def record(arm, seed, figure):
        return {"arm": arm, "seed": seed, "rows": {"blend (test)": {"QA order": figure}}}

    records = [record("conv", 0, 10.0), record("none", 0, 50.0), record("conv", 0, 20.0), record("conv", 1, 30.0)]
    assert values(records, "conv", "blend (test)", "QA order") == {0: 20.0, 1: 30.0}
    assert values(records, "conv", "blend (test)", "CIDEr") == {}
