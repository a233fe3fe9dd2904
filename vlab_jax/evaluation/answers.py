"""Scores of answers to questions: pure functions of texts and likelihoods, no model.

An open-ended answer is right if it equals the question's answer after `normalise`: a question of a video QA set has one
answer, so VQA's vote of ten annotators has no counterpart. An answer that normalises to nothing is never right.

Ties are broken pessimistically: if two different answers share the highest score, none is chosen. So a model that
scores everything alike gets nothing, and not the share of the most frequent answer. Scores in bfloat16 tie often:
compute them in float32.
"""

import collections
import functools
import json
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from vlab_jax.data.schema import Question
from vlab_jax.errors import InputError
from vlab_jax.runtime.disk import write_text

# The normalisation of VQA's evaluation (Antol et al., ICCV 2015), whose steps visualqa.org/evaluation.html lists and
# `vqaEval.py` computes. Where the two differ, the list is followed: the code judges a comma or a hyphen by the whole
# answer, not by its place.
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Without those that are another word without the apostrophe: its, well, were, hell, shell, ill, id, wed, lets.
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't "
    "shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i'm i've you're you've "
    "you'll we've they're they've they'll they'd he's she's it'll that's that'll there's here's what's where's who's "
    "how's ma'am o'clock y'all"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
# The last is one character, which NFKC splits into an apostrophe of this kind and a letter.
_APOSTROPHES = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"), "\u0149": "'n"})


@functools.lru_cache(2**16)  # answers repeat
def normalise(answer: str) -> str:
    """The form in which answers are compared, such as `2 t shirts` for "The two T-shirts."; idempotent.

    The steps, in this order, with their differences from VQA:

    1. Typographic apostrophes become `'`, and the text is put into Unicode's NFKC (VQA has neither) and lower case.
    2. A comma between digits is removed: 1,000 is 1000. A colon between digits is kept: 2:50 (in VQA, every colon).
    3. All other punctuation becomes a space, except for points, apostrophes and `% & #`.
    4. A point is kept before a digit (1.5) and else removed: u.s. is us. (Several in a row are a space; not in VQA.)
    5. An apostrophe is kept within a word, so that girl's is not girls; quotation marks are removed (kept in VQA).
    6. Number words up to ten become digits, as far as VQA goes, and "none" becomes 0.
    7. A contraction without its apostrophe gets it: dont is don't.
    8. The articles a, an, the are removed, unless nothing else is there, such as the letter A (VQA leaves nothing).
    9. One space is kept between words, none around them.
    """
    text = unicodedata.normalize("NFKC", answer.translate(_APOSTROPHES)).lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d):|:(?!\d)|\.{2,}", " ", text)
    marks = [c for c in set(text) if c in "=+<>`~^|" or (unicodedata.category(c)[0] == "P" and c not in "%&#.':")]
    text = text.translate(dict.fromkeys(map(ord, marks), " "))
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", "", text)
    # Once more: a removed character may have stood between a letter and its accent.
    words = unicodedata.normalize("NFKC", text).split()
    words = [_CONTRACTIONS.get(word, _NUMBERS.get(word, word)) for word in words]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(predictions: Sequence[str], questions: Sequence[Question]) -> list[bool]:
    """Whether each prediction is the answer, both normalised; an empty prediction is wrong."""
    pairs = [(normalise(p), normalise(q.answer)) for p, q in zip(predictions, questions, strict=True)]
    return [bool(predicted) and predicted == answer for predicted, answer in pairs]


def mean_by_type(correct: Sequence[bool], types: Sequence[str]) -> dict[str, float]:
    """The percentage (0 to 100) of right answers by question type, in alphabetical order."""
    right, labels = np.asarray(correct), np.asarray(types, dtype=object)
    return {name: 100.0 * float(np.mean(right[labels == name])) for name in sorted(set(types))}


def accuracy_by_type(correct: Sequence[bool], types: Sequence[str]) -> dict[str, float]:
    """`mean_by_type` of one or more questions, and the mean over all of them, `all`, at the end.

    Raises:
      InputError: a type is called `all`.
    """
    if "all" in types:
        raise InputError("a question type is called 'all', which is the name of the mean over types; rename it")
    return {**mean_by_type(correct, types), "all": 100.0 * float(np.mean(correct))}


