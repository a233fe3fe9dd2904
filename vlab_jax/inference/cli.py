"""What the sub-commands that look at videos have in common: arguments, the model, and how results are printed."""

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import math
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vlab_jax.errors import InputError

if TYPE_CHECKING:
    from vlab_jax.inference.clips import Clip
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
    from vlab_jax.runtime.profiling import keep_compiled_programs

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
    from vlab_jax.inference.clips import Clip, media_files

    return [Clip(path, given.start, given.end) for name in given.videos for path in media_files(name)]


def print_results(given: argparse.Namespace, results: Iterable[Any], total: int, show: Callable[[Any], str]) -> int:
    """Prints the result of each video as it comes: as JSON, or as `show` says it, under its name if there are several.

    A video that could not be read is named on standard error.

    Returns:
      The exit status: 2 where some video could not be read.
    """
    from vlab_jax.inference.predictor import counted, print_beside

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


CAPTION = """Say what is to be seen in videos.

    python -m vlab_jax.predict caption clip.mp4 --model=my_vlab
    python -m vlab_jax.predict caption holidays/ pets/cat.gif --model=my_vlab --json > captions.jsonl
    python -m vlab_jax.predict caption talk.mp4 --start=60 --end=75 --model=my_vlab

JSON objects have `video`, `text` and `score`, the log-likelihood of the text (of beam search, divided by its length to
the length penalty's power), or `video` and `error`.
"""


