"""How far counts are from right: what TGIF-QA's task `count` is reported by (Jang et al., CVPR 2017)."""

from collections.abc import Sequence

import numpy as np

from vlab_jax.data.schema import Question
from vlab_jax.evaluation.answer_normalisation import normalise

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
