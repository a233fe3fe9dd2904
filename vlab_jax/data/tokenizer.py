"""Texts to token ids: CLIP's byte-level BPE, or a small one trained on one's own captions.

`transformers` reads CLIP's tokenizer; its backend, and the small one, are of the `tokenizers` library. Start and end
of text are added here, so that a caption that spells them out stays plain text.

Dimensions: `B` texts, `L` context length.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlab_jax.errors import InputError

FILE = "tokenizer.json"
CLIP_FILES = ("vocab.json", "merges.txt")
# What a tokenizer has to survive to be used.
_TRIAL = ["", " ", "a man slices bread.", "<|endoftext|>", "x" * 1000, "\0\n", "e\u0301 שלום 日本 👩\u200d👧 \u202e"]
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` backend with the ids of start and end of text, for texts of at most `context_length` tokens."""

    backend: tokenizers.Tokenizer
    start: int
    end: int
    context_length: int

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True  # special tokens spelled out in a text are text

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # the backend's pickle forgets it

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this number, exclusive."""
        return max(self.backend.get_vocab_size(), self.start + 1, self.end + 1)

    @property
    def answer_room(self) -> int:
        """How many tokens an answer has at most, its end of text included."""
        return max(self.context_length // 4, 2)

    def is_clips(self) -> bool:
        """Whether it is CLIP's, whose start and end of text are words of the vocabulary."""
        return [self.backend.token_to_id(word) for word in CLIP_ENDS] == [self.start, self.end]

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """Token ids, zeros past the end, and lengths that count start and end; a long text keeps its end token."""
        tokens = np.zeros((len(texts), self.context_length), np.int32)
        lengths = np.zeros(len(texts), np.int32)
        for row, encoding in enumerate(self.backend.encode_batch(list(texts), add_special_tokens=False)):
            ids = [self.start, *encoding.ids[: self.context_length - 2], self.end]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return tokens, lengths

    def pairs(
        self, questions: Sequence[str], answers: Sequence[str] | None = None
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Token ids of questions, each with its answer and the end of text behind it, or (None) with neither.

        A question has three quarters of the context, whether its answer is there or not, and an answer one quarter
        (`answer_room`); what does not fit is cut from the end.

        Returns:
          Token ids with zeros behind them, lengths that count start and end, and the place of each answer's first
          token, which without answers is the length.
        """
        tokens = np.zeros((len(questions), self.context_length), np.int32)
        lengths, starts = np.zeros(len(questions), np.int32), np.zeros(len(questions), np.int32)
        asked = self.backend.encode_batch(list(questions), add_special_tokens=False)
        given = self.backend.encode_batch(list(answers), add_special_tokens=False) if answers is not None else []
        for row, question in enumerate(asked):
            answer = [*given[row].ids[: self.answer_room - 1], self.end] if answers is not None else []
            ids = [self.start, *question.ids[: self.context_length - self.answer_room - 1], *answer]
            tokens[row, : len(ids)] = ids
            lengths[row], starts[row] = len(ids), len(ids) - len(answer)
        return tokens, lengths, starts

    def questions(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
        """Token ids of questions to be answered, and their lengths: what the context leaves beside an answer."""
        tokens, lengths, _ = self.pairs(texts)
        return tokens[:, : self.context_length - self.answer_room], lengths

    def answers(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """The token ids of each answer, with its end of text, as they stand behind a question."""
        tokens, lengths, starts = self.pairs([""] * len(texts), texts)
        return [line[start:length] for line, length, start in zip(tokens, lengths, starts, strict=True)]

    def behind_start(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """The token ids of each text, with its end and without its start."""
        return [line[1:length] for line, length in zip(*self(texts), strict=True)]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, whole, without start and end."""
        return [len(encoding.ids) for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def unknown_letters(self, text: str) -> str:
        """Letters that no captions have taught the vocabulary, each once: no token has them whole, only their bytes."""
        normal = self.backend.normalizer.normalize_str(text)
        return "".join(letter for letter in dict.fromkeys(normal) if letter.isalpha() and letter not in self._letters)

    @functools.cached_property
    def _letters(self) -> frozenset[str]:
        """What all tokens of the vocabulary are written with."""
        tokens = [[token] for token in range(self.backend.get_vocab_size())]
        return frozenset("".join(self.backend.decode_batch(tokens)))

    def decode(self, tokens: Iterable[int | np.integer]) -> str:
        """The text of token ids, up to the first end of text; start of text is left out."""
        ids = []
        for token in tokens:
            if token == self.end:
                break
            if token != self.start:
                ids.append(int(token))
        return self.backend.decode(ids, skip_special_tokens=False).strip()

    def save(self, directory: pathlib.Path) -> None:
        """Writes the backend as `tokenizer.json`."""
        (directory / FILE).write_text(self.backend.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Trains a lower-casing byte-level BPE of at most `vocab_size` ids; any text can be encoded with it.

    Raises:
      InputError: `vocab_size` has no room for the 256 bytes and the start and end of text.
    """
    if vocab_size < 258:
        raise InputError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least 258")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(r"\s+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _with_own_ends(backend, context_length)


def load(folder: pathlib.Path, context_length: int) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to a workdir or an export: CLIP's, or one of a run's own captions.

    Raises:
      InputError: it is not there.
    """
    file = folder / FILE
    if not file.is_file():
        raise InputError(f"{file} is missing; without the tokenizer the checkpoint cannot be used")
    backend = _read(file)
    start, end = (backend.token_to_id(word) for word in CLIP_ENDS)
    clips = None not in (start, end)
    return Tokenizer(backend, start, end, context_length) if clips else _with_own_ends(backend, context_length)


def _read(file: pathlib.Path) -> tokenizers.Tokenizer:
    """The backend in a file, which has to take texts and to give ids that its vocabulary has."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        for encoding in backend.encode_batch(_TRIAL, add_special_tokens=False):
            backend.decode(encoding.ids, skip_special_tokens=False)
        largest = max(backend.get_vocab().values(), default=-1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain exceptions, and, where Rust panics, what is none
        raise InputError(f"{file} cannot be read: {_first_line(error)}") from error
    if not 0 <= largest < backend.get_vocab_size():
        size = backend.get_vocab_size()
        raise InputError(f"{file} cannot be used: of {size} tokens in it, one has the id {largest}")
    return backend


def _with_own_ends(backend: tokenizers.Tokenizer, context_length: int) -> Tokenizer:
    size = backend.get_vocab_size()
    return Tokenizer(backend, start=size, end=size + 1, context_length=context_length)


def load_clip(name_or_path: str, context_length: int) -> Tokenizer:
    """CLIP's tokenizer, from a directory with `vocab.json` and `merges.txt`, or by its model name.

    Raises:
      InputError: there is no such tokenizer.
    """
    from transformers import CLIPTokenizer  # here, because importing transformers takes seconds

    folder = _clip_folder(name_or_path)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a file that is broken fails in as many ways as it can be broken
        raise InputError(f"the CLIP tokenizer in {str(folder)!r} cannot be read: {_first_line(error)}") from error
    return Tokenizer(tokenizer.backend_tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, context_length)


def _clip_folder(name_or_path: str) -> pathlib.Path:
    """The directory that holds CLIP's tokenizer; that of a model name is fetched first, if it is not cached."""
    folder = pathlib.Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        missing = [file for file in CLIP_FILES if not (folder / file).is_file()]
        if missing:
            raise InputError(
                f"the CLIP tokenizer directory {name_or_path!r} lacks {' and '.join(missing)}; put them there"
            )
        return folder
    advice = (
        "tokenizer.path must be a directory with vocab.json and merges.txt, or a model name as in "
        "'openai/clip-vit-base-patch32'"
    )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name_or_path):
        raise InputError(f"there is no CLIP tokenizer at {name_or_path!r}; {advice}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        fetched = [pathlib.Path(hf_hub_download(name_or_path, file)) for file in CLIP_FILES]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"there is no directory {name_or_path!r}, and no model of that name can be fetched; {advice}"
        ) from error
    return fetched[0].parent


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
