"""The device's side of a predictor: batches of clips and texts in, numbers and words out.

What is asked of a batch is started at once; the function that comes back waits for it, and fetches it.

Dimensions: `B` clips, `T` frames, `S` pixels, `C` texts, `E` embedding width.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Float, Shaped, UInt8

from vlab_jax.config import generation_config
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.errors import InputError
from vlab_jax.inference.clips import FrameShape
from vlab_jax.models import generation
from vlab_jax.models.decoder import Memory
from vlab_jax.models.generation import Search, Texts
from vlab_jax.models.likelihood import TEXTS_AT_ONCE, chunks, stacked, text_likelihoods
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.pretrained import vlab
from vlab_jax.pretrained.files import may_be_on_hub
from vlab_jax.pretrained.load import load_parameters, open_checkpoint
from vlab_jax.restore import model_for, restore
from vlab_jax.runtime import sharding

# FOLDED vlab_jax/inference/engine.py: What indexing and searching ask of a model; `predictor.Predictor` is one.


class Frames(Protocol):
    """How the model looks at a clip: `num_frames` frames, squares of `size` pixels."""

    num_frames: int
    size: int


@runtime_checkable
class Embedder(Protocol):
    """Clips and texts become unit vectors of one space.

    Attributes:
      fingerprint: the same for two embedders only where they embed alike: parameters, tokenizer, frames.
      frames: what a clip is decoded to.
    """

    fingerprint: str
    frames: Frames

    def embed_videos(self, videos: Sequence[Any]) -> Float[np.ndarray, "V E"]:
        """Embeds videos: paths, or decoded clips, uint8 `[T, S, S, 3]`. Raises InputError where one cannot be read."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeds texts."""
        ...


# FOLDED vlab_jax/inference/engine.py: A trained model, found by its name: of a run, of an export, or of the hub.

DTYPES = ("float32", "bfloat16")
_ADVICE = "name a run's workdir, its checkpoints/<step>, a directory that vlab_jax.export wrote"


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model with its parameters on a mesh, its tokenizer, and the config and the last stage of its training."""

    name: str
    mesh: Mesh
    config: dict[str, Any]
    stage: str
    model: VLAB
    parameters: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that its last stage trained."""
        return tuple(self.config["stage"][self.stage]["streams"])

    def search(self, beams: int | None) -> Search:
        """How its run generated texts; with `beams`, where these are given."""
        fields = {**generation_config(), **self.config.get("generation", {})}
        if beams is not None:
            fields["beams"] = beams
        return Search.of(fields, self.tokenizer.end, self.tokenizer.context_length)


