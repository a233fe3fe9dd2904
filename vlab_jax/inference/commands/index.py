"""Index a folder of videos, or bring its index up to date.

    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab
    python -m vlab_jax.predict index /my/videos --index=my_index --model=my_vlab --window=5 --stride=2.5

Long videos are cut into windows, which are embedded one by one. Files that are new or have changed are embedded, those
that are gone are dropped, and the rest is left as it is; killed and started again, it goes on. Files that cannot be
decoded are named, and not tried again until they change; the exit status is 2 then. docs/search.md says more.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vlab_jax.inference.commands import common

if TYPE_CHECKING:
    from vlab_jax.inference.indexing import Summary
    from vlab_jax.inference.search_index import SearchIndex

WINDOW = 10.0
_NAMED = 20  # files that cannot be decoded
_BATCHES_AT_ONCE = 4  # so that the next is under way while one is fetched


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = common.add_command(subparsers, "index", __doc__, run)
    parser.add_argument("folder", metavar="FOLDER", help="videos and images, with those in its folders")
    parser.add_argument("--index", required=True, help="the directory of the index; made where there is none")
    parser.add_argument("--window", type=float, help=f"seconds that are embedded as one (default: {WINDOW:g})")
    parser.add_argument("--stride", type=float, help="seconds from one window to the next (default: the window)")
    parser.add_argument("--retry", action="store_true", help="try files again that could not be decoded")
    parser.add_argument("--moved", action="store_true", help="the folder is the one indexed before, in another place")
    common.add_model_arguments(parser)


def run(given: argparse.Namespace) -> int:
    """Brings an index up to date; returns the exit status."""
    from vlab_jax.data.workers import default_workers
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
    model = common.open_model(given)
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
    from vlab_jax.inference.media_files import readable

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
    from vlab_jax.inference.progress import print_beside

    print_beside(line, sys.stderr)


def _bar(shares: Iterable[float], total: int) -> Iterable[float]:
    from vlab_jax.inference.progress import filled

    return filled(shares, total, total > 0, "files")
