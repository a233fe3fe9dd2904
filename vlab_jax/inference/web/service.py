"""What the page asks for: hits of a search, captions, answers, and the files to show them by.

Only files that the index knows are touched, and uploads, which lie in a folder of their own, the latest few of them.
The index is opened anew for each request, so that what `index` has added meanwhile is found.
"""

import collections
import dataclasses
import math
import pathlib
import secrets
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any, Protocol

from vlab_jax.errors import InputError
from vlab_jax.inference.clips import EXTENSIONS, Clip
from vlab_jax.inference.engine import Embedder
from vlab_jax.inference.page import span
from vlab_jax.inference.predictor import Answer, Caption
from vlab_jax.inference.search_index import Hit, SearchIndex, open_index
from vlab_jax.inference.web.playable import Playable

MOST_HITS, MOST_LETTERS, UPLOADS = 50, 1000, 4


class Model(Embedder, Protocol):
    """What the page asks of a model; `predictor.Predictor` is one."""

    name: str

    def caption(self, video: Any) -> Caption:
        """A caption of a clip."""
        ...

    def answer(self, video: Any, question: str) -> Answer:
        """The answer to a question on a clip."""
        ...

    def unknown_letters(self, text: str) -> str:
        """Letters of a text that the model's vocabulary lacks."""
        ...


@dataclasses.dataclass(frozen=True)
class Place:
    """What a request names: a part of a file, and what the user calls that file."""

    path: pathlib.Path
    name: str
    start: float
    end: float