def closed_list(questions: Sequence[Question], size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """At most `size` answers, normalised, most frequent first, equals in alphabetical order; and how each is spelled.

    That is its most frequent spelling (`two` for `2`): a model trained on these gives them its likelihood, and hardly
    any to the normalised forms.

    Args:
      questions: of the training splits; those of other splits would leak into the list.

    Raises:
      InputError: no question has an answer.
    """
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in questions:
        found[normalise(question.answer)][question.answer] += 1
    found.pop("", None)
    if not found:
        raise InputError(f"none of {len(questions)} questions has an answer: there is no answer list; check the split")
    listed = sorted(found, key=lambda answer: (-found[answer].total(), answer))[:size]
    spelled = [min(found[answer].items(), key=lambda pair: (-pair[1], pair[0]))[0] for answer in listed]
    return tuple(listed), tuple(spelled)


def ceiling(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """The percentage (0 to 100) of questions whose answer is in a list: the best that ranking the list can reach.

    Args:
      answers: a closed list, normalised or not.
      questions: one or more; one with an empty answer is out of reach.
    """
    reachable = {normalise(answer) for answer in answers} - {""}
    return 100.0 * float(np.mean([normalise(question.answer) in reachable for question in questions]))


def by_ranking(scores: Float[np.ndarray, "Q A"], answers: Sequence[str]) -> list[str]:
    """The likeliest of `A` answers to each of `Q` questions; in a tie the empty text, which is never right.

    Args:
      scores: higher is likelier; -inf is allowed, NaN is not.

    Raises:
      InputError: a score is NaN.
    """
    return [_highest(row, answers, place) for place, row in enumerate(scores)]


def chosen_options(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> list[str]:
    """The option with the highest score for each question; in a tie the empty text, which is never right.

    Options of the same text are one.

    Args:
      scores: per question, one score per option; higher is likelier; -inf is allowed, NaN is not.
      questions: with options, of which the answer is one; numbers of options may differ.

    Raises:
      InputError: a score is NaN, or a question's answer is not among its options.
    """
    for place, question in enumerate(questions):
        if question.answer not in question.options:
            raise InputError(f"question {place}: the answer {question.answer!r} is not among the options; add it")
    return [_highest(row, q.options, place) for place, (row, q) in enumerate(zip(scores, questions, strict=True))]


def _highest(scores: np.ndarray, texts: Sequence[str], question: int) -> str:
    if np.isnan(highest := scores.max()):
        raise InputError(f"question {question} has a NaN among its scores; the model or its input is not finite")
    best = {texts[place] for place in np.flatnonzero(scores == highest)}
    return best.pop() if len(best) == 1 else ""


def count_error(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """`QA count MSE`: the mean squared error of the questions of type `count`; nothing if there are none.

    TGIF-QA reports counts by it (Jang et al., CVPR 2017). A prediction is normalised ("three" is 3). One that is not a
    number counts as 0: published models always return a number, so that this can only hurt a model of words.
    """
    errors = [
        (_number(prediction) - _number(question.answer)) ** 2
        for prediction, question in zip(predictions, questions, strict=True)
        if question.type == "count"
    ]
    return {"QA count MSE": float(np.mean(errors))} if errors else {}


def _number(text: str) -> int:
    words = normalise(text)
    # No count of TGIF-QA has three digits; more would let one slip decide the mean.
    return int(words) if words.isdecimal() and words.isascii() and len(words) < 3 else 0


def save_predictions(
    path: pathlib.Path,
    questions: Sequence[Question],
    clip_ids: Sequence[str],
    predictions_by_convention: Mapping[str, Sequence[str]],
) -> None:
    """Writes a line of JSON for each question and its clip, in one move.

    A line is `{"clip": "video7010", "question": ..., "type": ..., "answer": ..., "predictions": {"generation":
    {"answer": "a guitar", "right": true}}}`, with `options` if the question has some; UTF-8, no escapes.

    Args:
      predictions_by_convention: answers by how they were obtained (generation, ranking).

    Raises:
      CannotWrite: the disk is full or read-only; the old file is as it was.
    """
    right = {name: exact_match(predictions, questions) for name, predictions in predictions_by_convention.items()}
    lines = []
    for place, (clip, question) in enumerate(zip(clip_ids, questions, strict=True)):
        record = {"clip": clip, "question": question.question, "type": question.type, "answer": question.answer}
        if question.options:
            record["options"] = list(question.options)
        record["predictions"] = {
            name: {"answer": predictions[place], "right": right[name][place]}
            for name, predictions in predictions_by_convention.items()
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    # JSON can escape half of a surrogate pair, which UTF-8 cannot hold.
    write_text(path, "".join(lines).encode(errors="backslashreplace").decode())
