"""The commands `index` and `search` of `vlab_jax.predict`: their arguments, what they print, and their exit status."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vlab_jax.errors import InputError

if TYPE_CHECKING:  # the rest takes seconds to import: a mistake in the command is named at once
    from vlab_jax.inference.embedder import Embedder
    from vlab_jax.inference.indexing import Summary
    from vlab_jax.inference.search_index import Hit, SearchIndex

Load = Callable[[str], "Embedder"]  # a model from where it lies
WINDOW, SOME_FAILED, _NAMED = 10.0, 5, 20

INDEX = """Indexes a folder of videos and images, or brings its index up to date.

    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab

Files that are new or have changed are embedded, those that are gone are dropped, and the rest is left as it is. Killed
and started again, it goes on. Exit status: 0 everything is indexed; 2 something to mend; 5 all is indexed but files
that cannot be decoded, which are named, and not tried again until they change."""

SEARCH = """Finds the moments of indexed videos that fit a text, or look like a clip.

    python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index --top=5 --html=found.html
    python -m vlab_jax.predict search --clip=goal.mp4 --index=my_index

Prints rank, cosine, file and time. Exit status: 0 done; 2 something to mend."""


def add_commands(commands: Any, load: Load) -> None:
    """Adds `index` and `search` to subparsers; each sets `run`, which takes the arguments and returns the exit status.

    Args:
      commands: what `ArgumentParser.add_subparsers` returns.
      load: loads a model from the path that --model gives.
    """
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    index = commands.add_parser("index", help="index a folder of videos", description=INDEX, **options)
    index.add_argument("folder", help="videos and images, in subfolders too")
    index.add_argument("--index", required=True, help="the directory of the index; made where there is none")
    index.add_argument("--model", required=True, help="an export, or a run's workdir")
    index.add_argument("--window", type=float, help=f"seconds that are embedded together (default {WINDOW:g})")
    index.add_argument("--stride", type=float, help="seconds from one window to the next (default: the window)")
    index.add_argument("--batch", type=int, default=16, help="windows that are embedded at once (default 16)")
    index.add_argument("--workers", type=int, default=-1, help="processes that decode (default: one fewer than cores)")
    index.add_argument("--retry", action="store_true", help="try files again that could not be decoded")
    index.add_argument("--moved", action="store_true", help="the folder is the one indexed before, in another place")
    index.set_defaults(run=lambda given: run_index(given, load))
    search = commands.add_parser("search", help="search an index", description=SEARCH, **options)
    search.add_argument("text", nargs="?", help="what to look for")
    search.add_argument("--clip", help="a video or image to look for instead")
    search.add_argument("--index", required=True, help="the directory of the index")
    search.add_argument("--model", help="the model that made the index (default: from where it was then)")
    search.add_argument("--top", type=int, default=10, help="how many (default 10)")
    search.add_argument("--json", action="store_true", help="print JSON: file, path, start, end, score of each")
    search.add_argument("--html", help="write a page with frames of what was found")
    search.set_defaults(run=lambda given: run_search(given, load))


def run_index(given: argparse.Namespace, load: Load) -> int:
    """Brings an index up to date.

    Raises:
      InputError: something to mend, in one line.
    """
    from vlab_jax.data.workers import default_workers
    from vlab_jax.inference import windows
    from vlab_jax.inference.indexing import index_folder, media_files
    from vlab_jax.inference.search_index import About, recorded, writable_index

    for name, value, least in (("batch", given.batch, 1), ("workers", given.workers, -1)):
        if value < least:
            raise InputError(f"--{name}={value} must be at least {least}")
    directory, folder = pathlib.Path(given.index), pathlib.Path(given.folder).resolve()
    before = recorded(directory)
    window = given.window or (before.window if before else WINDOW)
    stride = given.stride or (before.stride if before and not given.window else window)
    windows.check(window, stride)
    media_files(folder)  # before a model is loaded for nothing
    embedder = load(given.model)
    about = About(
        str(pathlib.Path(given.model).resolve()),
        embedder.fingerprint,
        str(folder),
        embedder.frames.num_frames,
        embedder.frames.size,
        embedder.embed_texts([""]).shape[1],
        window,
        stride,
    )
    with writable_index(directory, about, given.moved) as index:
        summary = index_folder(
            index,
            embedder,
            workers=default_workers(given.workers),
            batch=given.batch,
            retry=given.retry,
            told=_tell,
            progress=_bar,
        )
        print(_summary_line(summary, index))
        return _failures(index)


def run_search(given: argparse.Namespace, load: Load) -> int:
    """Prints what an index holds that is most like a text or a clip.

    Raises:
      InputError: something to mend, in one line.
    """
    if (given.text is None) == (given.clip is None):
        raise InputError('say what to look for: a text, as in search "a dog runs", or --clip=<file>')
    if given.text is not None and not given.text.strip():
        raise InputError("the text to look for is empty")
    if given.top < 1:
        raise InputError(f"--top={given.top} must be at least 1")
    if given.clip is not None and not pathlib.Path(given.clip).is_file():
        raise InputError(f"there is no file {given.clip} to look for")
    from vlab_jax.inference.search_index import open_index

    index = open_index(pathlib.Path(given.index))
    if not len(index):
        raise InputError(f"the index in {given.index} is empty; fill it by python -m vlab_jax.predict index")
    model = given.model or index.about.model
    embedder = load(model)
    index.check_model(embedder.fingerprint, model)
    hits = index.search(_query(embedder, given.text, given.clip), given.top)
    folder = pathlib.Path(index.about.folder)
    print(_as_json(hits, folder) if given.json else _as_lines(hits))
    if given.html:
        _write_page(pathlib.Path(given.html), given.text or given.clip, hits, folder)
    return 0


def _query(embedder: "Embedder", text: str | None, clip: str | None) -> Any:
    """The vector to look for, `[E]`."""
    from vlab_jax.data.video import DecodeError

    if clip is None:
        return embedder.embed_texts([text])[0]
    try:
        return embedder.embed_videos([clip])[0]
    except DecodeError as error:
        raise InputError(f"--clip={clip}: {error}") from error


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


def _summary_line(summary: "Summary", index: "SearchIndex") -> str:
    names = ("new", "changed", "touched", "unchanged", "deleted")
    counts = [f"{getattr(summary, name)} {name}" for name in names if getattr(summary, name)]
    return (
        f"files: {', '.join(counts) or 'none indexed'}; windows embedded: {summary.windows}; "
        f"{index.directory} holds {len(index)} windows"
    )


def _failures(index: "SearchIndex") -> int:
    """Names the files that cannot be decoded; the exit status."""
    failures = sorted(index.failures)
    if not failures:
        return 0
    more = f" and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    one = len(failures) == 1
    print(
        f"{len(failures)} {'file' if one else 'files'} cannot be decoded, and will not be tried again until "
        f"{'it changes' if one else 'they change'} (or by --retry): {', '.join(failures[:_NAMED])}{more}",
        file=sys.stderr,
    )
    return SOME_FAILED


def _tell(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _bar(files: Iterable[Any], total: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(files, total=total, desc="indexing", unit=" files", mininterval=1.0 if sys.stderr.isatty() else 30.0)
