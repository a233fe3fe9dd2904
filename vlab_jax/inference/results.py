"""What a predictor answers with: plain values that print as what they say.

A result of a video that could not be read has its reason in `error`, which is empty elsewhere; there is one only where
`on_error="skip"` was asked for.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of a video: float32 `[E]`, of unit length; None where it could not be read."""

    video: str
    vector: np.ndarray | None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Caption:
    """What is to be seen in a video, in the model's words.

    `score` is the log-likelihood of the words; of beam search, divided by their number to the length penalty's power.
    """

    video: str
    text: str
    score: float
    error: str = ""

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question on a video, in the model's words or the likeliest of the options.

    `score` is as in `Caption`; of an option, its log-likelihood.
    """

    video: str
    question: str
    text: str
    score: float
    error: str = ""

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A text with its score: a cosine, or a log-likelihood."""

    text: str
    score: float

    def __str__(self) -> str:
        return f"{self.score:.3f}  {self.text}"


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Texts by how well they describe a video, the best first; equal ones in the order in which they were given."""

    video: str
    by: str
    texts: tuple[ScoredText, ...]
    error: str = ""

    def __str__(self) -> str:
        return "\n".join(map(str, self.texts))
