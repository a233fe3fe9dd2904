"""Scores of video question answering: pure functions of answers and likelihoods, no model.

Open-ended answers are right by exact match after `normalise`: a question of a video QA set has one answer, so VQA's
vote of ten annotators has no counterpart. An answer of which normalising leaves nothing is never right.

Ties are broken pessimistically, as in `retrieval`: where two different answers share the highest score, none is
chosen. A model that scores everything alike so gets nothing, and not the share of the most frequent answer. Scores
in bfloat16 tie often: compute them in float32.

Letters in shapes: `Q` questions, `A` answers of a closed list.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlab_jax.data.schema import Question
from vlab_jax.errors import InputError
from vlab_jax.evaluation import retrieval
from vlab_jax.runtime.disk import cannot_write, number_of

# FOLDED vlab_jax/evaluation/question_answering.py: The form in which open-ended answers are compared: the
# normalisation of VQA's evaluation.  Source: VQA (Antol et al., ICCV 2015), whose steps
# visualqa.org/evaluation.html lists and `vqaEval.py` computes. Where the two differ, the list is followed: the code
# judges a comma or a hyphen by the whole answer, not by its place.

_ARTICLES = frozenset(("a", "an", "the"))
# As far as VQA goes.
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Without those that are another word once the apostrophe is gone: its, well, were, hell, shell, ill, id, wed, lets.
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't "
    "shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i'm i've you're you've "
    "you'll we've they're they've they'll they'd he's she's it'll that's that'll there's here's what's where's who's "
    "how's ma'am o'clock y'all"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
# The last is one character in Unicode, which NFKC takes apart into an apostrophe of this kind and a letter.
_APOSTROPHES = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"), "\u0149": "'n"})


def normalise(answer: str) -> str:
    """The form in which answers are compared, such as `2 t shirts` for "The two T-shirts."; idempotent.

    In this order; a step that VQA lacks says so.

    1. Typographic apostrophes become `'`, and the text Unicode's NFKC (VQA has neither); then it is lower-cased.
    2. A comma between digits goes: 1,000 is 1000. A colon between digits stays: 2:50. (VQA lets every colon stay.)
    3. All other punctuation becomes a space, but for points, apostrophes and `% & #`.
    4. A point stays before a digit (1.5) and else goes: u.s. is us. (Several on end are a space, unlike in VQA.)
    5. An apostrophe stays within a word, so that girl's is not girls; quotation marks go. (VQA lets them stay.)
    6. Number words up to ten become digits, and "none" becomes 0.
    7. A contraction without its apostrophe gets it: dont is don't.
    8. The articles a, an, the go, unless there is nothing else, such as the letter A. (VQA leaves nothing.)
    9. One space stays between words, none around them.
    """
    text = unicodedata.normalize("NFKC", answer.translate(_APOSTROPHES)).lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d):|:(?!\d)|\.{2,}", " ", text)
    text = "".join(" " if _is_punctuation(character) else character for character in text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", "", text)
    # Once more: what went may have stood between a letter and its accent.
    words = unicodedata.normalize("NFKC", text).split()
    words = [_CONTRACTIONS.get(word, _NUMBERS.get(word, word)) for word in words]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _is_punctuation(character: str) -> bool:
    if character in "%&#.':":
        return False
    return character in "=+<>`~^|" or unicodedata.category(character).startswith("P")


def exact_match(predictions: Sequence[str], questions: Sequence[Question]) -> list[bool]:
    """Whether each prediction is the answer, both normalised; an empty prediction is wrong.

    Raises:
        InputError: there are more or fewer predictions than questions.
    """
    _check_lengths("predictions", predictions, questions)
    pairs = [(normalise(p), normalise(q.answer)) for p, q in zip(predictions, questions, strict=True)]
    return [bool(predicted) and predicted == answer for predicted, answer in pairs]


def accuracy_by_type(correct: Sequence[bool], types: Sequence[str]) -> dict[str, float]:
    """Percent (0 to 100) of right answers by question type, types in alphabetical order, and over `all` at the end.

    Raises:
        InputError: no question, lengths differ, or a type is called `all`.
    """
    _check_lengths("judgements", correct, types)
    if not types:
        raise InputError("no question to answer: accuracy is undefined; check the split and the types asked for")
    if "all" in types:
        raise InputError("a question type is called 'all', which is the name of the mean over types; rename it")
    # To `by_type`, a judged answer is a choice between right and wrong that has been made.
    judged = [(float(right), float(not right)) for right in correct]
    return {**retrieval.by_type(judged, [0] * len(judged), types), "all": 100.0 * float(np.mean(correct))}


def answer_list(questions: Sequence[Question], size: int) -> tuple[str, ...]:
    """The closed list: the `size` most frequent answers, normalised, most frequent first.

    Answers of one frequency stand in alphabetical order; there may be fewer than `size`. What a model is to score
    is their `spellings`.

    Args:
        questions: those trained on; of other splits the list would know what it must not.

    Raises:
        InputError: `size` is less than 1, no question, or none with an answer.
    """
    if size < 1:
        raise InputError(f"the size of the answer list is {size}; it must be 1 or more")
    counts = collections.Counter(normalise(question.answer) for question in questions)
    del counts[""]
    if not counts:
        raise InputError(f"none of {len(questions)} questions has an answer: there is no answer list; check the split")
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:size])


def spellings(answers: Sequence[str], questions: Sequence[Question]) -> tuple[str, ...]:
    """Each answer of a list as `questions` most often spell it (`two` for `2`), else as it is.

    A model trained on these spellings gives them its likelihood, and hardly any to the normalised forms.

    Args:
        answers: normalised, as `answer_list` returns them.
        questions: those trained on.
    """
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in questions:
        found[normalise(question.answer)][question.answer] += 1
    best = {answer: min(counts, key=lambda text: (-counts[text], text)) for answer, counts in found.items()}
    return tuple(best.get(answer, answer) for answer in answers)


def ceiling(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Percent (0 to 100) of questions whose answer is in a list: the best that ranking the list can reach.

    Args:
        answers: a closed list, normalised or not.
        questions: those to be answered; one with an empty answer is out of reach.

    Raises:
        InputError: no question, or no answer in the list.
    """
    if not questions:
        raise InputError("no question to answer: the ceiling of an answer list is undefined; check the split")
    if not answers:
        raise InputError("the answer list is empty; give at least one answer")
    reachable = {normalise(answer) for answer in answers} - {""}
    return 100.0 * float(np.mean([normalise(question.answer) in reachable for question in questions]))