def add_caption(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = add_command(subparsers, "caption", CAPTION, run_caption)
    add_video_arguments(parser)
    add_beams_argument(parser)
    add_model_arguments(parser)


def run_caption(given: argparse.Namespace) -> int:
    """Prints a caption of each video; returns the exit status."""
    videos = open_videos(given)
    captions = open_model(given).captions(videos, on_error="skip")
    return print_results(given, captions, len(videos), str)


ANSWER = """Answer a question on videos.

    python -m vlab_jax.predict answer clip.mp4 --question="what is the man doing?" --model=my_vlab
    python -m vlab_jax.predict answer holidays/ --question="sport?" --option=surfing --option=skiing --model=my_vlab

With options, the answer is the one that the model holds likeliest; without, it is in the model's own words. JSON
objects have `video`, `question`, `text` and `score`, as captions have it, or `video` and `error`.
"""


def add_answer(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = add_command(subparsers, "answer", ANSWER, run_answer)
    parser.add_argument("--question", required=True, help="what is asked of each video")
    parser.add_argument("--option", action="append", default=[], help="an answer to choose from; give it several times")
    add_video_arguments(parser)
    add_beams_argument(parser)
    add_model_arguments(parser)


def run_answer(given: argparse.Namespace) -> int:
    """Prints the answer of each video; returns the exit status."""
    videos = open_videos(given)
    answers = open_model(given).answers(videos, given.question, options=given.option, on_error="skip")
    return print_results(given, answers, len(videos), str)


SEARCH = """Find the moments of indexed videos that fit a text, or look like a clip.

    python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index --top=5 --html=found.html
    python -m vlab_jax.predict search --clip=goal.mp4 --index=my_index

Each hit is a line: rank, cosine, file, and from when to when. Of windows that overlap, the best is shown. JSON is one
list of objects with `file`, `start`, `end` (seconds), `score` and `path`. docs/search.md says more.
"""
if TYPE_CHECKING:
    from vlab_jax.inference.engine import Embedder
    from vlab_jax.inference.search_index import Hit


def add_search(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = add_command(subparsers, "search", SEARCH, run_search)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    parser.add_argument("--clip", help="a video or an image to look for instead")
    parser.add_argument("--index", required=True, help="the directory of the index")
    parser.add_argument("--top", type=int, default=10, help="how many are shown (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", help="write a page with frames of what was found")
    add_model_arguments(parser, "(default: where the model that made the index was then)")


def run_search(given: argparse.Namespace) -> int:
    """Prints what an index holds that is most like a text or a clip; returns the exit status."""
    if (given.text is None) == (given.clip is None):
        raise InputError('say what to look for: a text, as in search "a dog runs", or --clip=<file>')
    if given.text is not None and not given.text.strip():
        raise InputError("the text to look for is empty")
    if given.top < 1:
        raise InputError(f"--top={given.top} must be at least 1")
    if given.clip is not None and not pathlib.Path(given.clip).is_file():
        raise InputError(f"there is no file {given.clip} to look for")
    from vlab_jax.inference.search_index import open_index

    directory = pathlib.Path(given.index)
    about = open_index(directory).about
    model = open_model_of(about, given)
    index = open_index(directory)  # as it is by now
    index.check_model(model.fingerprint, given.model)
    index.check_filled()
    hits = index.search(_query(model, given.text, given.clip), given.top)
    folder = pathlib.Path(about.folder)
    print(_as_json(hits, folder) if given.json else _as_lines(hits))
    if given.html:
        _write_page(pathlib.Path(given.html), given.text or given.clip, hits, folder)
    return 0


def _query(model: "Embedder", text: str | None, clip: str | None) -> Any:
    """The vector to look for, `[E]`."""
    return model.embed_texts([text])[0] if clip is None else model.embed_videos([clip])[0]


def _write_page(path: pathlib.Path, query: str, hits: Sequence["Hit"], folder: pathlib.Path) -> None:
    from vlab_jax.inference.page import write_page

    try:
        write_page(path, query, hits, folder)
    except OSError as error:
        raise InputError(f"--html={path} cannot be written: {error.strerror}") from error
    print(f"page: {path}", file=sys.stderr)


def _as_lines(hits: Sequence["Hit"]) -> str:
    from vlab_jax.inference.page import span

    width = max(len(hit.file) for hit in hits)
    lines = [f"{rank:>3}  {hit.score:.3f}  {hit.file:<{width}}  {span(hit)}" for rank, hit in enumerate(hits, start=1)]
    return "\n".join(line.rstrip() for line in lines)


def _as_json(hits: Sequence["Hit"], folder: pathlib.Path) -> str:
    found = [{**dataclasses.asdict(hit), "path": str(folder / hit.file)} for hit in hits]
    return json.dumps(found, ensure_ascii=False, indent=2)


RANK = """Order texts by how well they describe videos.

    python -m vlab_jax.predict rank clip.mp4 --text="a dog runs" --text="a cat sleeps" --model=my_vlab
    python -m vlab_jax.predict rank holidays/ --texts=labels.txt --top=3 --model=my_vlab --json

The best comes first, behind its score: the cosine of embeddings, or with `--by=likelihood` the logarithm of how likely
the decoder holds the whole text as a caption, which favours short texts. JSON objects have `video`, `by` and `texts`, a
list of objects with `text` and `score`, or `video` and `error`.
"""


def add_rank(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = add_command(subparsers, "rank", RANK, run_rank)
    parser.add_argument("--text", action="append", default=[], help="one of the texts; give it several times")
    parser.add_argument("--texts", help="a file with further texts, one a line")
    parser.add_argument(
        "--by", choices=("similarity", "likelihood"), default="similarity", help="(default: similarity)"
    )
    parser.add_argument("--top", type=int, default=0, help="how many of the best are printed (default: all)")
    add_video_arguments(parser)
    add_model_arguments(parser)


def run_rank(given: argparse.Namespace) -> int:
    """Prints the texts by score for each video; returns the exit status."""
    texts = [*given.text, *(_lines(given.texts) if given.texts else [])]
    if not texts:
        raise InputError('there is nothing to rank; give texts, as in --text="a dog runs", or a file of them: --texts')
    if given.top < 0:
        raise InputError(f"--top={given.top} must be at least 1, or 0 for all")
    videos = open_videos(given)
    rankings = open_model(given).rankings(videos, texts, by=given.by, on_error="skip")
    best = (dataclasses.replace(each, texts=each.texts[: given.top or None]) for each in rankings)
    return print_results(given, best, len(videos), str)


def _lines(path: str) -> list[str]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise InputError(f"--texts={path} cannot be read: {reason}") from error
    return [line.strip() for line in lines if line.strip()]


INDEX = """Index a folder of videos, or bring its index up to date.

    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab
    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab --window=5 --stride=2.5

Long videos are cut into windows, which are embedded one by one. Files that are new or have changed are embedded, those
that are gone are dropped, and the rest is left as it is; killed and started again, it goes on. Files that cannot be
decoded are named, and not tried again until they change; the exit status is 2 then. docs/search.md says more.
"""
if TYPE_CHECKING:
    from vlab_jax.inference.indexing import Summary
    from vlab_jax.inference.search_index import SearchIndex

WINDOW = 10.0
_NAMED = 20  # files that cannot be decoded
_BATCHES_AT_ONCE = 4  # so that the next is under way while one is fetched


def add_index(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = add_command(subparsers, "index", INDEX, run_index)
    parser.add_argument("folder", metavar="FOLDER", help="videos and images, with those in its folders")
    parser.add_argument("--index", required=True, help="the directory of the index; made where there is none")
    parser.add_argument("--window", type=float, help=f"seconds that are embedded as one (default: {WINDOW:g})")
    parser.add_argument("--stride", type=float, help="seconds from one window to the next (default: the window)")
    parser.add_argument("--retry", action="store_true", help="try files again that could not be decoded")
    parser.add_argument("--moved", action="store_true", help="the folder is the one indexed before, in another place")
    add_model_arguments(parser)


def run_index(given: argparse.Namespace) -> int:
    """Brings an index up to date; returns the exit status."""
    from vlab_jax.data.crash_guard import default_workers
    from vlab_jax.inference import windows
    from vlab_jax.inference.indexing import folder_files, index_folder
    from vlab_jax.inference.search_index import About, recorded, writable_index

    directory, folder = pathlib.Path(given.index), pathlib.Path(given.folder).resolve()
    before = recorded(directory)
    window = given.window if given.window is not None else before.window if before else WINDOW
    as_before = before if given.window is None else None
    stride = given.stride if given.stride is not None else as_before.stride if as_before else window
    windows.check(window, stride)
    folder_files(folder)  # before a model is loaded for nothing
    if given.frames is None and before:
        given.frames = before.num_frames
    model = open_model(given)
    about = About(
        str(pathlib.Path(given.model).resolve()) if pathlib.Path(given.model).exists() else given.model,
        model.fingerprint,
        str(folder),
        model.frames.num_frames,
        model.frames.size,
        model.embed_texts([""]).shape[1],
        window,
        stride,
    )
    with writable_index(directory, about, given.moved) as index:
        workers, batch = default_workers(given.workers), _BATCHES_AT_ONCE * given.batch
        summary = index_folder(index, model, workers=workers, batch=batch, retry=given.retry, told=_tell, progress=_bar)
        print(_summary_line(summary, index))
        return _failures(index)


def _summary_line(summary: "Summary", index: "SearchIndex") -> str:
    names = ("new", "changed", "touched", "unchanged", "deleted")
    counts = [f"{getattr(summary, name)} {name}" for name in names if getattr(summary, name)]
    return (
        f"files: {', '.join(counts) or 'none indexed'}; windows embedded: {summary.windows}; "
        f"{index.directory} holds {len(index)} windows"
    )


def _failures(index: "SearchIndex") -> int:
    """Names the files that cannot be decoded; the exit status."""
    from vlab_jax.inference.clips import readable

    failures = sorted(index.failures)
    if not failures:
        return 0
    more = f" and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    files, they = ("file", "it changes") if len(failures) == 1 else ("files", "they change")
    print(
        f"error: {len(failures)} {files} cannot be decoded, and will not be tried again until {they} (or by --retry): "
        f"{', '.join(map(readable, failures[:_NAMED]))}{more}",
        file=sys.stderr,
    )
    return 2


def _tell(line: str) -> None:
    from vlab_jax.inference.predictor import print_beside

    print_beside(line, sys.stderr)


def _bar(shares: Iterable[float], total: int) -> Iterable[float]:
    from vlab_jax.inference.predictor import filled

    return filled(shares, total, total > 0, "files")


SERVE = """Open a page on this machine to search an index, watch what is found, and ask about it.

    python -m vlab_jax.predict serve --index=my_index --model=my_vlab
    python -m vlab_jax.predict serve --index=my_index --port=8000

The page is at the address that is printed, for browsers on this machine. With --host=0.0.0.0, whoever reaches this
machine by network can see the indexed videos; there is no password. It ends by Ctrl-C. docs/page.md says more.
"""
PORT, HOST = 7860, "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")


def add_serve(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = add_command(subparsers, "serve", SERVE, run_serve)
    parser.add_argument("--index", required=True, help="the directory of the index")
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any that is free (default: {PORT})")
    parser.add_argument("--host", default=HOST, help=f"the address to listen at (default: {HOST}, this machine alone)")
    add_beams_argument(parser)
    add_model_arguments(parser, "(default: where the model that made the index was then)")


def run_serve(given: argparse.Namespace) -> int:
    """Serves the page until it is interrupted; returns the exit status."""
    try:
        import uvicorn

        from vlab_jax.inference.web.app import make_app
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise InputError(
            f'the page needs the package {error.name}: pip install -e ".[page]" in the project\'s folder'
        ) from None
    from vlab_jax.inference.search_index import open_index
    from vlab_jax.inference.web.service import Service

    directory = pathlib.Path(given.index)
    about = open_index(directory).about
    with _listening(given.host, given.port) as listener, tempfile.TemporaryDirectory(prefix="vlab-jax-") as scratch:
        service = Service(directory, open_model_of(about, given), pathlib.Path(scratch))
        index = service.index()
        index.check_filled()
        address, port = listener.getsockname()[:2]
        local = ipaddress.ip_address(address).is_loopback
        if not local:
            print(f"warning: whoever reaches {given.host} by network can see {about.folder}", file=sys.stderr)
        shown = f"[{given.host}]" if ":" in given.host else given.host
        print(f"{len(index)} windows of {about.folder}: http://{shown}:{port}/ (Ctrl-C ends)", flush=True)
        config = uvicorn.Config(
            make_app(service, _HOSTS if local else ("*",)),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        # The server ends at Ctrl-C, and raises it again, or not: that depends on where its loop was.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        print("ended", file=sys.stderr)
    return 0


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InputError(f"--port={port} is no port; give one from 1024 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise InputError(f"--host={host} is no address of this machine; leave it out, or give 0.0.0.0") from None
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else error
        raise InputError(f"port {port} of {host} cannot be had ({reason}); give another --port") from None
