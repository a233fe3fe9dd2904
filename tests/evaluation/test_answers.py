"""Scores of answers: normalisation, closed lists and their ceiling, ties, errors of counts, files of predictions."""

import csv
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.data.schema import Question
from vlab_jax.datasets.text_files import TextFile
from vlab_jax.datasets.tgif import read_tgif_qa
from vlab_jax.datasets.xu_qa import read_xu_qa
from vlab_jax.errors import CannotWrite, InputError
from vlab_jax.evaluation import answers
from vlab_jax.evaluation.answers import count_error, normalise
from vlab_jax.evaluation.registry import lower_is_better
from vlab_jax.runtime import disk

# Words as a model may write them, and what is to be left of each wherever it stands.
FORMS = {
    "Guitar": "guitar",
    "the": "",
    "An": "",
    "a,": "",
    "Two": "2",
    "none": "0",
    "eleven": "eleven",
    "1,000": "1000",
    "2:50": "2:50",
    "time:": "time",
    "1.5": "1.5",
    "U.S.": "us",
    "T-shirt": "t shirt",
    "dont": "don't",
    "Don\u2019t": "don't",
    "its": "its",
    "girl's": "girl's",
    "girls'": "girls",
    "'red'": "red",
    '"blue".': "blue",
    "well...now": "well now",
    "50%!": "50%",
    "\uff2d\uff30\uff13": "mp3",
    "cafe\u0301": "caf\u00e9",
    "?!": "",
}


def asked(*answers: str, **fields) -> list[Question]:
    return [Question(f"question {place}?", answer, **fields) for place, answer in enumerate(answers)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted(FORMS)), max_size=5))
def test_each_word_of_an_answer_is_normalised_on_its_own(words):
    left = [FORMS[word] for word in words if FORMS[word]]
    if left:
        assert normalise(" ".join(words)) == " ".join(left)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=20) | st.text("aA1 ,.:'-\u2019\u0301\u0338theonedt0%_\u00bd\u00b4\u0149\u03a3\u0130", max_size=12)
)
def test_normalising_twice_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once


def test_every_character_that_nfkc_may_take_apart_is_normalised_once_and_for_all():
    # Scripts of Europe and the Near East, symbols, and the compatibility forms; ideographs and syllables stay whole.
    codes = [*range(0x0800), *range(0x1E00, 0x3400), *range(0xF900, 0x10000)]
    characters = [chr(code) for code in codes]
    # Many in one text: a call each would take longer.
    for first in range(0, len(characters), 64):
        once = normalise(" ".join(f"x{c}y{c}" for c in characters[first : first + 64]))
        assert normalise(once) == once


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["man", "two", "t-shirt", "can't", "3.5"]), min_size=1, max_size=4))
def test_case_white_space_articles_and_quotation_marks_do_not_matter(words):
    plain = normalise(" ".join(words))
    assert plain == normalise(" ".join(words).upper())
    assert plain == normalise("\t" + " \n ".join(words) + "  ")
    assert plain == normalise(" ".join(f"the {word}" for word in words))
    assert plain == normalise(f'"The {" ".join(words)}."')


def test_numbers_become_digits_up_to_ten_as_in_vqa():
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert [normalise(word) for word in words] == [str(number) for number in range(11)]


def test_punctuation_within_numbers_and_words_keeps_them_apart_or_whole():
    assert normalise("12,5 , 7,cats") == "125 7 cats"
    assert normalise("half-finished/old") == "half finished old"
    assert normalise(".5 and ..5") == ".5 and 5"
    assert normalise("rock'n'roll") == "rock'n'roll"


def test_an_answer_that_is_nothing_but_articles_stays():
    assert normalise("A") == "a"
    assert normalise("the a.") == "the a"


def test_other_scripts_keep_their_letters():
    assert normalise("\u092d\u093e\u0930\u0924\u0964") == "\u092d\u093e\u0930\u0924"
    assert normalise("\u4e24\u4e2a\u4eba\u3002") == "\u4e24\u4e2a\u4eba"


def test_an_answer_without_anything_is_empty():
    assert [normalise(text) for text in ("", "  ", "?!", "'", "-.-")] == [""] * 5


