"""Texts to token ids: CLIP's byte-level BPE, or a small one trained on one's own captions.

`transformers` reads CLIP's tokenizer; its backend, and the small one, are of the `tokenizers` library. Start and end
of text are added here, so that a caption that spells them out stays plain text.

Dimensions: `B` texts, `L` context length.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlab_jax.errors import InputError

FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` backend with the ids of start and end of text, for texts of at most `context_length` tokens."""

    backend: tokenizers.Tokenizer
    start: int
    end: int
    context_length: int

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this number, exclusive."""
        return max(self.backend.get_vocab_size(), self.start + 1, self.end + 1)

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """Token ids, zeros past the end, and lengths that count start and end; a long text keeps its end token."""
        tokens = np.zeros((len(texts), self.context_length), np.int32)
        lengths = np.zeros(len(texts), np.int32)
        for row, encoding in enumerate(self.backend.encode_batch(list(texts), add_special_tokens=False)):
            ids = [self.start, *encoding.ids[: self.context_length - 2], self.end]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return tokens, lengths

    def decode(self, tokens: Sequence[int]) -> str:
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


def load(kind: str, name_or_path: str, workdir: pathlib.Path, context_length: int) -> Tokenizer:
    """The tokenizer of a run: CLIP's (`kind` is `clip`), or the one that `Tokenizer.save` wrote to its workdir.

    Raises:
      InputError: it is not there.
    """
    if kind == "clip":
        return load_clip(name_or_path, context_length)
    if not (workdir / FILE).is_file():
        raise InputError(f"{workdir / FILE} is missing; without the run's tokenizer its checkpoint cannot be used")
    return _with_own_ends(tokenizers.Tokenizer.from_file(str(workdir / FILE)), context_length)


def _with_own_ends(backend: tokenizers.Tokenizer, context_length: int) -> Tokenizer:
    size = backend.get_vocab_size()
    return Tokenizer(backend, start=size, end=size + 1, context_length=context_length)


def load_clip(name_or_path: str, context_length: int) -> Tokenizer:
    """CLIP's tokenizer from a directory with `vocab.json` and `merges.txt`, or by its model name.

    Raises:
      InputError: there is no such tokenizer.
    """
    from transformers import CLIPTokenizer  # here, because importing transformers takes seconds

    try:
        tokenizer = CLIPTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no CLIP tokenizer at {name_or_path!r}: {reason}") from error
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return Tokenizer(backend, tokenizer.bos_token_id, tokenizer.eos_token_id, context_length)
