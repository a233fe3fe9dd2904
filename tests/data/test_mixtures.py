"""The spelling of a mixture: weights, and what only looks like one."""

import pytest

from vlab_jax.data import sources
from vlab_jax.errors import InputError


@pytest.mark.parametrize(
    ("entries", "mixture"),
    [
        (("motion",), [("motion", 1.0)]),
        (("motion@0.7", "folder:/a/b@3e-1"), [("motion", 0.7), ("folder:/a/b", 0.3)]),
        (("folder:/mail/me@home/clips",), [("folder:/mail/me@home/clips", 1.0)]),
        (("folder:/mail/me@home/clips@2",), [("folder:/mail/me@home/clips", 2.0)]),
    ],
)
def test_a_mixture_is_spelled_with_weights_behind_an_at_sign(entries, mixture):
    assert sources.parse_mixture(entries) == mixture


def test_a_directory_whose_name_ends_like_a_weight_is_a_directory_where_it_is_there(tmp_path):
    spec = f"folder:{tmp_path}/clips@2024"
    assert sources.parse_mixture([spec]) == [(f"folder:{tmp_path}/clips", 2024.0)]
    (tmp_path / "clips@2024").mkdir()
    assert sources.parse_mixture([spec, f"{spec}@0.5"]) == [(spec, 1.0), (spec, 0.5)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), r"^no data set to train on; name one, as in data\.train=\('motion',\)$"),
        (("motion@0",), r"^the weight of data set 'motion@0' must be positive and finite$"),
        (("motion", "motion/still@-1"), r"'motion/still@-1' must be positive"),
        (("motion@nan",), r"'motion@nan' must be positive"),
        (("motion@inf",), r"'motion@inf' must be positive"),
    ],
)
def test_a_mixture_without_data_or_positive_weights_is_refused(entries, message):
    with pytest.raises(InputError, match=message):
        sources.parse_mixture(entries)
