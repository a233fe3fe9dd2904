"""The arithmetic that chooses frames: symmetric, increasing, by time, repeatable."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from vlab_jax.data import sampling
from vlab_jax.errors import InputError


def centre_frames(count: int, num_frames: int, step: float, first: float) -> np.ndarray:
    times = first + step * np.arange(count)
    return sampling.frames_at(sampling.segment_times(first, first + step * count, num_frames), times)


@hypothesis.given(
    count=st.integers(1, 2000),
    num_frames=st.integers(1, 64),
    rate=st.sampled_from([5.0, 10.0, 12.0, 15.0, 23.976, 25.0, 29.97, 30.0, 59.94]),
    first=st.floats(0, 3600),
)
def test_centre_sampling_is_symmetric_under_time_reversal(count, num_frames, rate, first):
    chosen = centre_frames(count, num_frames, 1 / rate, first)
    mirrored = count - 1 - chosen[::-1]
    if num_frames % 2 and count % 2 == 0:  # the middle falls between two frames: no symmetric choice exists
        middle = num_frames // 2
        assert chosen[middle] == count // 2
        chosen, mirrored = np.delete(chosen, middle), np.delete(mirrored, middle)
    np.testing.assert_array_equal(chosen, mirrored)


@hypothesis.given(count=st.integers(1, 500), num_frames=st.integers(1, 64))
def test_centre_sampling_takes_distinct_frames_where_there_are_enough(count, num_frames):
    hypothesis.assume(count >= num_frames)
    assert (np.diff(centre_frames(count, num_frames, 1 / 30, 0.0)) >= 1).all()


def test_centre_on_a_boundary_takes_the_outer_frame():
    assert centre_frames(16, 4, 1 / 30, 0.0).tolist() == [1, 5, 10, 14]


@hypothesis.given(
    start=st.floats(0, 1e4),
    length=st.floats(1e-2, 1e3),
    num_frames=st.integers(1, 64),
    seed=st.integers(0, 99),
)
def test_random_times_stay_in_their_segments_increase_and_repeat_for_a_seed(start, length, num_frames, seed):
    end = start + length
    times = sampling.segment_times(start, end, num_frames, np.random.default_rng(seed))
    borders = np.linspace(start, end, num_frames + 1)
    assert (times >= borders[:-1] - 1e-9).all() and (times <= borders[1:] + 1e-9).all()
    assert (np.diff(times) > 0).all()
    again = sampling.segment_times(start, end, num_frames, np.random.default_rng(seed))
    np.testing.assert_array_equal(times, again)
    assert (times != sampling.segment_times(start, end, num_frames, np.random.default_rng(seed + 1))).any()


@hypothesis.given(
    gaps=st.lists(st.floats(1e-3, 2), min_size=1, max_size=20), times=st.lists(st.floats(-1, 40), max_size=9)
)
def test_frame_at_a_time_is_the_latest_that_has_begun(gaps, times):
    starts = np.cumsum(gaps)
    expected = [max([i for i, t in enumerate(starts) if t <= time], default=0) for time in times]
    assert sampling.frames_at(np.array(times, dtype=np.float64), starts).tolist() == expected


@hypothesis.given(
    count=st.integers(8, 600),
    half=st.integers(1, 8),
    rate=st.sampled_from([12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]),
    first=st.integers(0, 5000),
)
def test_rounded_time_stamps_of_a_constant_rate_sample_symmetrically(count, half, rate, first):
    rounded = np.round(first + 1000 * np.arange(count) / rate) / 1000
    times, step = sampling.even_times(rounded, 0.001)
    assert step == pytest.approx(1 / rate, abs=0.002 / count)
    assert np.abs(times - rounded).max() <= 0.0011
    chosen = sampling.frames_at(sampling.segment_times(times[0], times[-1] + step, 2 * half), times)
    np.testing.assert_array_equal(chosen, count - 1 - chosen[::-1])


@pytest.mark.parametrize("stamps", [[0, 1, 3, 4], [0, 40, 80, 160, 200], [0, 5, 7, 9, 11], [7]])
def test_variable_rates_keep_their_times(stamps):
    times = np.array(stamps, dtype=np.float64)
    kept, step = sampling.even_times(times, 1.0)
    assert step is None
    np.testing.assert_array_equal(kept, times)


def test_missing_time_stamps_are_interpolated_and_continued():
    assert sampling.fill_times([None, 10, None, None, 16, None], 3.0).tolist() == [7, 10, 12, 14, 16, 19]
    assert sampling.fill_times([None, None, None], 2.5).tolist() == [0, 2.5, 5]


@hypothesis.given(num_frames=st.integers(1, 80), num_image_frames=st.integers(1, 80))
def test_image_frames_increase_and_are_symmetric_and_even(num_frames, num_image_frames):
    hypothesis.assume(num_image_frames <= num_frames)
    chosen = sampling.sample_image_frames(num_frames, num_image_frames)
    assert len(chosen) == num_image_frames and min(chosen) >= 0 and max(chosen) < num_frames
    assert all(a < b for a, b in itertools.pairwise(chosen))
    centres = [(i + 0.5) * num_frames / num_image_frames for i in range(num_image_frames)]
    assert all(i <= centre <= i + 1 for i, centre in zip(chosen, centres, strict=True))
    mirrored = [num_frames - 1 - i for i in reversed(chosen)]
    differing = [i for i, (a, b) in enumerate(zip(chosen, mirrored, strict=True)) if a != b]
    allowed = [num_image_frames // 2] if num_image_frames % 2 and num_frames % 2 == 0 else []
    assert differing == allowed


def test_image_frames_of_common_counts():
    assert sampling.sample_image_frames(8, 4) == (0, 2, 5, 7)
    assert sampling.sample_image_frames(8, 1) == (4,)
    assert sampling.sample_image_frames(4, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("counts", [(4, 5), (4, 0), (0, 0)])
def test_impossible_image_frames_are_input_errors(counts):
    with pytest.raises(InputError, match="num_"):
        sampling.sample_image_frames(*counts)