def by_ranking(scores: Float[np.ndarray, "Q A"], answers: Sequence[str]) -> list[str]:
    """The answer of highest score for each question; the empty text, which is never right, where several tie.

    Args:
        scores: higher is likelier; -inf is allowed, NaN is not.
        answers: the text of each column.

    Raises:
        InputError: a score is NaN, columns are not as many as answers, or there are none.
    """
    if scores.shape[1] != len(answers):
        raise InputError(
            f"questions have {scores.shape[1]} scores each, but the answer list has {len(answers)} answers"
        )
    return [_highest(row, answers, place) for place, row in enumerate(scores)]


def chosen_options(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> list[str]:
    """The option of highest score for each question; the empty text, which is never right, where several tie.

    Options of the same text are one.

    Args:
        scores: per question, one score per option; higher is likelier; -inf is allowed, NaN is not.
        questions: with options, of which the answer is one; numbers of options may differ.

    Raises:
        InputError: lengths differ, a score is NaN, or a question's answer is not among its options.
    """
    _check_lengths("lists of scores", scores, questions)
    for place, (row, question) in enumerate(zip(scores, questions, strict=True)):
        if row.shape != (len(question.options),):
            raise InputError(f"question {place} has {len(question.options)} options, but scores of shape {row.shape}")
        if question.answer not in question.options:
            raise InputError(f"question {place}: the answer {question.answer!r} is not among the options; add it")
    return [_highest(row, q.options, place) for place, (row, q) in enumerate(zip(scores, questions, strict=True))]


def _highest(scores: np.ndarray, texts: Sequence[str], question: int) -> str:
    if not len(texts):
        raise InputError(f"question {question} has no answer to choose from; give at least one")
    if np.isnan(highest := scores.max()):
        raise InputError(f"question {question} has a NaN among its scores; the model or its input is not finite")
    best = {texts[place] for place in np.flatnonzero(scores == highest)}
    return best.pop() if len(best) == 1 else ""


def multiple_choice(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> list[bool]:
    """Whether the right option of each question scores above all others; a tie is wrong.

    It is `retrieval.multiple_choice_hits` for questions with texts, where the right option may occur twice.
    Arguments and errors are those of `chosen_options`.
    """
    chosen = chosen_options(scores, questions)
    return [option == question.answer and option != "" for option, question in zip(chosen, questions, strict=True)]


def save_predictions(
    path: str | os.PathLike[str],
    questions: Sequence[Question],
    clip_ids: Sequence[str],
    predictions_by_convention: Mapping[str, Sequence[str]],
) -> None:
    """Writes a JSON object per line and question, in one move: a kill leaves the old file or the new one.

    A line is `{"clip": "video7010", "question": ..., "type": ..., "answer": ..., "predictions": {"generation":
    {"answer": "a guitar", "right": true}}}`, with `options` where the question has some; UTF-8, no escapes.

    Args:
        path: its folder is made if missing.
        clip_ids: the clip of each question.
        predictions_by_convention: answers by the name of the way they were obtained (generation, ranking).

    Raises:
        InputError: lengths differ, or the file cannot be there.
        CannotWrite: the disk is full or read-only.
    """
    path = pathlib.Path(path)
    _check_lengths("clip ids", clip_ids, questions)
    for convention, predictions in predictions_by_convention.items():
        _check_lengths(f"predictions by {convention}", predictions, questions)
    temporary = path.parent / f"{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # JSON can escape half of a surrogate pair, which UTF-8 cannot hold.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for record in _records(questions, clip_ids, predictions_by_convention):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if number_of(error) is not None:
            raise cannot_write(path, error) from error
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place for it") from error


def _records(
    questions: Sequence[Question], clip_ids: Sequence[str], predictions_by_convention: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    right = {name: exact_match(predictions, questions) for name, predictions in predictions_by_convention.items()}
    for place, (clip, asked) in enumerate(zip(clip_ids, questions, strict=True)):
        record = {"clip": clip, "question": asked.question, "type": asked.type, "answer": asked.answer}
        if asked.options:
            record["options"] = list(asked.options)
        record["predictions"] = {
            name: {"answer": predictions[place], "right": right[name][place]}
            for name, predictions in predictions_by_convention.items()
        }
        yield record


def _check_lengths(what: str, values: Sequence, questions: Sequence) -> None:
    if len(values) != len(questions):
        raise InputError(f"there are {len(values)} {what} for {len(questions)} questions; give one for each")


# FOLDED vlab_jax/evaluation/question_answering.py: How far counts are from right: what TGIF-QA's task `count` is reported by
# (Jang et al., CVPR 2017).

COUNT, ERROR = "count", "QA count MSE"


def count_error(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """The mean squared error of the questions of type `count`, as `QA count MSE`; nothing where there is none.

    A prediction is the number that it is after normalising ("three" is 3). One that is no number counts as 0: published
    models put out a number always, so that this can only count against a model of words.
    """
    errors = [
        (_number(prediction) - _number(question.answer)) ** 2
        for prediction, question in zip(predictions, questions, strict=True)
        if question.type == COUNT
    ]
    return {ERROR: float(np.mean(errors))} if errors else {}


def _number(text: str) -> int:
    words = normalise(text)
    # No count of TGIF-QA has three digits; more would let one slip decide the mean.
    return int(words) if words.isdecimal() and words.isascii() and len(words) < 3 else 0