def load_trained(name: str, mesh: Mesh, dtype: str | None = None) -> Trained:
    """Loads a model, its parameters placed on the mesh.

    Args:
      name: a run's workdir, its `checkpoints/<step>`, a directory that `vlab_jax.export` wrote, or such a model on
        the hub.
      dtype: what matrix products are computed in; None: as in training.

    Raises:
      InputError: there is none, it cannot be read, or its parameters are not finite.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    path = pathlib.Path(name).expanduser()
    of_a_run = path.parent.name == "checkpoints" or (path / "checkpoints").is_dir()
    trained = _from_run(name, path, mesh) if of_a_run else _from_export(name, path, mesh)
    _check_finite(trained)
    return trained if dtype is None else dataclasses.replace(trained, model=trained.model.clone(dtype=dtype))


def _from_run(name: str, path: pathlib.Path, mesh: Mesh) -> Trained:
    found = restore(path, mesh)
    tokenizer = tokenizers.load(found.home, found.config["model"]["text"]["context_length"])
    return Trained(name, mesh, found.config, found.stage, found.model, found.parameters, tokenizer)


def _from_export(name: str, path: pathlib.Path, mesh: Mesh) -> Trained:
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        raise InputError(f"{name} holds no model; {_ADVICE}, or a model on the hub")
    if not path.exists() and not may_be_on_hub(name):
        raise InputError(f"there is no model at {name!r}; {_ADVICE}, or a model on the hub")
    opened = open_checkpoint(name)
    if not opened.whole:
        raise InputError(
            f"{name} is a CLIP alone ({opened.architecture.format}), without video adapters and decoder; train a VLAB "
            f"from it (configs/pretrain.py:pretrained={name}), and name its workdir or export"
        )
    saved = vlab.read_config(opened.files, name)
    config = saved["training"]
    model = model_for(config, mesh)
    shapes = parameter_shapes(model, config["frames"])
    parameters, _ = load_parameters(opened, shapes, sharding.shardings(shapes, mesh))
    tokenizer = tokenizers.load(opened.files.folder, config["model"]["text"]["context_length"])
    # Exports before this was noted are of a run's last stage.
    return Trained(name, mesh, config, saved.get("stage", config["stages"][-1]), model, parameters, tokenizer)


def _check_finite(trained: Trained) -> None:
    leaves = flatten_dict(trained.parameters, sep="/")
    wrong = [path for path, leaf in leaves.items() if not np.isfinite(leaf).all()]  # by NumPy: nothing is compiled
    if wrong:
        raise InputError(
            f"{trained.name} is of no use: {len(wrong)} of its parameters hold numbers that are not finite, such as "
            f"{wrong[0]}; name an earlier checkpoint"
        )


# FOLDED vlab_jax/inference/engine.py: Batches of few sizes, so that few programs are compiled, and one of them
# always ahead, so that no device waits.

A = TypeVar("A")
B = TypeVar("B")


def bucket(count: int, most: int, divisor: int = 1) -> int:
    """The size that `count` items are padded to: a power of two times `divisor`, or `most` where that is less.

    Args:
      most: the largest batch; at least `count`, and a multiple of `divisor`.
      divisor: what batches must be a multiple of.
    """
    size = divisor
    while size < count:
        size *= 2
    return min(size, most)


def padded(items: Sequence[np.ndarray], size: int) -> Shaped[np.ndarray, "size ..."]:
    """Items stacked, the last one repeated up to `size`: what is repeated costs the same as zeros, and is never odd."""
    return np.stack([*items, *[items[-1]] * (size - len(items))])


def parts(items: Iterable[A], most: int, counts: Callable[[A], bool]) -> Iterator[list[A]]:
    """Items in lists that hold `most` of those that count, but the last; others stay in their places."""
    part, full = [], 0
    for item in items:
        part.append(item)
        full += counts(item)
        if full == most:
            yield part
            part, full = [], 0
    if part:
        yield part


def one_ahead(dispatched: Iterable[Callable[[], B]]) -> Iterator[B]:
    """What each call returns, called when the next one is there: its work has been started meanwhile."""
    waiting: Callable[[], B] | None = None
    for fetch in dispatched:
        if waiting is not None:
            yield waiting()
        waiting = fetch
    if waiting is not None:
        yield waiting()


TEXTS = 64  # that are embedded at once

Written = tuple[str, float]  # words, and their score


class Engine:
    """A model on its mesh, as it looks at clips.

    Args:
      image_frames: which of a clip's frames the image stream sees.
      search: how texts are written.
    """

    def __init__(self, trained: Trained, image_frames: tuple[int, ...], search: Search) -> None:
        self._trained, self._mesh, self._search = trained, trained.mesh, search
        self._model, self._tokenizer = trained.model, trained.tokenizer
        self._looks = (trained.model, trained.streams, image_frames, trained.parameters)
        self._decoder_parameters = trained.parameters["decoder"]
        self.divisor = sharding.batch_divisor(trained.mesh)  # of batches

    @property
    def embed_width(self) -> int:
        """`E`."""
        return self._model.vision["embed_width"]

    def embed(self, video: UInt8[np.ndarray, "B T S S 3"]) -> Callable[[], Float[np.ndarray, "B E"]]:
        """Embeddings of clips, of unit length."""
        embedded = self._on_mesh(generation.embed_clips, *self._looks, self._placed(video))
        return lambda: np.asarray(embedded)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, of unit length."""
        rows = [np.zeros((0, self.embed_width), np.float32)]
        most = -(-TEXTS // self.divisor) * self.divisor
        for part in chunks(texts, most):
            full = [*part, *[""] * (bucket(len(part), most, self.divisor) - len(part))]
            tokens, lengths = map(self._placed, self._tokenizer(full))
            embedded = self._on_mesh(generation.embed_texts, self._model, self._trained.parameters, tokens, lengths)
            rows.append(np.asarray(embedded)[: len(part)])
        return np.concatenate(rows)

    def caption(self, video: UInt8[np.ndarray, "B T S S 3"]) -> Callable[[], list[Written]]:
        """A caption of each clip."""
        prefix = np.full((len(video), 1), self._tokenizer.start, np.int32)
        return self._write(self._remember(video), self._search, prefix, np.ones(len(video), np.int32))

    def answer(
        self, video: UInt8[np.ndarray, "B T S S 3"], questions: Sequence[str], options: Sequence[str]
    ) -> Callable[[], list[list[Written]]]:
        """For each clip its answers to all of the questions: the model's own words, or the likeliest option."""
        memory = self._remember(video)
        asked = [self._tokenizer.questions([question] * len(video)) for question in questions]
        if options:
            texts = self._tokenizer.answers(options)
            scores = [self._likelihoods(memory, prefix, texts, self._tokenizer.answer_room) for prefix in asked]
            best = [[(options[row.argmax()], float(row.max())) for row in each] for each in scores]
            return lambda: [list(answers) for answers in zip(*best, strict=True)]
        room = min(self._search.max_tokens, self._tokenizer.answer_room)
        search = dataclasses.replace(self._search, max_tokens=room)
        fetches = [self._write(memory, search, *prefix) for prefix in asked]
        return lambda: [list(answers) for answers in zip(*[fetch() for fetch in fetches], strict=True)]

    def likelihoods(
        self, video: UInt8[np.ndarray, "B T S S 3"], texts: Sequence[str]
    ) -> Callable[[], Float[np.ndarray, "B C"]]:
        """Log-likelihoods of texts as captions of each clip."""
        start = np.full((len(video), 1), self._tokenizer.start, np.int32), np.ones(len(video), np.int32)
        ids = self._tokenizer.behind_start(texts)
        scores = self._likelihoods(self._remember(video), start, ids, self._tokenizer.context_length - 1)
        return lambda: scores

    def _remember(self, video: np.ndarray) -> Memory:
        return self._on_mesh(generation.remember, *self._looks, self._placed(video))

    def _write(
        self, memory: Memory, search: Search, prefix: np.ndarray, lengths: np.ndarray
    ) -> Callable[[], list[Written]]:
        given = (memory, None, self._placed(prefix), self._placed(lengths))
        texts: Texts = self._on_mesh(generation.write, self._model, search, self._decoder_parameters, *given)

        def fetch() -> list[Written]:
            words = [self._tokenizer.decode(row) for row in np.asarray(texts.tokens)]
            return list(zip(words, np.asarray(texts.scores).tolist(), strict=True))

        return fetch

    def _likelihoods(
        self, memory: Memory, prefix: tuple[np.ndarray, np.ndarray], texts: Sequence[np.ndarray], longest: int
    ) -> np.ndarray:
        """`[B, C]`; the texts are filled up to a power of two, so that few shapes are compiled."""
        most = max(TEXTS_AT_ONCE, len(texts))
        full = [*texts, *[np.zeros(0, np.int32)] * (bucket(len(texts), most) - len(texts))]
        ids, lengths = (np.repeat(each, len(prefix[1]), axis=0) for each in stacked([full], longest))
        given = (memory, None, prefix, (ids, lengths))
        found = self._on_mesh(text_likelihoods, self._model, self._decoder_parameters, *given)
        return found[:, : len(texts)]

    def _placed(self, array: np.ndarray) -> jax.Array:
        return sharding.to_global({"": array}, self._mesh)[""]

    def _on_mesh(self, function: Callable[..., Any], *given: Any) -> Any:
        precision = self._trained.config["matmul_precision"]
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(precision):
            return function(*given)


# FOLDED vlab_jax/inference/engine.py: What tells models apart that embed differently: a digest of all that an
# embedding depends on.

# Fields of a model that say how it is computed, or are of the decoder, which embeds nothing.
_OTHERS = ("decoder", "remat", "unroll", "dtype", "platform", "attention", "parent", "name")
# Fields that came later count where they are not at their default, so that indexes of before stay what they are.
_LATER = {"frame_pooling": "mean_then_normalise"}


def fingerprint(trained: Trained, frames: FrameShape, image_frames: Sequence[int]) -> str:
    """32 hexadecimal digits, the same for a run's checkpoint and for its export."""
    digest = hashlib.blake2b(digest_size=16)
    counted = {key: value for key, value in vars(trained.model).items() if key[0] != "_" and key not in _OTHERS}
    model = {key: value for key, value in counted.items() if _LATER.get(key, ()) != value}
    fields = {key: unfreeze(value) if hasattr(value, "items") else value for key, value in model.items()}
    told = [fields, frames.num_frames, frames.size, list(image_frames), list(trained.streams)]
    digest.update(json.dumps(told, sort_keys=True, default=list).encode())
    digest.update(trained.tokenizer.backend.to_str().encode())
    parameters = {part: leaves for part, leaves in trained.parameters.items() if part != "decoder"}
    for path, leaf in sorted(flatten_dict(parameters, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
