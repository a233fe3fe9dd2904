"""A trained model on its devices: batches of clips and texts in, embeddings, likelihoods and words out.

A predictor (`predictor.py`) decodes videos and makes batches of few sizes; an `Engine` starts the work on a batch at
once and returns a function that waits for the result, so that the next batch is decoded meanwhile.

Dimensions: `B` clips, `T` frames, `S` pixels, `C` texts, `E` embedding width.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

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
from vlab_jax.inference.clips import DecodedClip, FrameShape
from vlab_jax.models import generation
from vlab_jax.models.decoder import VisualCache
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.models.vlab import VLAB, embed_clips, embed_texts, parameter_shapes
from vlab_jax.pretrained.export import read_config
from vlab_jax.pretrained.files import may_be_on_hub
from vlab_jax.pretrained.load import load_parameters, open_checkpoint
from vlab_jax.restore import model_for, restore
from vlab_jax.runtime import sharding

DTYPES = ("float32", "bfloat16")
TEXTS_PER_BATCH = 64  # that are embedded at once
_ADVICE = "name a run's workdir, its checkpoints/<step>, a directory that vlab_jax.export wrote, or a model on the hub"

B = TypeVar("B")
TextAndScore = tuple[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
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

    def generation(self, beams: int | None) -> GenerationConfig:
        """How its run generated texts, but with `beams` if that is not None."""
        fields = {**generation_config(), **self.config.get("generation", {})}
        if beams is not None:
            fields["beams"] = beams
        return GenerationConfig.from_fields(fields, self.tokenizer.end, self.tokenizer.context_length)


def load_trained_model(name: str, mesh: Mesh, dtype: str | None = None) -> TrainedModel:
    """Loads a model and places its parameters on the mesh; arguments and errors are those of `Predictor.load`."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    path = pathlib.Path(name).expanduser()
    if path.parent.name == "checkpoints" or (path / "checkpoints").is_dir():
        run = restore(path, mesh)
        tokenizer = tokenizers.load(run.home, run.config["model"]["text"]["context_length"])
        trained = TrainedModel(name, mesh, run.config, run.stage, run.model, run.parameters, tokenizer)
    else:
        trained = _load_export(name, path, mesh)
    leaves = flatten_dict(trained.parameters, sep="/")
    bad = [place for place, leaf in leaves.items() if not np.isfinite(leaf).all()]  # by NumPy: nothing is compiled
    if bad:
        raise InputError(
            f"{name} is of no use: {len(bad)} of its parameters hold numbers that are not finite, such as {bad[0]}; "
            "name an earlier checkpoint"
        )
    return trained if dtype is None else dataclasses.replace(trained, model=trained.model.clone(dtype=dtype))


def _load_export(name: str, path: pathlib.Path, mesh: Mesh) -> TrainedModel:
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        raise InputError(f"{name} holds no model; {_ADVICE}")
    if not path.exists() and not may_be_on_hub(name):
        raise InputError(f"there is no model at {name!r}; {_ADVICE}")
    checkpoint = open_checkpoint(name)
    if not checkpoint.whole:
        raise InputError(
            f"{name} is a CLIP alone ({checkpoint.architecture.format}), without video adapters and decoder; train a "
            f"VLAB from it (configs/pretrain.py:pretrained={name}), and name its workdir or export"
        )
    saved = read_config(checkpoint.files, name)
    config = saved["training"]
    model = model_for(config, mesh)
    shapes = parameter_shapes(model, config["frames"])
    parameters, _ = load_parameters(checkpoint, shapes, sharding.shardings(shapes, mesh))
    tokenizer = tokenizers.load(checkpoint.files.folder, config["model"]["text"]["context_length"])
    # Old exports do not say their stage; they are of a run's last one.
    return TrainedModel(name, mesh, config, saved.get("stage", config["stages"][-1]), model, parameters, tokenizer)