def test_a_prediction_is_right_if_it_is_the_answer_up_to_normalising():
    predictions = ["Two.", "a guitar", "guitars", "", "?"]
    questions = asked("two", "guitar", "guitar", "guitar", "!")
    assert answers.exact_match(predictions, questions) == [True, True, False, False, False]


def test_no_question_has_no_matches():
    assert answers.exact_match([], []) == []


def test_accuracy_is_split_by_type_and_ends_with_all():
    accuracy = answers.accuracy_by_type([True, False, True, True], ["who", "what", "what", "who"])
    assert accuracy == {"what": 50.0, "who": 100.0, "all": 75.0}
    assert list(accuracy) == ["what", "who", "all"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["what", "who", "how"])), min_size=1, max_size=30))
def test_all_is_the_mean_over_questions_not_over_types(judged):
    correct, types = [right for right, _ in judged], [kind for _, kind in judged]
    accuracy = answers.accuracy_by_type(correct, types)
    assert accuracy["all"] == pytest.approx(100 * sum(correct) / len(correct))
    weighted = sum(accuracy[kind] for kind in types) / len(types)
    assert accuracy["all"] == pytest.approx(weighted)


def test_a_type_called_all_is_refused():
    with pytest.raises(InputError, match="called 'all'"):
        answers.accuracy_by_type([True, False], ["all", "what"])


def test_the_closed_list_is_by_frequency_then_by_alphabet():
    questions = asked("man", "Two", "two", "dog", "cat", "?", "2", "the man")
    assert answers.closed_list(questions, 10)[0] == ("2", "man", "cat", "dog")
    assert answers.closed_list(questions, 3)[0] == ("2", "man", "cat")


def test_spellings_are_the_most_frequent_ones_and_mean_the_same_answers():
    listed, spelled = answers.closed_list(asked("two", "Two", "2", "two", "T-shirt", "t-shirt", "?", ""), 5)
    assert spelled == ("two", "T-shirt") and tuple(map(normalise, spelled)) == listed


@pytest.mark.parametrize("texts", [(), ("", "?")])
def test_a_closed_list_of_nothing_is_refused(texts):
    with pytest.raises(InputError, match=f"none of {len(texts)} questions has an answer"):
        answers.closed_list(asked(*texts), 5)


