"""The commands of `python -m vlab_jax.predict`.

A command is a function of the parsed arguments that returns the exit status; its docstring is the help text. Slow
imports are within functions, so that help is shown at once.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import math
import pathlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vlab_jax.errors import InputError

if TYPE_CHECKING:
    from vlab_jax.inference.clips import Clip
    from vlab_jax.inference.predictor import Predictor
    from vlab_jax.inference.search_index import SearchIndex

WINDOW = 10.0  # seconds
_MAX_NAMED = 20  # files that cannot be decoded
_BATCHES_AT_ONCE = 4  # so that the device computes one batch while another is fetched


def add_commands(subparsers: Any) -> None:
    """Adds the parser of each command, with the command's function as its default `run`."""
    for command, arguments in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        layout = {"description": text, "formatter_class": argparse.RawDescriptionHelpFormatter}
        parser = subparsers.add_parser(command.__name__, help=text.splitlines()[0].rstrip("."), **layout)
        for name, settings in arguments:
            parser.add_argument(name, **settings)
        parser.set_defaults(run=command)


def open_model(args: argparse.Namespace) -> "Predictor":
    """The model that the arguments name; raises as `Predictor.load`."""
    from vlab_jax.inference.predictor import Predictor
    from vlab_jax.runtime.profiling import keep_compiled_programs

    keep_compiled_programs()
    options = {"frames": args.frames, "beams": getattr(args, "beams", None), "dtype": args.dtype}
    return Predictor.load(args.model, batch_size=args.batch, workers=args.workers, **options)


def _open_index_and_model(args: argparse.Namespace) -> "tuple[SearchIndex, Predictor]":
    """An index and the model that made it, from the place it had then unless the arguments name another."""
    from vlab_jax.inference.search_index import open_index

    info = open_index(pathlib.Path(args.index)).info
    args.model = args.model or info.model
    args.frames = info.num_frames if args.frames is None else args.frames
    model = open_model(args)
    index = open_index(pathlib.Path(args.index))  # it may have grown while the model was loaded
    index.check(model.fingerprint, args.model)
    return index, model


def _open_videos(args: argparse.Namespace) -> "list[Clip]":
    """The videos that the arguments name, and those below the folders that they name."""
    from vlab_jax.inference.clips import Clip, media_files

    return [Clip(path, args.start, args.end) for name in args.videos for path in media_files(name)]


def _print_results(args: argparse.Namespace, results: Iterable[Any], total: int) -> int:
    """Prints each result as it comes: as JSON, or as text, with the video's name if there are several.

    The reasons why videos could not be read go to standard error. The exit status is 2 where there are such videos.
    """
    status, interval = 0, 0.2 if sys.stderr.isatty() else 10.0
    for result in tqdm(results, total=total, disable=total < 2, unit=" clips", mininterval=interval):
        fields = {key: value for key, value in dataclasses.asdict(result).items() if value != ""}
        text = str(result)
        if total > 1:
            text = f"{result.video}:\n{text}" if "\n" in text else f"{result.video}: {text}"
        if result.error:
            status = 2
            tqdm.write(f"error: {result.error}", file=sys.stderr)
            fields = {"video": result.video, "error": result.error}
        if args.json or not result.error:
            # A terminal may show the bar where the line belongs.
            write = tqdm.write if sys.stdout.isatty() and sys.stderr.isatty() else functools.partial(print, flush=True)
            write(json.dumps(fields, ensure_ascii=False) if args.json else text)
    return status


def caption(args: argparse.Namespace) -> int:
    """Describe videos.

        python -m vlab_jax.predict caption clip.mp4 --model=my_vlab
        python -m vlab_jax.predict caption holidays/ pets/cat.gif --model=my_vlab --json > captions.jsonl
        python -m vlab_jax.predict caption talk.mp4 --start=60 --end=75 --model=my_vlab

    JSON objects have `video`, `text` and `score`, the log-likelihood of the text (with beam search, divided by its
    length to the length penalty's power), or `video` and `error`.
    """
    videos = _open_videos(args)
    return _print_results(args, open_model(args).captions(videos, on_error="skip"), len(videos))


def answer(args: argparse.Namespace) -> int:
    """Answer a question on videos.

        python -m vlab_jax.predict answer clip.mp4 --question="what is the man doing?" --model=my_vlab
        python -m vlab_jax.predict answer holidays/ --question="sport?" --option=surfing --option=skiing --model=my_vlab

    With options, the answer is the one that the model finds likeliest; without, it is in the model's own words. JSON
    objects have `video`, `question`, `text` and `score` (as for captions), or `video` and `error`.
    """
    videos = _open_videos(args)
    answers = open_model(args).answers(videos, args.question, options=args.option, on_error="skip")
    return _print_results(args, answers, len(videos))


