"""The error of counts, against NumPy's on numbers, and what is no number."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlab_jax.data.schema import Question
from vlab_jax.evaluation.question_answering import ERROR, count_error
from vlab_jax.evaluation.retrieval import LOWER_IS_BETTER

COUNTS = st.integers(0, 20)


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=12))
def test_numbers_are_scored_by_their_mean_squared_error(pairs):
    questions = [Question("how many times?", str(right), "count") for _, right in pairs]
    guesses, right = np.array(pairs).T
    found = count_error([str(guess) for guess in guesses], questions)
    assert found == {ERROR: pytest.approx(np.mean((guesses - right) ** 2.0))} and ERROR in LOWER_IS_BETTER


def test_words_are_numbers_and_what_is_none_counts_as_zero():
    questions = [Question("", answer, "count") for answer in ("3", "2", "2", "5", "4")]
    assert count_error(["Three.", "two times", "", "123456", "-4"], questions) == {ERROR: (0 + 4 + 4 + 25 + 0) / 5}


def test_other_questions_have_no_such_figure():
    assert count_error(["2", "3"], [Question("", "2", "what"), Question("", "3")]) == {}


def test_always_two_has_the_error_that_the_official_test_file_gives_it(assets):
    with (assets / "annotations" / "tgif_qa" / "Test_count_question.csv").open() as file:
        counts = [int(row["answer"]) for row in csv.DictReader(file, delimiter="\t")]
    questions = [Question("", str(count), "count") for count in counts]
    assert len(counts) == 3554 and max(counts) < 100
    assert count_error(["two"] * 3554, questions)[ERROR] == pytest.approx(np.var(counts) + (np.mean(counts) - 2) ** 2)