ANSWERS = st.lists(st.sampled_from(["man", "a man", "Two", "2", "dog", "cat", "?"]), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(ANSWERS, st.integers(1, 8))
def test_the_ceiling_grows_with_the_list_to_all_questions_that_have_an_answer(texts, size):
    questions = asked(*texts)
    if not any(map(normalise, texts)):
        return
    sizes = [answers.closed_list(questions, k)[0] for k in (size, size + 1, 100)]
    ceilings = [answers.ceiling(each, questions) for each in sizes]
    assert ceilings == sorted(ceilings)
    assert ceilings[-1] == pytest.approx(100 * sum(text != "?" for text in texts) / len(texts))
    # No other list of that size reaches more of the questions that it was made from.
    counts = sorted(
        (sum(normalise(text) == form for text in texts) for form in {"man", "2", "dog", "cat"}), reverse=True
    )
    assert ceilings[0] == pytest.approx(100 * sum(counts[:size]) / len(texts))


@settings(max_examples=60, deadline=None)
@given(ANSWERS, ANSWERS)
def test_no_ranking_of_a_list_passes_its_ceiling_and_a_perfect_one_reaches_it(listed, texts):
    questions = asked(*texts)
    wanted = np.array([[normalise(a) == normalise(b) != "" for b in listed] for a in texts])
    # Of entries that mean the same, the first alone scores: texts that differ would tie.
    perfect = np.where(wanted & (np.cumsum(wanted, axis=1) == 1), 1.0, 0.0)
    chosen = answers.by_ranking(perfect, listed)
    right = answers.exact_match(chosen, questions)
    # A question out of reach scores all alike, and a list of one entry has no tie.
    assert 100 * np.mean(right) == pytest.approx(answers.ceiling(listed, questions))


def test_ranking_chooses_the_likeliest_answer_and_none_in_a_tie():
    scores = np.array([[-3.0, -1.0, -2.0], [-1.0, -1.0, -2.0], [-np.inf, -np.inf, -5.0], [-np.inf] * 3], np.float32)
    assert answers.by_ranking(scores, ["man", "two", "dog"]) == ["two", "", "dog", ""]


def test_a_model_that_scores_all_answers_alike_gets_nothing_even_where_one_answer_is_frequent():
    chosen = answers.by_ranking(np.zeros((9, 3)), ["man", "two", "dog"])
    assert not any(answers.exact_match(chosen, asked(*["man"] * 9)))


def test_no_question_is_ranked_to_no_answer():
    assert answers.by_ranking(np.zeros((0, 2)), ["man", "two"]) == []


def test_scores_that_cannot_be_ranked_are_named():
    with pytest.raises(InputError, match="question 1 has a NaN"):
        answers.by_ranking(np.array([[0.0, 1.0], [np.nan, 1.0]]), ["man", "two"])


def choice(answer: str, *options: str) -> Question:
    return Question("what does the man do?", answer, "action", options)


def test_a_tie_chooses_no_option_and_any_number_of_options_is_allowed():
    questions = [choice("run", "jump", "run"), choice("jump", "jump", "run"), choice("sit", "sit", "run", "jump")]
    scores = [np.array([0.1, 0.2]), np.array([0.5, 0.5], np.float32), np.array([-np.inf, -2.0, -3.0])]
    assert answers.chosen_options(scores, questions) == ["run", "", "run"]


def test_a_right_option_that_stands_twice_does_not_tie_with_itself():
    assert answers.chosen_options([np.array([1.0, 0.0, 1.0])], [choice("run", "run", "sit", "run")]) == ["run"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=8), st.data())
def test_an_option_is_right_if_all_others_score_less(rows, data):
    right = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    texts = [tuple(f"option {place}" for place in range(len(row))) for row in rows]
    questions = [choice(options[place], *options) for options, place in zip(texts, right, strict=True)]
    chosen = answers.chosen_options([np.array(row, np.float32) for row in rows], questions)
    hits = [option == question.answer for option, question in zip(chosen, questions, strict=True)]
    assert hits == [all(row[r] > s for i, s in enumerate(row) if i != r) for row, r in zip(rows, right, strict=True)]


@pytest.mark.parametrize(
    ("scores", "questions", "message"),
    [
        ([np.zeros(2)], [choice("fly", "run", "sit")], "the answer 'fly' is not among the options"),
        ([np.zeros(0)], asked("run"), "answer 'run' is not among the options"),
        ([np.array([0.0, np.nan])], [choice("run", "run", "sit")], "question 0 has a NaN"),
    ],
)
def test_a_choice_that_cannot_be_scored_is_named(scores, questions, message):
    with pytest.raises(InputError, match=message):
        answers.chosen_options(scores, questions)


def test_saved_predictions_hold_the_question_and_the_answer_of_each_convention(tmp_path):
    path = tmp_path / "predictions.jsonl"
    questions = [Question("where?", "caf\u00e9\u2028", "where"), choice("run", "run", "sit")]
    predictions = {"generation": ["a Cafe\u0301", "sits"], "ranking": ["", "run"]}
    answers.save_predictions(path, questions, ["video1", "video2"], predictions)
    text = path.read_bytes().decode()
    assert text.endswith("}\n") and "caf\u00e9" in text and "\\u" not in text.replace("\\u2028", "")
    assert [json.loads(line) for line in text.removesuffix("\n").split("\n")] == [
        {
            "clip": "video1",
            "question": "where?",
            "type": "where",
            "answer": "caf\u00e9\u2028",
            "predictions": {
                "generation": {"answer": "a Cafe\u0301", "right": True},
                "ranking": {"answer": "", "right": False},
            },
        },
        {
            "clip": "video2",
            "question": "what does the man do?",
            "type": "action",
            "answer": "run",
            "options": ["run", "sit"],
            "predictions": {
                "generation": {"answer": "sits", "right": False},
                "ranking": {"answer": "run", "right": True},
            },
        },
    ]
    assert os.listdir(path.parent) == [path.name]