class Service:
    """Answers requests on an index, one at a time where the model has to work.

    Args:
      directory: the index's.
      model: the one that made it.
      scratch: a folder for uploads and clips that are made; exists, is empty, and is nobody else's.
    """

    def __init__(self, directory: pathlib.Path, model: Model, scratch: pathlib.Path) -> None:
        self._directory, self._model = directory, model
        self._working = threading.Lock()
        self._uploads: collections.OrderedDict[str, pathlib.Path] = collections.OrderedDict()
        self._names: dict[str, str] = {}
        self._upload_folder = scratch / "uploads"
        for folder in (self._upload_folder, scratch / "clips"):
            folder.mkdir()
        self._playable = Playable(scratch / "clips")

    def about(self) -> dict[str, Any]:
        """Which model and which index these are."""
        index = self.index()
        return {"model": self._model.name, "folder": index.about.folder, "windows": len(index)}

    def search(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The hits of a `text`, at most `top`; and a note where the model's vocabulary lacks its letters.

        Raises:
          InputError: there is no text, or the index cannot be searched.
        """
        text, top = _text(request, "text", "write what to look for"), request.get("top", 12)
        if not isinstance(top, int) or not 1 <= top <= MOST_HITS:
            raise InputError(f"top must be a whole number from 1 to {MOST_HITS}")
        index = self.index()
        with self._working:
            vector = self._model.embed_texts([text])[0]
        hits = [self._shown_hit(index, hit) for hit in index.search(vector, top)]
        return {"hits": hits, "note": self._note(text) or ("" if hits else "the index holds nothing")}

    def caption(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be seen in a clip. Raises InputError where it cannot be read, or is not of the index."""
        place = self._place(request)
        with self._working, _Named(place):
            return _said(self._model.caption(_clip(place)))

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a `question` on a clip. Raises InputError as `caption`, and where nothing is asked."""
        question = _text(request, "question", "write a question")
        place = self._place(request)
        with self._working, _Named(place):
            return {**_said(self._model.answer(_clip(place), question)), "note": self._note(question)}

    def media(self, request: Mapping[str, Any]) -> tuple[pathlib.Path, str]:
        """A file that a browser shows of a clip, and its MIME type. Raises InputError as `caption`."""
        place = self._place(request)
        with _Named(place):
            return self._playable.file(place.path, place.start, place.end)

    def new_upload(self, name: str) -> pathlib.Path:
        """Where to write an upload. Raises InputError where its name is of no video or image."""
        suffix = pathlib.PurePath(name).suffix.lower()
        if suffix not in EXTENSIONS:
            raise InputError(f"{name[:100] or 'the file'} is no video and no image by its name (such as clip.mp4)")
        return self._upload_folder / f"{secrets.token_urlsafe(16)}{suffix}"

    def keep_upload(self, path: pathlib.Path, name: str) -> dict[str, Any]:
        """An upload that is whole: a clip to show. The oldest goes where there are too many."""
        token = path.stem
        self._names[token] = name
        self._uploads[token] = path
        while len(self._uploads) > UPLOADS:
            oldest, file = self._uploads.popitem(last=False)
            file.unlink()
            del self._names[oldest]
        place = {"upload": token, "start": 0.0, "end": None}
        return {**place, "file": name, "span": "", **self._how_shown(path, place)}

    def index(self) -> SearchIndex:
        """The index as it is by now. Raises InputError where it cannot be searched by the model."""
        index = open_index(self._directory)
        index.check_model(self._model.fingerprint, self._model.name)
        return index

    def _place(self, request: Mapping[str, Any]) -> Place:
        start, end = _seconds(request, "start", 0.0), _seconds(request, "end", math.inf)
        token, file = request.get("upload"), request.get("file")
        if token is not None:
            path = self._uploads.get(token) if isinstance(token, str) else None
            if path is None:
                raise InputError("this upload is not kept any more; upload it again")
            return Place(path, self._names[token], start, end)
        if not isinstance(file, str) or not _is_within(file) or not (index := self.index()).holds(file):
            raise InputError("the index knows no such file")
        return Place(pathlib.Path(index.about.folder) / file, file, start, end)

    def _shown_hit(self, index: SearchIndex, hit: Hit) -> dict[str, Any]:
        place = {"file": hit.file, "start": hit.start, "end": hit.end}
        said = {**place, "score": round(hit.score, 4), "span": span(hit)}
        return {**said, **self._how_shown(pathlib.Path(index.about.folder) / hit.file, place)}

    def _how_shown(self, path: pathlib.Path, place: Mapping[str, Any]) -> dict[str, Any]:
        """The kind of a clip, where to get it, and when it starts and ends in that file; or why it cannot be shown."""
        try:
            shown = self._playable.how(path)
        except InputError as error:
            return {"kind": "none", "error": str(error)}
        named = {key: value for key, value in place.items() if value is not None}
        begins = place["start"] if shown.made else 0.0  # of the file that is served
        length = None if place["end"] is None else place["end"] - begins
        url = "media?" + urllib.parse.urlencode(named)
        return {"kind": shown.kind, "url": url, "play_from": place["start"] - begins, "play_to": length}

    def _note(self, text: str) -> str:
        letters = {letter for letter in text if letter.isalpha()}
        unknown = self._model.unknown_letters(text)
        if 2 * len(unknown) <= len(letters):
            return ""
        return (
            f"the model has learned no words with {', '.join(unknown[:5])}: what comes has little to do with what was "
            "written; ask in the language of its captions"
        )


class _Named:
    """Errors name a file as its user does, not by where it lies."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError):
            named = str(error).replace(str(self._place.path), self._place.name)
            raise InputError(named.replace(self._place.path.name, pathlib.PurePath(self._place.name).name)) from error


def _is_within(file: str) -> bool:
    """Whether it is a media file's path that leads out of no folder, whatever an index may hold."""
    path = pathlib.PurePath(file)
    plain = not path.is_absolute() and ".." not in path.parts and "\0" not in file
    return plain and path.suffix.lower() in EXTENSIONS


def _clip(place: Place) -> Clip:
    return Clip(place.path, place.start, place.end)


def _said(result: Caption | Answer) -> dict[str, Any]:
    return {"text": result.text, "score": round(result.score, 3) if math.isfinite(result.score) else None}


def _text(request: Mapping[str, Any], key: str, empty: str) -> str:
    text = request.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(empty)
    if len(text) > MOST_LETTERS:
        raise InputError(f"a text has at most {MOST_LETTERS} letters; this one has {len(text)}")
    return text.strip()


def _seconds(request: Mapping[str, Any], key: str, default: float) -> float:
    value = request.get(key)
    try:
        seconds = default if value is None else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{key} is no number of seconds") from None
    if not seconds >= 0:
        raise InputError(f"{key} is no number of seconds")
    return seconds