def rank(args: argparse.Namespace) -> int:
    """Order texts by how well they describe videos.

        python -m vlab_jax.predict rank clip.mp4 --text="a dog runs" --text="a cat sleeps" --model=my_vlab
        python -m vlab_jax.predict rank holidays/ --texts=labels.txt --top=3 --model=my_vlab --json

    Each text is printed behind its score, the best first. The score is the cosine of the embeddings, or with
    `--by=likelihood` the log-likelihood of the whole text as a caption, by the decoder, which favours short texts. JSON
    objects have `video`, `by` and `texts`, a list of objects with `text` and `score`, or `video` and `error`.
    """
    texts = [*args.text, *(_read_lines(args.texts) if args.texts else [])]
    if not texts:
        raise InputError('there is nothing to rank; give texts, as in --text="a dog runs", or a file of them: --texts')
    if args.top < 0:
        raise InputError(f"--top={args.top} must be at least 1, or 0 for all")
    videos = _open_videos(args)
    rankings = open_model(args).rankings(videos, texts, by=args.by, on_error="skip")
    best = (dataclasses.replace(each, texts=each.texts[: args.top or None]) for each in rankings)
    return _print_results(args, best, len(videos))


def _read_lines(path: str) -> list[str]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise InputError(f"--texts={path} cannot be read: {reason}") from error
    return [line.strip() for line in lines if line.strip()]


def index(args: argparse.Namespace) -> int:
    """Index a folder of videos, or bring its index up to date.

        python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab
        python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab --window=5 --stride=2.5

    Long videos are cut into windows, and each window is embedded. A later run embeds the files that are new or have
    changed, and drops those that are gone; a run that was killed goes on where it stopped. Files that cannot be decoded
    are named, and not tried again until they change; the exit status is 2 then. docs/search.md says more.
    """
    from vlab_jax.data.crash_guard import default_workers
    from vlab_jax.inference.clips import check_windows
    from vlab_jax.inference.indexing import folder_files, index_folder, printable
    from vlab_jax.inference.search_index import IndexInfo, read_info, writable_index

    directory, folder = pathlib.Path(args.index), pathlib.Path(args.folder).resolve()
    existing = read_info(directory)
    window = stride = WINDOW if args.window is None else args.window
    if existing and args.window is None:
        window, stride = existing.window, existing.stride
    stride = stride if args.stride is None else args.stride
    check_windows(window, stride)
    folder_files(folder)  # fails now rather than after the model is loaded
    if existing and args.frames is None:
        args.frames = existing.num_frames
    model = open_model(args)
    place = str(pathlib.Path(args.model).resolve()) if pathlib.Path(args.model).exists() else args.model
    width = model.embed_videos([]).shape[1]
    info = IndexInfo(place, model.fingerprint, str(folder), *model.frames, width, window, stride)
    with writable_index(directory, info, args.moved) as opened:
        workers, batch = default_workers(args.workers), _BATCHES_AT_ONCE * args.batch
        counts = index_folder(opened, model.embed_videos, workers, batch, args.retry)
        print(f"{counts}; {directory} holds {len(opened)} windows")
        failures = sorted(opened.failures)
    if not failures:
        return 0
    named = ", ".join(map(printable, failures[:_MAX_NAMED])) + (", ..." if len(failures) > _MAX_NAMED else "")
    files, they = ("file", "it changes") if len(failures) == 1 else ("files", "they change")
    raise InputError(
        f"{len(failures)} {files} cannot be decoded, and will not be tried again until {they} (or by --retry): {named}"
    )


def search(args: argparse.Namespace) -> int:
    """Find the moments of indexed videos that fit a text, or look like a clip.

        python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index --top=5 --html=found.html
        python -m vlab_jax.predict search --clip=goal.mp4 --index=my_index

    Each line is a hit: its rank, cosine, file and time span. Of windows that overlap, the best is shown. JSON is one
    list of objects with `file`, `start`, `end` (seconds), `score` and `path`. docs/search.md says more.
    """
    if (args.text is None) == (args.clip is None):
        raise InputError('say what to look for: a text, as in search "a dog runs", or --clip=<file>')
    if args.text is not None and not args.text.strip():
        raise InputError("the text to look for is empty")
    if args.top < 1:
        raise InputError(f"--top={args.top} must be at least 1")
    if args.clip is not None and not pathlib.Path(args.clip).is_file():
        raise InputError(f"there is no file {args.clip} to look for")
    from vlab_jax.inference.browser import write_hits

    index, model = _open_index_and_model(args)
    query = model.embed_texts([args.text])[0] if args.clip is None else model.embed_videos([args.clip])[0]
    hits, folder = index.search(query, args.top), pathlib.Path(index.info.folder)
    if args.json:
        found = [{**dataclasses.asdict(hit), "path": str(folder / hit.file)} for hit in hits]
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        width = max((len(hit.file) for hit in hits), default=0)
        for place, hit in enumerate(hits, start=1):
            print(f"{place:>3}  {hit.score:.3f}  {hit.file:<{width}}  {hit.span}".rstrip())
    if args.html:
        try:
            write_hits(pathlib.Path(args.html), args.text or args.clip, hits, folder)
        except OSError as error:
            raise InputError(f"--html={args.html} cannot be written: {error.strerror}") from error
        print(f"page: {args.html}", file=sys.stderr)
    return 0


