"""Scores of question answering: normalisation, closed lists and their ceiling, ties, files of predictions."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.data.schema import Question
from vlab_jax.datasets.annotations import read_qa_csv, read_qa_json, read_tgif_qa
from vlab_jax.errors import CannotWrite, InputError
from vlab_jax.evaluation import question_answering, retrieval
from vlab_jax.evaluation.question_answering import normalise

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
    assert question_answering.exact_match(predictions, questions) == [True, True, False, False, False]


def test_no_question_has_no_matches():
    assert question_answering.exact_match([], []) == []


def test_accuracy_is_split_by_type_and_ends_with_all():
    accuracy = question_answering.accuracy_by_type([True, False, True, True], ["who", "what", "what", "who"])
    assert accuracy == {"what": 50.0, "who": 100.0, "all": 75.0}
    assert list(accuracy) == ["what", "who", "all"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["what", "who", "how"])), min_size=1, max_size=30))
def test_all_is_the_mean_over_questions_not_over_types(judged):
    correct, types = [right for right, _ in judged], [kind for _, kind in judged]
    accuracy = question_answering.accuracy_by_type(correct, types)
    assert accuracy["all"] == pytest.approx(100 * sum(correct) / len(correct))
    weighted = sum(accuracy[kind] for kind in types) / len(types)
    assert accuracy["all"] == pytest.approx(weighted)


@pytest.mark.parametrize(
    ("correct", "types", "message"),
    [
        ([], [], "no question"),
        ([True], ["who", "what"], "1 judgements for 2 questions"),
        ([True, False], ["all", "what"], "called 'all'"),
    ],
)
def test_accuracy_that_is_undefined_is_refused_in_one_line(correct, types, message):
    with pytest.raises(InputError, match=message) as caught:
        question_answering.accuracy_by_type(correct, types)
    assert "\n" not in str(caught.value)


def test_the_answer_list_is_by_frequency_then_by_alphabet():
    questions = asked("man", "Two", "two", "dog", "cat", "?", "2", "the man")
    assert question_answering.answer_list(questions, 10) == ("2", "man", "cat", "dog")
    assert question_answering.answer_list(questions, 3) == ("2", "man", "cat")


@pytest.mark.parametrize(
    ("questions", "size", "message"),
    [(asked("man"), 0, "is 0; it must be 1 or more"), ([], 5, "none of 0"), (asked("", "?"), 5, "none of 2 questions")],
)
def test_an_answer_list_of_nothing_is_refused(questions, size, message):
    with pytest.raises(InputError, match=message):
        question_answering.answer_list(questions, size)


def test_spellings_are_the_most_frequent_ones_and_mean_the_same_answers():
    questions = asked("two", "Two", "2", "two", "T-shirt", "t-shirt")
    answers = question_answering.answer_list(questions, 5)
    spelled = question_answering.spellings([*answers, "unseen"], questions)
    assert spelled == ("two", "T-shirt", "unseen")
    assert tuple(map(normalise, spelled)) == (*answers, "unseen")


ANSWERS = st.lists(st.sampled_from(["man", "a man", "Two", "2", "dog", "cat", "?"]), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(ANSWERS, st.integers(1, 8))
def test_the_ceiling_grows_with_the_list_to_all_questions_that_have_an_answer(answers, size):
    questions = asked(*answers)
    if not any(map(normalise, answers)):
        return
    sizes = [question_answering.answer_list(questions, k) for k in (size, size + 1, 100)]
    ceilings = [question_answering.ceiling(each, questions) for each in sizes]
    assert ceilings == sorted(ceilings)
    assert ceilings[-1] == pytest.approx(100 * sum(answer != "?" for answer in answers) / len(answers))
    # No other list of that size reaches more of the questions that it was made from.
    counts = sorted((sum(normalise(a) == form for a in answers) for form in {"man", "2", "dog", "cat"}), reverse=True)
    assert ceilings[0] == pytest.approx(100 * sum(counts[:size]) / len(answers))


@settings(max_examples=60, deadline=None)
@given(ANSWERS, ANSWERS)
def test_no_ranking_of_a_list_passes_its_ceiling_and_a_perfect_one_reaches_it(listed, answers):
    questions = asked(*answers)
    wanted = np.array([[normalise(a) == normalise(b) != "" for b in listed] for a in answers])
    # Of entries that mean the same, the first alone scores: texts that differ would tie.
    perfect = np.where(wanted & (np.cumsum(wanted, axis=1) == 1), 1.0, 0.0)
    chosen = question_answering.by_ranking(perfect, listed)
    right = question_answering.exact_match(chosen, questions)
    # A question out of reach scores all alike, and a list of one entry has no tie.
    assert 100 * np.mean(right) == pytest.approx(question_answering.ceiling(listed, questions))


@pytest.mark.parametrize(
    ("answers", "questions", "message"), [(["man"], [], "no question"), ([], asked("man"), "list")]
)
def test_a_ceiling_that_is_undefined_is_refused(answers, questions, message):
    with pytest.raises(InputError, match=message):
        question_answering.ceiling(answers, questions)


def test_ranking_chooses_the_likeliest_answer_and_none_in_a_tie():
    scores = np.array([[-3.0, -1.0, -2.0], [-1.0, -1.0, -2.0], [-np.inf, -np.inf, -5.0], [-np.inf] * 3], np.float32)
    assert question_answering.by_ranking(scores, ["man", "two", "dog"]) == ["two", "", "dog", ""]


def test_a_model_that_scores_all_answers_alike_gets_nothing_even_where_one_answer_is_frequent():
    chosen = question_answering.by_ranking(np.zeros((9, 3)), ["man", "two", "dog"])
    assert not any(question_answering.exact_match(chosen, asked(*["man"] * 9)))


def test_no_question_is_ranked_to_no_answer():
    assert question_answering.by_ranking(np.zeros((0, 2)), ["man", "two"]) == []


@pytest.mark.parametrize(
    ("scores", "answers", "message"),
    [
        (np.zeros((2, 3)), ["man"], "3 scores each, but the answer list has 1"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), ["man", "two"], "question 1 has a NaN"),
        (np.zeros((1, 0)), [], "question 0 has no answer to choose from"),
    ],
)
def test_scores_that_cannot_be_ranked_are_named(scores, answers, message):
    with pytest.raises(InputError, match=message):
        question_answering.by_ranking(scores, answers)


def choice(answer: str, *options: str) -> Question:
    return Question("what does the man do?", answer, "action", options)


def test_multiple_choice_counts_ties_as_wrong_and_takes_any_number_of_options():
    questions = [choice("run", "jump", "run"), choice("jump", "jump", "run"), choice("sit", "sit", "run", "jump")]
    scores = [np.array([0.1, 0.2]), np.array([0.5, 0.5], np.float32), np.array([-np.inf, -2.0, -3.0])]
    assert question_answering.multiple_choice(scores, questions) == [True, False, False]
    assert question_answering.chosen_options(scores, questions) == ["run", "", "run"]


def test_a_right_option_that_stands_twice_does_not_tie_with_itself():
    assert question_answering.multiple_choice([np.array([1.0, 0.0, 1.0])], [choice("run", "run", "sit", "run")]) == [
        True
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=8), st.data())
def test_multiple_choice_agrees_with_that_of_retrieval(rows, data):
    right = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    texts = [tuple(f"option {place}" for place in range(len(row))) for row in rows]
    questions = [choice(options[place], *options) for options, place in zip(texts, right, strict=True)]
    hits = question_answering.multiple_choice([np.array(row, np.float32) for row in rows], questions)
    assert hits == retrieval.multiple_choice_hits(rows, right).tolist()


@pytest.mark.parametrize(
    ("scores", "questions", "message"),
    [
        ([np.zeros(2)], [], "1 lists of scores for 0 questions"),
        ([np.zeros(3)], [choice("run", "run", "sit")], r"question 0 has 2 options, but scores of shape \(3,\)"),
        ([np.zeros(2)], [choice("fly", "run", "sit")], "the answer 'fly' is not among the options"),
        ([np.zeros(0)], asked("run"), "answer 'run' is not among the options"),
        ([np.array([0.0, np.nan])], [choice("run", "run", "sit")], "question 0 has a NaN"),
    ],
)
def test_a_choice_that_cannot_be_scored_is_named(scores, questions, message):
    with pytest.raises(InputError, match=message):
        question_answering.multiple_choice(scores, questions)


def test_saved_predictions_say_what_was_asked_and_what_each_convention_made_of_it(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    questions = [Question("where?", "caf\u00e9\u2028", "where"), choice("run", "run", "sit")]
    predictions = {"generation": ["a Cafe\u0301", "sits"], "ranking": ["", "run"]}
    question_answering.save_predictions(path, questions, ["video1", "video2"], predictions)
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


def test_half_a_surrogate_pair_is_saved_as_json_can_say_it(tmp_path):
    path = tmp_path / "predictions.jsonl"
    question_answering.save_predictions(path, asked("man"), ["a"], {"generation": ["\ud83d man"]})
    assert json.loads(path.read_text(encoding="utf-8"))["predictions"]["generation"]["answer"] == "\ud83d man"


def test_no_question_makes_an_empty_file(tmp_path):
    question_answering.save_predictions(tmp_path / "none.jsonl", [], [], {"generation": []})
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(question_answering.os, "replace", full)
    with pytest.raises(CannotWrite, match=r"cannot be written: No space left on device"):
        question_answering.save_predictions(path, asked("man"), ["a"], {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "predictions.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be written"):
            question_answering.save_predictions(path, asked("man"), ["a"], {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("clips", "predictions", "message"),
    [([], {}, "0 clip ids for 1 questions"), (["a"], {"ranking": ["b", "c"]}, "2 predictions by ranking for 1")],
)
def test_predictions_of_another_length_are_refused_before_anything_is_written(tmp_path, clips, predictions, message):
    with pytest.raises(InputError, match=message):
        question_answering.save_predictions(tmp_path / "p.jsonl", asked("man"), clips, predictions)
    assert not os.listdir(tmp_path)


def test_the_ceiling_of_the_4000_answers_on_msrvtt_qa_is_the_share_of_answers_in_the_list(assets):
    folder = assets / "annotations" / "msrvtt_qa"
    answers = json.loads((folder / "answer_list.json").read_text())
    questions = [question for _, question in read_qa_json(folder / "val_qa.json")]
    # Answers of MSRVTT-QA are single lower-case words, so that no normalising is needed to find them.
    given = [record["answer"] for record in json.loads((folder / "val_qa.json").read_text())]
    assert len(answers) == 4000
    expected = 100 * sum(answer in set(answers[:1000]) for answer in given) / len(given)
    assert question_answering.ceiling(answers[:1000], questions) == pytest.approx(expected)
    listed = set(answers)
    expected = 100 * sum(answer in listed for answer in given) / len(given)
    assert question_answering.ceiling(answers, questions) == pytest.approx(expected)
    assert 90 < expected < 100


def test_normalising_merges_no_two_answers_of_the_official_files(assets):
    folder = assets / "annotations"
    for questions in (
        read_qa_json(folder / "msrvtt_qa" / "val_qa.json"),
        read_qa_csv(folder / "msvd_qa" / "test.csv"),
        read_tgif_qa(folder / "tgif_qa" / "Test_frameqa_question.csv", "frameqa"),
    ):
        answers = {question.answer for _, question in questions}
        assert len({normalise(answer) for answer in answers}) == len(answers)


def test_no_wrong_option_of_tgif_action_is_the_right_one_once_normalised(assets):
    for _, question in read_tgif_qa(assets / "annotations" / "tgif_qa" / "Test_action_question.csv", "action"):
        assert [normalise(option) for option in question.options].count(normalise(question.answer)) == 1
