"""Find the moments of indexed videos that fit a text, or look like a clip.

    python -m vlab_jax.predict search "a dog catches a frisbee" --index=my_index --top=5 --html=found.html
    python -m vlab_jax.predict search --clip=goal.mp4 --index=my_index

Each hit is a line: rank, cosine, file, and from when to when. Of windows that overlap, the best is shown. JSON is one
list of objects with `file`, `start`, `end` (seconds), `score` and `path`. docs/search.md says more.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlab_jax.errors import InputError
from vlab_jax.inference.commands import common

if TYPE_CHECKING:
    from vlab_jax.inference.embedder import Embedder
    from vlab_jax.inference.search_index import Hit


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = common.add_command(subparsers, "search", __doc__, run)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    parser.add_argument("--clip", help="a video or an image to look for instead")
    parser.add_argument("--index", required=True, help="the directory of the index")
    parser.add_argument("--top", type=int, default=10, help="how many are shown (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", help="write a page with frames of what was found")
    common.add_model_arguments(parser, "(default: where the model that made the index was then)")


def run(given: argparse.Namespace) -> int:
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
    model = common.open_model_of(about, given)
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