def serve(args: argparse.Namespace) -> int:
    """Open a page on this machine to search an index, watch the hits, and ask about them.

        python -m vlab_jax.predict serve --index=my_index --model=my_vlab
        python -m vlab_jax.predict serve --index=my_index --port=8000

    The page is for browsers on this machine, at the address that is printed. With --host=0.0.0.0, everyone who reaches
    this machine by network can see the indexed videos; there is no password. Ctrl-C ends it. docs/page.md says more.
    """
    try:
        from vlab_jax.inference import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vlab_jax":
            raise
        raise InputError(
            f'the page needs the package {error.name}: pip install -e ".[page]" in the project\'s folder'
        ) from None
    index, model = _open_index_and_model(args)
    page.serve(index, model, args.host, args.port)
    return 0


def _argument(name: str, text: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return name, {"help": text, **options}


_PLACES = "a directory that vlab_jax.export wrote, a run's workdir or its checkpoints/<step>, or a model on the hub"
_MODEL = [
    _argument("--model", _PLACES, required=True),
    _argument("--frames", "frames of a clip that the model sees (default: as in training)", type=int),
    _argument("--batch", "clips at once (default: 8)", type=int, default=8),
    _argument("--workers", "processes that decode many clips (default: two fewer than cores)", type=int, default=-1),
    _argument("--dtype", "to compute in (default: as in training)", choices=("float32", "bfloat16")),
]
_MODEL_OF_INDEX = [_argument("--model", f"{_PLACES} (default: the index's, at the place it had then)"), *_MODEL[1:]]
_BEAMS = _argument("--beams", "of beam search; 1 is greedy (default: as the run was evaluated)", type=int)
_INDEX = _argument("--index", "the directory of the index", required=True)
_VIDEOS = [
    _argument("videos", "a video, an image, or a folder with such files below it", nargs="+", metavar="VIDEO"),
    _argument("--start", "seconds from the beginning (default: 0)", type=float, default=0.0),
    _argument("--end", "seconds from the beginning (default: the end)", type=float, default=math.inf),
    _argument("--json", "print a JSON object for each video, one a line", action="store_true"),
]
COMMANDS = {
    caption: [*_VIDEOS, _BEAMS, *_MODEL],
    answer: [
        _argument("--question", "the question on each video", required=True),
        _argument("--option", "an answer to choose from; repeat it for others", action="append", default=[]),
        *_VIDEOS,
        _BEAMS,
        *_MODEL,
    ],
    rank: [
        _argument("--text", "one of the texts; repeat it for others", action="append", default=[]),
        _argument("--texts", "a file with further texts, one a line"),
        _argument(
            "--by", "the score (default: similarity)", choices=("similarity", "likelihood"), default="similarity"
        ),
        _argument("--top", "how many of the best are printed (default: all)", type=int, default=0),
        *_VIDEOS,
        *_MODEL,
    ],
    index: [
        _argument("folder", "a folder with videos and images below it", metavar="FOLDER"),
        _INDEX,
        _argument("--window", f"seconds that are embedded as one (default: {WINDOW:g})", type=float),
        _argument("--stride", "seconds from one window to the next (default: the window)", type=float),
        _argument("--retry", "try again to decode files that have failed", action="store_true"),
        _argument("--moved", "the folder was indexed before, at another place", action="store_true"),
        *_MODEL,
    ],
    search: [
        _argument("text", "a text to look for", nargs="?", metavar="TEXT"),
        _argument("--clip", "a video or an image to look for instead"),
        _INDEX,
        _argument("--top", "how many hits are shown (default: 10)", type=int, default=10),
        _argument("--json", "print JSON", action="store_true"),
        _argument("--html", "write a page with frames of the hits to this file"),
        *_MODEL_OF_INDEX,
    ],
    serve: [
        _INDEX,
        _argument("--port", "0: any free port (default: 7860)", type=int, default=7860),
        _argument("--host", "the address to listen at (default: 127.0.0.1, this machine alone)", default="127.0.0.1"),
        _BEAMS,
        *_MODEL_OF_INDEX,
    ],
}
