"""Answer a question on videos.

    python -m vlab_jax.predict answer clip.mp4 --question="what is the man doing?" --model=my_vlab
    python -m vlab_jax.predict answer holidays/ --question="sport?" --option=surfing --option=skiing --model=my_vlab

With options, the answer is the one that the model holds likeliest; without, it is in the model's own words. JSON
objects have `video`, `question`, `text` and `score`, as captions have it, or `video` and `error`.
"""

import argparse
from typing import Any

from vlab_jax.inference.commands import common


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = common.add_command(subparsers, "answer", __doc__, run)
    parser.add_argument("--question", required=True, help="what is asked of each video")
    parser.add_argument("--option", action="append", default=[], help="an answer to choose from; give it several times")
    common.add_video_arguments(parser)
    common.add_beams_argument(parser)
    common.add_model_arguments(parser)


def run(given: argparse.Namespace) -> int:
    """Prints the answer of each video; returns the exit status."""
    videos = common.open_videos(given)
    answers = common.open_model(given).answers(videos, given.question, options=given.option, on_error="skip")
    return common.print_results(given, answers, len(videos), str)