# Fields of a model on which embeddings do not depend, but for rounding.
_NOT_IN_FINGERPRINT = ("decoder", "remat", "unroll", "dtype", "platform", "attention", "parent", "name")
# Fields that models did not always have. They count unless they have these values, so that old indexes stay valid.
_NEW_FIELDS = {"frame_pooling": "mean_then_normalise"}


def fingerprint(trained: TrainedModel, frames: FrameShape, image_frames: Sequence[int]) -> str:
    """A digest of all that an embedding depends on: 32 hexadecimal digits, the same for a run and for its export."""
    fields = {
        key: unfreeze(value) if hasattr(value, "items") else value
        for key, value in vars(trained.model).items()
        if key[0] != "_" and key not in _NOT_IN_FINGERPRINT and _NEW_FIELDS.get(key, ()) != value
    }
    settings = [fields, frames.num_frames, frames.size, list(image_frames), list(trained.streams)]
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(settings, sort_keys=True, default=list).encode())
    digest.update(trained.tokenizer.backend.to_str().encode())
    parameters = {part: leaves for part, leaves in trained.parameters.items() if part != "decoder"}
    for path, leaf in sorted(flatten_dict(parameters, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def split_batches(clips: Iterable[DecodedClip], size: int, on_error: str) -> Iterator[list[DecodedClip]]:
    """Batches with `size` clips that could be decoded, but for the last one; others keep their places between them.

    Raises InputError where a clip could not be decoded, and `on_error` is `raise`.
    """
    batch, count = [], 0
    for clip in clips:
        if clip.error and on_error == "raise":
            raise InputError(clip.error)
        batch.append(clip)
        count += clip.frames is not None
        if count == size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def bucket_size(count: int, largest: int, divisor: int = 1) -> int:
    """The size that a batch of `count` items is padded to, so that programs of few sizes are compiled.

    It is a power of two times `divisor`, which divides all sizes, or `largest`, that of full batches, if that is less.
    """
    size = divisor
    while size < count:
        size *= 2
    return min(size, largest)


def pad_batch(items: Sequence[np.ndarray], size: int) -> Shaped[np.ndarray, "size ..."]:
    """The items stacked, the last one repeated: it costs as much as zeros would, and has no unusual values."""
    return np.stack([*items, *[items[-1]] * (size - len(items))])


def one_ahead(started: Iterable[Callable[[], B]]) -> Iterator[B]:
    """The result of each function, called only after the next one has been taken, which starts that one's work."""
    for fetch, _ in itertools.pairwise(itertools.chain(started, [None])):
        yield fetch()


class Engine:
    """Computes batches of a model on its mesh; `divisor` divides the size of every batch, and `embed_width` is `E`.

    `image_frames` are those of a clip's frames that the image stream sees.
    """

    def __init__(self, trained: TrainedModel, image_frames: tuple[int, ...], config: GenerationConfig) -> None:
        self._model, self._mesh, self._tokenizer = trained.model, trained.mesh, trained.tokenizer
        self._precision = trained.config["matmul_precision"]
        self._parameters, self._config = trained.parameters, config
        self._of_clips = (trained.model, trained.streams, image_frames, trained.parameters)
        self.divisor = sharding.batch_divisor(trained.mesh)
        self.embed_width: int = trained.model.vision["embed_width"]

    def embed(self, video: UInt8[np.ndarray, "B T S S 3"]) -> Callable[[], Float[np.ndarray, "B E"]]:
        """Embeddings of clips, of unit length."""
        embedded = self._run(embed_clips, *self._of_clips, self._place(video))
        return lambda: np.asarray(embedded)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, of unit length."""
        rows = [np.zeros((0, self.embed_width), np.float32)]
        largest = -(-TEXTS_PER_BATCH // self.divisor) * self.divisor
        for part in generation.chunks(texts, largest):
            padding = [""] * (bucket_size(len(part), largest, self.divisor) - len(part))
            tokens, lengths = map(self._place, self._tokenizer([*part, *padding]))
            embedded = self._run(embed_texts, self._model, self._parameters, tokens, lengths)
            rows.append(np.asarray(embedded)[: len(part)])
        return np.concatenate(rows)

    def caption(self, video: UInt8[np.ndarray, "B T S S 3"]) -> Callable[[], list[TextAndScore]]:
        """A caption of each clip."""
        return self._generate(self._encode(video), self._config, self._start(len(video)))

    def answer(
        self, video: UInt8[np.ndarray, "B T S S 3"], questions: Sequence[str], options: Sequence[str]
    ) -> Callable[[], list[list[TextAndScore]]]:
        """The answers of each clip to all questions: in the model's own words, or the likeliest of the options."""
        visual, room = self._encode(video), self._tokenizer.max_answer_tokens
        prefixes = [self._tokenizer.questions([question] * len(video)) for question in questions]
        if options:
            texts = self._tokenizer.answers(options)
            scores = [self._likelihoods(visual, prefix, texts, room) for prefix in prefixes]
            best = [[(options[row.argmax()], float(row.max())) for row in each] for each in scores]
            return lambda: [list(answers) for answers in zip(*best, strict=True)]
        config = dataclasses.replace(self._config, max_tokens=min(self._config.max_tokens, room))
        fetches = [self._generate(visual, config, prefix) for prefix in prefixes]
        return lambda: [list(answers) for answers in zip(*[fetch() for fetch in fetches], strict=True)]

    def likelihoods(
        self, video: UInt8[np.ndarray, "B T S S 3"], texts: Sequence[str]
    ) -> Callable[[], Float[np.ndarray, "B C"]]:
        """Log-likelihoods of texts as captions of each clip."""
        ids, longest = self._tokenizer.encode_without_bos(texts), self._tokenizer.context_length - 1
        scores = self._likelihoods(self._encode(video), self._start(len(video)), ids, longest)
        return lambda: scores

    def _start(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The prefix of captions, the start of text, for so many clips; and its lengths."""
        return np.full((count, 1), self._tokenizer.start, np.int32), np.ones(count, np.int32)

    def _encode(self, video: np.ndarray) -> VisualCache:
        return self._run(generation.cache_visual, *self._of_clips, self._place(video))

    def _generate(
        self, visual: VisualCache, config: GenerationConfig, prefix: tuple[np.ndarray, np.ndarray]
    ) -> Callable[[], list[TextAndScore]]:
        decoder, placed = self._parameters["decoder"], map(self._place, prefix)
        texts = self._run(generation.generate_texts, self._model, config, decoder, visual, None, *placed)

        def fetch() -> list[TextAndScore]:
            words = [self._tokenizer.decode(row) for row in np.asarray(texts.tokens)]
            return list(zip(words, np.asarray(texts.scores).tolist(), strict=True))

        return fetch

    def _likelihoods(
        self, visual: VisualCache, prefix: tuple[np.ndarray, np.ndarray], texts: Sequence[np.ndarray], longest: int
    ) -> np.ndarray:
        """`[B, C]`; the texts are padded to a power of two, so that few shapes are compiled."""
        count = bucket_size(len(texts), max(generation.TEXTS_AT_ONCE, len(texts)))
        padded = [*texts, *[np.zeros(0, np.int32)] * (count - len(texts))]
        ids, lengths = (np.repeat(each, len(prefix[1]), axis=0) for each in generation.stack_texts([padded], longest))
        decoder = self._parameters["decoder"]
        scores = self._run(generation.text_likelihoods, self._model, decoder, visual, None, prefix, (ids, lengths))
        return scores[:, : len(texts)]

    def _place(self, array: np.ndarray) -> jax.Array:
        return sharding.to_global({"": array}, self._mesh)[""]

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(self._precision):
            return function(*arguments)
