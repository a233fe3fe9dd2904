"""How videos are cut: nothing is lost, windows are about as long as asked, and of overlapping hits one stays."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.errors import InputError
from vlab_jax.inference.windows import Window, best_apart, overlap, split

SECONDS = st.floats(0.04, 120)


@settings(deadline=None)
@given(begin=st.floats(0, 100), length=SECONDS, window=st.floats(0.5, 60), share=st.floats(0.1, 1))
def test_windows_cover_the_video_without_gaps_in_order(begin, length, window, share):
    windows = split(begin, begin + length, window, window * share)
    assert windows[0].start == begin and windows[-1].end == begin + length
    for one, other in itertools.pairwise(windows):
        assert one.start < other.start <= one.end + 1e-5


@settings(deadline=None)
@given(length=SECONDS, window=st.floats(0.5, 60), share=st.floats(0.1, 1))
def test_windows_are_half_to_one_and_a_half_times_as_long_as_asked_and_whole_ones_exactly_so(length, window, share):
    windows = split(0.0, length, window, window * share)
    if length < window:
        assert windows == [Window(0.0, length)]
        return
    assert all(abs(each.end - each.start - window) < 1e-6 for each in windows[:-1])
    assert 0.5 * window - 1e-4 <= windows[-1].end - windows[-1].start < 1.5 * window + 1e-4


@pytest.mark.parametrize(
    ("length", "window", "stride", "cuts"),
    [
        (30, 10, 10, [(0, 10), (10, 20), (20, 30)]),
        (34, 10, 10, [(0, 10), (10, 20), (20, 34)]),
        (36, 10, 10, [(0, 10), (10, 20), (20, 30), (30, 36)]),
        (17, 10, 5, [(0, 10), (5, 15), (10, 17)]),
        (0.04, 10, 10, [(0, 0.04)]),
    ],
)
def test_the_rest_of_a_video_is_a_window_where_it_is_half_of_one(length, window, stride, cuts):
    assert split(0, length, window, stride) == cuts


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (-1, 1), (10, 0), (float("inf"), 1), (float("nan"), 1), (5, 6)])
def test_a_cut_that_would_lose_something_is_refused(window, stride):
    with pytest.raises(InputError):
        split(0, 100, window, stride)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.integers(1, 10)), max_size=30))
def test_of_hits_that_overlap_the_best_stays_and_what_went_overlaps_a_better_one(found):
    hits = [(file, Window(start, start + length)) for file, start, length in found]
    kept = best_apart(hits, lambda hit: hit)
    for number, (file, window) in enumerate(kept):
        assert not any(other == file and overlap(window, shown) for other, shown in kept[:number])
    for file, window in hits:
        assert any(other == file and overlap(window, shown) for other, shown in kept)
    assert kept[:1] == hits[:1]
