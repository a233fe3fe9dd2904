"""Question answering: the answers of a model to the questions on the clips of a split, and their scores.

Open-ended questions are answered by free generation, and by ranking a closed list of answers by likelihood; questions
with options by ranking these. A clip's visual cache is computed once for all its questions and answers.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlab_jax.data import schema
from vlab_jax.data.batches import Batch
from vlab_jax.data.schema import Question
from vlab_jax.datasets.text_files import read_answer_list
from vlab_jax.errors import InputError
from vlab_jax.evaluation import answers as scoring
from vlab_jax.evaluation import sheets
from vlab_jax.evaluation.encoder import Encoder, without_media
from vlab_jax.evaluation.plan import Plan, TaskResult
from vlab_jax.models.decoder import VisualCache
from vlab_jax.models.generation import GenerationConfig, chunks, generate_texts, stack_texts, text_likelihoods
from vlab_jax.runtime import sharding


class Answered(NamedTuple):
    """A question, its clip's id and index in the source, and the model's answer.

    `generated` is the freely generated answer (None for a question with options), `scores` the log-likelihoods of the
    options, or of the closed list (None if there is neither).
    """

    clip: str
    index: int
    question: Question
    generated: str | None
    scores: np.ndarray | None


def evaluate(encoder: Encoder, source: Sequence, plan: Plan, folder: pathlib.Path | None) -> TaskResult:
    """Runs the task; see `registry`. Its figures, in percent, are `QA <type>` and `QA all` of the headline convention.

    The headline is exact match of free generation for open-ended questions, and the likeliest option for others.
    `QA ranked` is the accuracy of ranking the closed list, `QA ceiling` the share of answers in it; questions of type
    `count` also have `QA count MSE`. The answers go into `questions.jsonl` in `folder`, a line for each question.

    Raises:
      InputError: no clip of the split has a question.
    """
    if plan.answer_list:
        listed = spelled = read_answer_list(plan.answer_list)
    else:
        listed, spelled = sharding.from_primary(lambda: _training_answers(plan))
    answered = answer_questions(encoder, source, plan.search, spelled, plan.multiple_choice)
    if not answered:
        raise InputError("no clip of the split has a question to answer")
    questions = [each.question for each in answered]
    closed = [each for each in answered if each.question.options]
    chosen = iter(scoring.chosen_options([each.scores for each in closed], [each.question for each in closed]))
    headline = [next(chosen) if each.question.options else each.generated for each in answered]
    right = scoring.exact_match(headline, questions)
    accuracy = scoring.accuracy_by_type(right, [question.type for question in questions])
    metrics = {f"QA {kind}": share for kind, share in accuracy.items()} | scoring.count_error(headline, questions)
    conventions = {"headline": headline}
    open_ended = [each for each in answered if not each.question.options]
    if spelled and open_ended:
        ranked = scoring.by_ranking(np.stack([each.scores for each in open_ended]), spelled)
        open_questions = [each.question for each in open_ended]
        metrics["QA ranked"] = 100 * float(np.mean(scoring.exact_match(ranked, open_questions)))
        metrics["QA ceiling"] = scoring.ceiling(listed, open_questions)
        of_open = iter(ranked)
        conventions["ranked"] = [next(of_open) if not q.options else "" for q in questions]
    if folder is not None:
        scoring.save_predictions(folder / "questions.jsonl", questions, [each.clip for each in answered], conventions)
    lines: dict[int, list[tuple[str, str]]] = {}
    for each, answer, is_right in zip(answered, headline, right, strict=True):
        verdict = "right" if is_right else f"wrong, it is: {each.question.answer}"
        text = f"→ {answer or '(empty)'}  ({verdict})"
        colour = sheets.GREEN if is_right else sheets.RED
        lines.setdefault(each.index, []).extend([(each.question.question, sheets.INK), (text, colour)])
    return TaskResult(metrics, lines=lines)


def _training_answers(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The closed list of the training splits and its spellings; empty if it is off, or they have no question."""
    sources = plan.training() if plan.closed_list else []
    clips = (schema.from_example(source[index]) for source in sources for index in range(len(source)))
    questions = [question for clip in clips for question in clip.questions if question.type not in plan.multiple_choice]
    return scoring.closed_list(questions, plan.closed_list) if questions else ((), ())


def answer_questions(
    encoder: Encoder,
    source: Sequence,
    search: GenerationConfig,
    closed_list: Sequence[str] = (),
    without: Sequence[str] = (),
) -> list[Answered]:
    """Answers every question of the clips that can be decoded, in the order of the source.

    Args:
      source: a data source of the schema.
      search: for free generation; an answer has the tokenizer's `max_answer_tokens` at most.
      closed_list: the answers to rank for open-ended questions.
      without: types of questions to leave out.
    """

    def answer(batch: Batch, video: jax.Array) -> Iterator[tuple[int, Answered]]:
        indices = {row: int(batch["index"][row]) for row in np.flatnonzero(batch["valid"]).tolist()}
        clips = {row: without_media(source, index) for row, index in indices.items()}
        pairs = [(row, q) for row, clip in clips.items() for q in clip.questions if q.type not in without]
        answers = answer_batch(encoder, encoder.cache_visual(video), search, pairs, closed_list)
        for (row, question), pair in zip(pairs, answers, strict=True):
            yield indices[row], Answered(clips[row].id, indices[row], question, *pair)

    return [answered for _, answered in encoder.map_clips(source, "answer", answer)]


def answer_batch(
    encoder: Encoder,
    visual: VisualCache,
    search: GenerationConfig,
    pairs: Sequence[tuple[int, Question]],
    closed_list: Sequence[str] = (),
) -> list[tuple[str | None, np.ndarray | None]]:
    """For each (row of a clip in a visual cache, question): the generated answer and the scores, as in `Answered`."""
    tokenizer, model, decoder = encoder.tokenizer, encoder.model, encoder.parameters["decoder"]
    longest = tokenizer.max_answer_tokens
    search = dataclasses.replace(search, max_tokens=min(search.max_tokens, longest))
    listed = None
    if closed_list:
        one_row = stack_texts([tokenizer.answers(closed_list)], longest)
        listed = tuple(np.broadcast_to(array, (encoder.batch, *array.shape[1:])) for array in one_row)
    answers: list[tuple[str | None, np.ndarray | None]] = [(None, None)] * len(pairs)
    for has_options in (False, True):
        of_kind = [place for place, (_, question) in enumerate(pairs) if bool(question.options) == has_options]
        for places in chunks(of_kind, encoder.batch):
            # Repeated up to the compiled size.
            full = [pairs[place] for place, _ in zip(itertools.cycle(places), range(encoder.batch), strict=False)]
            rows, questions = np.array([row for row, _ in full], np.int32), [question for _, question in full]
            prefix, texts = tokenizer.questions([question.question for question in questions]), listed
            generated = scores = itertools.repeat(None)
            if has_options:
                texts = stack_texts([tokenizer.answers(question.options) for question in questions], longest)
            else:
                tokens = generate_texts(model, search, decoder, visual, rows, *prefix).tokens
                generated = [tokenizer.decode(row) for row in np.asarray(tokens)]
            if texts:
                scores = text_likelihoods(model, decoder, visual, rows, prefix, texts)
            for place, question, text, line in zip(places, questions, generated, scores, strict=False):
                # A question with fewer options than others has a score of -inf for each that it lacks.
                answers[place] = (text, line[: len(question.options)] if has_options else line)
    return answers
