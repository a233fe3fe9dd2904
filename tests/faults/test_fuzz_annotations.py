"""Annotations of any content are accepted, or refused by line, and raise no other exception than `InputError`."""

import json
import os

import fuzz_annotations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlab_jax.datasets.folder import ANNOTATIONS, read_annotations
from vlab_jax.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["video", "id", "start", "end", "captions", "questions", "split", "vidoe"])
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_every_damaged_line_and_file_is_accepted_or_named():
    found = fuzz_annotations.run(600, 110, 7, os.environ.get("VLAB_TEST_ASSETS", ""))
    assert found["findings"] == []
    assert found["lines accepted"] > 60 and found["lines named"] > 60
    assert found["files accepted"] > 10 and found["files refused"] > 10


@QUICK
@given(lines=st.lists(st.dictionaries(FIELDS, JSON, max_size=5).map(json.dumps), max_size=5))
def test_lines_of_any_json_are_accepted_or_named(lines, tmp_path):
    fuzz_annotations.check_folder_lines([line.encode() for line in lines], tmp_path)


@QUICK
@given(content=st.binary(max_size=80))
def test_a_file_of_any_bytes_is_refused_in_a_report(content, tmp_path):
    (tmp_path / ANNOTATIONS).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_annotations(tmp_path)
    assert str(caught.value).startswith(f"folder {str(tmp_path)!r}: ")


def test_the_damage_follows_from_the_seed():
    assert fuzz_annotations.run(40, 11, 3, "") == fuzz_annotations.run(40, 11, 3, "")
