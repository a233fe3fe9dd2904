"""The answers of a model to the questions on the clips of a split, by every convention, and how they are scored.

Open-ended questions are answered in the model's own words (free generation), and by ranking a closed list of answers
by likelihood; questions with options by ranking these. What a clip's frames give is computed once, whatever the
number of its questions and answers.

Dimensions: `Q` questions of a step, `R` texts to rank.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlab_jax.data import schema
from vlab_jax.data.pieces import Batch
from vlab_jax.data.schema import Question
from vlab_jax.errors import InputError
from vlab_jax.evaluation import question_answering as scoring
from vlab_jax.evaluation.encoder import Encoder, without_media
from vlab_jax.evaluation.question_answering import count_error
from vlab_jax.models import generation
from vlab_jax.models.decoder import Memory
from vlab_jax.models.generation import Search
from vlab_jax.models.likelihood import chunks, stacked, text_likelihoods
from vlab_jax.runtime import sharding


class Answered(NamedTuple):
    """A question, its clip's id and index in the source, and what the model made of it.

    `generated` is its own words (None where there are options), `scores` the log-likelihoods of the options, or of
    the closed list (None where there is neither).
    """

    clip: str
    index: int
    question: Question
    generated: str | None
    scores: np.ndarray | None


class Scored(NamedTuple):
    """What `evaluate_question_answering` found: figures, and the headline answer to each question, right or not."""

    metrics: dict[str, float]
    answered: list[Answered]
    headline: list[str]
    right: list[bool]


def answer_questions(
    encoder: Encoder,
    source: Sequence,
    search: Search,
    *,
    closed_list: Sequence[str] = (),
    without: Sequence[str] = (),
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """Every question of the clips that can be decoded, in the order of the source.

    Args:
      source: a data source of the schema.
      search: for free generation; an answer has the tokenizer's `answer_room` at most.
      closed_list: the answers to rank for open-ended questions.
      without: types of questions to leave out.
      update: called with the number of clips done.
    """

    def answer(batch: Batch, video: jax.Array) -> Iterator[tuple[int, Answered]]:
        reader = QuestionAnswerer(encoder, encoder.remember(video), search)
        indices = {row: int(batch["index"][row]) for row in np.flatnonzero(batch["valid"]).tolist()}
        clips = {row: without_media(source, index) for row, index in indices.items()}
        asked = [(row, q) for row, clip in clips.items() for q in clip.questions if q.type not in without]
        answers = reader.answer(asked, closed_list)
        for (row, question), made in zip(asked, answers, strict=True):
            yield indices[row], Answered(clips[row].id, indices[row], question, *made)

    return [answered for _, answered in encoder.of_clips(source, answer, max_failed_share, update)]


class QuestionAnswerer:
    """A model that looks at some clips, and can be asked about them."""

    def __init__(self, encoder: Encoder, memory: Memory, search: Search):
        self._encoder, self._memory = encoder, memory
        self._longest = encoder.tokenizer.answer_room
        self._search = dataclasses.replace(search, max_tokens=min(search.max_tokens, self._longest))

    def answer(
        self, asked: Sequence[tuple[int, Question]], closed_list: Sequence[str]
    ) -> list[tuple[str | None, np.ndarray | None]]:
        """For each (row of a clip, question): the generated answer and the scores, as `Answered` has them."""
        made: list[tuple[str | None, np.ndarray | None]] = [(None, None)] * len(asked)
        listed = stacked([self._encoder.tokenizer.answers(closed_list)], self._longest) if closed_list else None
        open_ended = [place for place, (_, question) in enumerate(asked) if not question.options]
        for places in chunks(open_ended, self._encoder.batch):
            rows, questions = self._padded([asked[place] for place in places])
            words = self._generate(rows, questions)
            scores = self._rank(rows, questions, self._to_all(listed)) if closed_list else itertools.repeat(None)
            for place, text, score in zip(places, words, scores, strict=False):
                made[place] = (text, score)
        closed = [place for place, (_, question) in enumerate(asked) if question.options]
        for places in chunks(closed, self._encoder.batch):
            rows, questions = self._padded([asked[place] for place in places])
            options = stacked(
                [self._encoder.tokenizer.answers(question.options) for question in questions], self._longest
            )
            scores = self._rank(rows, questions, options)
            for place, score, question in zip(places, scores, questions, strict=False):
                made[place] = (None, score[: len(question.options)])
        return made

    def _padded(self, asked: Sequence[tuple[int, Question]]) -> tuple[np.ndarray, list[Question]]:
        """Rows and questions, repeated up to the size that is compiled for."""
        full = [asked[place % len(asked)] for place in range(self._encoder.batch)]
        return np.array([row for row, _ in full], np.int32), [question for _, question in full]

    def _prefix(self, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        return self._encoder.tokenizer.questions([question.question for question in questions])

    def _generate(self, rows: np.ndarray, questions: Sequence[Question]) -> list[str]:
        model, parameters = self._encoder.model, self._encoder.parameters["decoder"]
        texts = generation.write(model, self._search, parameters, self._memory, rows, *self._prefix(questions))
        return [self._encoder.tokenizer.decode(row) for row in np.asarray(texts.tokens)]

    def _rank(
        self, rows: np.ndarray, questions: Sequence[Question], texts: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """Log-likelihoods `[Q, R]` of each question's texts; where a question has fewer than others, `-inf`."""
        model, parameters = self._encoder.model, self._encoder.parameters["decoder"]
        return text_likelihoods(model, parameters, self._memory, rows, self._prefix(questions), texts)

    def _to_all(self, texts: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The texts of one row for each."""
        ids, lengths = (np.broadcast_to(each, (self._encoder.batch, *each.shape[1:])) for each in texts)
        return ids, lengths


def evaluate_question_answering(
    encoder: Encoder,
    source: Sequence,
    search: Search,
    training: Sequence[Sequence],
    *,
    list_size: int,
    answers: Sequence[str] = (),
    without: Sequence[str],
    folder: pathlib.Path | None,
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> Scored:
    """Accuracy, in percent: `QA <type>` and `QA all` of the headline convention, and of the others.

    The headline is exact match of free generation for open-ended questions, and the likeliest option for others.
    `QA ranked` is the accuracy of ranking the closed list, `QA ceiling` the share of answers that it holds; counts have
    `QA count MSE` besides.

    Args:
      training: the splits trained on, of whose questions the closed list is made.
      list_size: answers in the list; 0: none is ranked.
      answers: a list to rank instead.
      without: types of questions to leave out.
      folder: where `questions.jsonl` goes, a line for each question; None: nowhere.

    Raises:
      InputError: no clip of the split has a question.
    """
    listed, spelled = sharding.agreed(lambda: _closed_list(training, without, list_size, answers))
    given = {"closed_list": spelled, "without": without, "max_failed_share": max_failed_share, "update": update}
    answered = answer_questions(encoder, source, search, **given)
    if not answered:
        raise InputError("no clip of the split has a question to answer")
    headline = _headline(answered)
    questions = [each.question for each in answered]
    right = scoring.exact_match(headline, questions)
    accuracy = scoring.accuracy_by_type(right, [question.type for question in questions])
    metrics = {f"QA {kind}": share for kind, share in accuracy.items()} | count_error(headline, questions)
    conventions = {"headline": headline}
    open_ended = [each for each in answered if not each.question.options]
    if spelled and open_ended:
        ranked = scoring.by_ranking(np.stack([each.scores for each in open_ended]), spelled)
        asked = [each.question for each in open_ended]
        metrics["QA ranked"] = 100 * float(np.mean(scoring.exact_match(ranked, asked)))
        metrics["QA ceiling"] = scoring.ceiling(listed, asked)
        of_open = iter(ranked)
        conventions["ranked"] = [next(of_open) if not q.options else "" for q in questions]
    if folder is not None:
        scoring.save_predictions(folder / "questions.jsonl", questions, [each.clip for each in answered], conventions)
    return Scored(metrics, answered, headline, right)


def _headline(answered: Sequence[Answered]) -> list[str]:
    """The model's own words for open-ended questions, the likeliest option for others."""
    closed = [each for each in answered if each.question.options]
    chosen = iter(scoring.chosen_options([each.scores for each in closed], [each.question for each in closed]))
    return [next(chosen) if each.question.options else each.generated or "" for each in answered]


def _closed_list(
    training: Sequence[Sequence], without: Sequence[str], size: int, answers: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The answers to rank, normalised where they are those of training, and their spellings."""
    trained = _questions(training, without) if size and not answers else []
    listed = scoring.answer_list(trained, size) if trained else tuple(answers)
    return listed, scoring.spellings(listed, trained)


def _questions(sources: Sequence[Sequence], without: Sequence[str]) -> list[Question]:
    clips = (schema.from_example(source[index]) for source in sources for index in range(len(source)))
    return [question for clip in clips for question in clip.questions if question.type not in without]
