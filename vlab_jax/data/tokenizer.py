"""Tokenizers: CLIP's byte-level BPE, or a small one that is trained on a run's own captions.

`transformers` reads CLIP's tokenizer; its backend, like the small one, is of the `tokenizers` library. Start and end of
text are added here, so a caption that spells them out stays plain text.

Dimensions: `B` texts, `L` context length, `P` of a question.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlab_jax.errors import InputError

FILE = "tokenizer.json"
CLIP_FILES = ("vocab.json", "merges.txt")
# Texts that a tokenizer must encode and decode before it is used.
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
        self.__post_init__()  # the backend's pickle lacks it

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        return max(self.backend.get_vocab_size(), self.start + 1, self.end + 1)

    @property
    def max_answer_tokens(self) -> int:
        """The most tokens that an answer has, its end of text included."""
        return max(self.context_length // 4, 2)

    def is_clips(self) -> bool:
        """Whether it is CLIP's, whose vocabulary holds start and end of text."""
        return [self.backend.token_to_id(word) for word in CLIP_ENDS] == [self.start, self.end]

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """Token ids, padded with zeros, and lengths that count start and end; a long text is cut and keeps its end."""
        return self._pad([[self.start, *ids[: self.context_length - 2], self.end] for ids in self._encode(texts)])

    def pairs(
        self, questions: Sequence[str], answers: Sequence[str] | None = None
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Token ids of questions, each followed by its answer and the end of text, or (None) by neither.

        A question has three quarters of the context, with or without its answer, and an answer one quarter
        (`max_answer_tokens`); texts that are longer are cut. Also returns lengths that count start and end, and the
        position of each answer's first token, which without answers is the length.
        """
        room = self.max_answer_tokens
        starts = [[self.start, *ids[: self.context_length - room - 1]] for ids in self._encode(questions)]
        ends: list[list[int]] = [[] for _ in questions]
        if answers is not None:
            ends = [[*ids[: room - 1], self.end] for ids in self._encode(answers)]
        tokens, lengths = self._pad([[*start, *end] for start, end in zip(starts, ends, strict=True)])
        return tokens, lengths, np.array([len(start) for start in starts], np.int32)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        tokens = np.zeros((len(rows), self.context_length), np.int32)
        for line, ids in zip(tokens, rows, strict=True):
            line[: len(ids)] = ids
        return tokens, np.array([len(ids) for ids in rows], np.int32)

    def questions(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
        """Token ids and lengths of questions without answers; `P` is what an answer leaves of the context."""
        tokens, lengths, _ = self.pairs(texts)
        return tokens[:, : self.context_length - self.max_answer_tokens], lengths

    def answers(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """The token ids of each answer with its end of text, as they follow a question."""
        tokens, lengths, starts = self.pairs([""] * len(texts), texts)
        return [line[start:length] for line, length, start in zip(tokens, lengths, starts, strict=True)]

    def encode_without_bos(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """The token ids of each text, with its end and without its start."""
        return [line[1:length] for line, length in zip(*self(texts), strict=True)]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, uncut, without start and end."""
        return [len(ids) for ids in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def unknown_letters(self, text: str) -> str:
        """Letters of a text that no token of the vocabulary contains, each once: only their bytes have tokens."""
        normal = self.backend.normalizer.normalize_str(text)
        return "".join(letter for letter in dict.fromkeys(normal) if letter.isalpha() and letter not in self._letters)

    @functools.cached_property
    def _letters(self) -> frozenset[str]:
        """All characters of the vocabulary's tokens."""
        tokens = [[token] for token in range(self.backend.get_vocab_size())]
        return frozenset("".join(self.backend.decode_batch(tokens)))

    def decode(self, tokens: Iterable[int | np.integer]) -> str:
        """The text of token ids, up to the first end of text; start of text is left out."""
        text = itertools.takewhile(lambda token: token != self.end, tokens)
        ids = [int(token) for token in text if token != self.start]
        return self.backend.decode(ids, skip_special_tokens=False).strip()

    def save(self, directory: pathlib.Path) -> None:
        """Writes the backend as `tokenizer.json`."""
        (directory / FILE).write_text(self.backend.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Trains a lower-casing byte-level BPE of at most `vocab_size` ids; any text can be encoded with it.

    Raises `InputError` where `vocab_size` has no room for the 256 bytes and the start and end of text.
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
    size = backend.get_vocab_size()
    return Tokenizer(backend, start=size, end=size + 1, context_length=context_length)


def load(folder: pathlib.Path, context_length: int) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote: CLIP's, or one that was trained on a run's own captions.

    It must encode texts, and its ids must be below the size of its vocabulary. Raises `InputError`.
    """
    file = folder / FILE
    if not file.is_file():
        raise InputError(f"{file} is missing; without the tokenizer the checkpoint cannot be used")
    with _reading(str(file)):
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        for encoding in backend.encode_batch(_TRIAL, add_special_tokens=False):
            backend.decode(encoding.ids, skip_special_tokens=False)
        largest, size = max(backend.get_vocab().values(), default=-1), backend.get_vocab_size()
    if not 0 <= largest < size:
        raise InputError(f"{file} cannot be used: of {size} tokens in it, one has the id {largest}")
    start, end = (backend.token_to_id(word) for word in CLIP_ENDS)
    if None in (start, end):  # trained on captions
        start, end = size, size + 1
    return Tokenizer(backend, start, end, context_length)


def load_clip(name_or_path: str, context_length: int) -> Tokenizer:
    """CLIP's tokenizer, from a directory with `vocab.json` and `merges.txt`, or by its model name; or `InputError`."""
    from transformers import CLIPTokenizer  # here, because importing transformers takes seconds

    folder = _clip_folder(name_or_path)
    with _reading(f"the CLIP tokenizer in {str(folder)!r}"):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    return Tokenizer(tokenizer.backend_tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, context_length)


def _clip_folder(name_or_path: str) -> pathlib.Path:
    """The directory with CLIP's tokenizer; the files of a model name are fetched, if they are not cached."""
    folder = pathlib.Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        missing = [file for file in CLIP_FILES if not (folder / file).is_file()]
        if missing:
            files = " and ".join(missing)
            raise InputError(f"the CLIP tokenizer directory {name_or_path!r} lacks {files}; put them there")
        return folder
    advice = (
        "tokenizer.path must be a directory with vocab.json and merges.txt, or a model name as in "
        "'openai/clip-vit-base-patch32'"
    )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name_or_path):
        raise InputError(f"there is no CLIP tokenizer at {name_or_path!r}; {advice}")
    from huggingface_hub import hf_hub_download

    try:
        fetched = [pathlib.Path(hf_hub_download(name_or_path, file)) for file in CLIP_FILES]
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no directory {name_or_path!r}, and no model of that name can be fetched; {advice}"
        ) from error
    return fetched[0].parent


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns whatever the libraries raise on a broken file into an `InputError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # they raise plain exceptions, and where Rust panics, no `Exception`
        line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(f"{what} cannot be read: {line}") from error
