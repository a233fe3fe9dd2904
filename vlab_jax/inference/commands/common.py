"""What the sub-commands that look at videos have in common: arguments, the model, and how results are printed."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlab_jax.inference.clip import Clip
    from vlab_jax.inference.predictor import Predictor
    from vlab_jax.inference.search_index import About


def add_command(
    subparsers: Any, name: str, text: str | None, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A sub-command; `text` is its module's docstring, the first line of which is shown in the list of them."""
    text = text or ""
    parser = subparsers.add_parser(
        name,
        help=text.splitlines()[0].rstrip("."),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Which model, and how it is used; with `default`, a command may find one itself, and this says which."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        required=not default,
        help="a directory that vlab_jax.export wrote, a run's workdir or its checkpoints/<step>, or a model on the hub "
        + default,
    )
    group.add_argument("--frames", type=int, help="frames of a clip that are looked at (default: as in training)")
    group.add_argument("--batch", type=int, default=8, help="clips at once (default: 8)")
    group.add_argument(
        "--workers", type=int, default=-1, help="processes that decode many clips (default: cores less two)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: as in training)")


def add_beams_argument(parser: argparse.ArgumentParser) -> None:
    """How texts are written."""
    parser.add_argument("--beams", type=int, help="of beam search; 1 is greedy (default: as the run was evaluated)")


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Which videos, and how results are printed."""
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="a video, an image, or a folder of them, with those in its folders"
    )
    parser.add_argument("--start", type=float, default=0.0, help="seconds from the beginning (default: 0)")
    parser.add_argument("--end", type=float, default=math.inf, help="seconds from the beginning (default: the end)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each video, one a line")


def open_model(given: argparse.Namespace) -> "Predictor":
    """The model that the arguments name.

    Raises:
      InputError: there is none, or it cannot be used so.
    """
    from vlab_jax.inference.predictor import Predictor  # here, because all this takes seconds
    from vlab_jax.runtime.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    return Predictor.load(
        given.model,
        frames=given.frames,
        beams=getattr(given, "beams", None),
        batch_size=given.batch,
        workers=given.workers,
        dtype=given.dtype,
    )


def open_model_of(about: "About", given: argparse.Namespace) -> "Predictor":
    """The model that made an index, from where it was then unless the arguments name another place.

    Raises:
      InputError: as `open_model`.
    """
    given.model = given.model or about.model
    given.frames = about.num_frames if given.frames is None else given.frames
    return open_model(given)


def open_videos(given: argparse.Namespace) -> "list[Clip]":
    """The videos that the arguments name, folders as the files in them.

    Raises:
      InputError: a folder holds none, or there is nothing between `--start` and `--end`.
    """
    from vlab_jax.inference.clip import Clip
    from vlab_jax.inference.media_files import media_files

    return [Clip(path, given.start, given.end) for name in given.videos for path in media_files(name)]


def print_results(given: argparse.Namespace, results: Iterable[Any], total: int, show: Callable[[Any], str]) -> int:
    """Prints the result of each video as it comes: as JSON, or as `show` says it, under its name if there are several.

    A video that could not be read is named on standard error.

    Returns:
      The exit status: 2 where some video could not be read.
    """
    from vlab_jax.inference.progress import counted, print_beside

    failed = 0
    for result in counted(results, total, total > 1):
        fields = {key: value for key, value in dataclasses.asdict(result).items() if value != ""}
        if result.error:
            failed += 1
            print_beside(f"error: {result.error}", sys.stderr)
            fields = {"video": result.video, "error": result.error}
        if given.json:
            print_beside(json.dumps(fields, ensure_ascii=False), sys.stdout)
        elif not result.error:
            print_beside(_under_name(result.video, show(result)) if total > 1 else show(result), sys.stdout)
    return 2 if failed else 0


def _under_name(name: str, text: str) -> str:
    return f"{name}:\n{text}" if "\n" in text else f"{name}: {text}"