def test_half_a_surrogate_pair_is_saved_as_a_json_escape(tmp_path):
    path = tmp_path / "predictions.jsonl"
    answers.save_predictions(path, asked("man"), ["a"], {"generation": ["\ud83d man"]})
    assert json.loads(path.read_text(encoding="utf-8"))["predictions"]["generation"]["answer"] == "\ud83d man"


def test_no_question_makes_an_empty_file(tmp_path):
    answers.save_predictions(tmp_path / "none.jsonl", [], [], {"generation": []})
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
    with pytest.raises(CannotWrite, match=r"cannot be written: No space left on device"):
        answers.save_predictions(path, asked("man"), ["a"], {})
    assert path.read_text() == "old"


def test_the_ceiling_of_the_4000_answers_on_msrvtt_qa_is_the_share_of_answers_in_the_list(assets):
    folder = assets / "annotations" / "msrvtt_qa"
    official = json.loads((folder / "answer_list.json").read_text())
    questions = [question for _, question in read_xu_qa(TextFile(folder / "val_qa.json"))]
    # Answers of MSRVTT-QA are single lower-case words, so that no normalising is needed to find them.
    given = [record["answer"] for record in json.loads((folder / "val_qa.json").read_text())]
    assert len(official) == 4000
    expected = 100 * sum(answer in set(official[:1000]) for answer in given) / len(given)
    assert answers.ceiling(official[:1000], questions) == pytest.approx(expected)
    listed = set(official)
    expected = 100 * sum(answer in listed for answer in given) / len(given)
    assert answers.ceiling(official, questions) == pytest.approx(expected)
    assert 90 < expected < 100


def test_normalising_merges_no_two_answers_of_the_official_files(assets):
    folder = assets / "annotations"
    for questions in (
        read_xu_qa(TextFile(folder / "msrvtt_qa" / "val_qa.json")),
        read_xu_qa(TextFile(folder / "msvd_qa" / "test.csv")),
        read_tgif_qa(TextFile(folder / "tgif_qa" / "Test_frameqa_question.csv"), "frameqa"),
    ):
        official = {question.answer for _, question in questions}
        assert len({normalise(answer) for answer in official}) == len(official)


def test_no_wrong_option_of_tgif_action_is_the_right_one_once_normalised(assets):
    file = TextFile(assets / "annotations" / "tgif_qa" / "Test_action_question.csv")
    for _, question in read_tgif_qa(file, "action"):
        assert [normalise(option) for option in question.options].count(normalise(question.answer)) == 1


ERROR, COUNTS = "QA count MSE", st.integers(0, 20)


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=12))
def test_numbers_are_scored_by_their_mean_squared_error(pairs):
    questions = [Question("how many times?", str(right), "count") for _, right in pairs]
    guesses, right = np.array(pairs).T
    found = count_error([str(guess) for guess in guesses], questions)
    assert found == {ERROR: pytest.approx(np.mean((guesses - right) ** 2.0))} and lower_is_better(ERROR)


def test_number_words_count_and_anything_else_counts_as_zero():
    questions = [Question("", answer, "count") for answer in ("3", "2", "2", "5", "4")]
    assert count_error(["Three.", "two times", "", "123456", "-4"], questions) == {ERROR: (0 + 4 + 4 + 25 + 0) / 5}


def test_questions_of_other_types_have_no_count_error():
    assert count_error(["2", "3"], [Question("", "2", "what"), Question("", "3")]) == {}


def test_always_two_has_the_error_that_the_official_test_file_gives_it(assets):
    with (assets / "annotations" / "tgif_qa" / "Test_count_question.csv").open() as file:
        counts = [int(row["answer"]) for row in csv.DictReader(file, delimiter="\t")]
    questions = [Question("", str(count), "count") for count in counts]
    assert len(counts) == 3554 and max(counts) < 100
    assert count_error(["two"] * 3554, questions)[ERROR] == pytest.approx(np.var(counts) + (np.mean(counts) - 2) ** 2)
