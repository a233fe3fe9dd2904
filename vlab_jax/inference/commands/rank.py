"""Order texts by how well they describe videos.

    python -m vlab_jax.predict rank clip.mp4 --text="a dog runs" --text="a cat sleeps" --model=my_vlab
    python -m vlab_jax.predict rank holidays/ --texts=labels.txt --top=3 --model=my_vlab --json

The best comes first, behind its score: the cosine of embeddings, or with `--by=likelihood` the logarithm of how likely
the decoder holds the whole text as a caption, which favours short texts. JSON objects have `video`, `by` and `texts`, a
list of objects with `text` and `score`, or `video` and `error`.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.inference.commands import common


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = common.add_command(subparsers, "rank", __doc__, run)
    parser.add_argument("--text", action="append", default=[], help="one of the texts; give it several times")
    parser.add_argument("--texts", help="a file with further texts, one a line")
    parser.add_argument(
        "--by", choices=("similarity", "likelihood"), default="similarity", help="(default: similarity)"
    )
    parser.add_argument("--top", type=int, default=0, help="how many of the best are printed (default: all)")
    common.add_video_arguments(parser)
    common.add_model_arguments(parser)


def run(given: argparse.Namespace) -> int:
    """Prints the texts by score for each video; returns the exit status."""
    texts = [*given.text, *(_lines(given.texts) if given.texts else [])]
    if not texts:
        raise InputError('there is nothing to rank; give texts, as in --text="a dog runs", or a file of them: --texts')
    if given.top < 0:
        raise InputError(f"--top={given.top} must be at least 1, or 0 for all")
    videos = common.open_videos(given)
    rankings = common.open_model(given).rankings(videos, texts, by=given.by, on_error="skip")
    best = (dataclasses.replace(each, texts=each.texts[: given.top or None]) for each in rankings)
    return common.print_results(given, best, len(videos), str)


def _lines(path: str) -> list[str]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise InputError(f"--texts={path} cannot be read: {reason}") from error
    return [line.strip() for line in lines if line.strip()]
