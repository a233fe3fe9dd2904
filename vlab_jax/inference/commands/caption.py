"""Say what is to be seen in videos.

    python -m vlab_jax.predict caption clip.mp4 --model=my_vlab
    python -m vlab_jax.predict caption holidays/ pets/cat.gif --model=my_vlab --json > captions.jsonl
    python -m vlab_jax.predict caption talk.mp4 --start=60 --end=75 --model=my_vlab

JSON objects have `video`, `text` and `score`, the log-likelihood of the text (of beam search, divided by its length to
the length penalty's power), or `video` and `error`.
"""

import argparse
from typing import Any

from vlab_jax.inference.commands import common


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = common.add_command(subparsers, "caption", __doc__, run)
    common.add_video_arguments(parser)
    common.add_beams_argument(parser)
    common.add_model_arguments(parser)


def run(given: argparse.Namespace) -> int:
    """Prints a caption of each video; returns the exit status."""
    videos = common.open_videos(given)
    captions = common.open_model(given).captions(videos, on_error="skip")
    return common.print_results(given, captions, len(videos), str)
