"""The page of `python -m vlab_jax.predict serve`, made with Gradio: search an index, play the hits, ask about them.

Gradio serves much that this page does not need, such as files by their paths. A filter before it accepts only the
page's own requests, refuses those of other web sites, and forbids the browser to load anything from another server.
No request names a file: what is shown has a token.
"""

import contextlib
import functools
import html
import ipaddress
import math
import os
import pathlib
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vlab_jax.data.media import DecodeError
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference.browser import Moment, Moments
from vlab_jax.inference.clips import Clip, is_media_name
from vlab_jax.inference.search_index import SearchIndex, open_index

MAX_HITS, MAX_UPLOAD = 12, "512mb"

_OWN_REQUESTS = re.compile(
    r"/|/theme\.css|/favicon\.ico|/media/\w+|/(assets|static)/(?!.*\.\.).*"
    r"|/gradio_api/(upload|queue/join|queue/data|heartbeat/\w+)"
)
_HEADERS = {
    "content-security-policy": (  # scripts and styles lie within Gradio's page
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_CSS = """
#hits { flex-wrap: wrap; } #hits video, #hits img { aspect-ratio: 4 / 3; }
video, img { width: 100%; max-height: 45vh; background: #000; object-fit: contain; }
#hits p, #player p { overflow-wrap: anywhere; margin: 0; }
"""


def serve(index: SearchIndex, model: Any, host: str, port: int) -> None:
    """Serves the page until Ctrl-C, with the `Predictor` that made the index; port 0 is any that is free.

    Raises InputError where the host is no address of this machine, or the port is taken.
    """
    with _listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="vlab-jax-") as scratch:
        address, port = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(address).is_loopback
        if not is_local:
            print(f"warning: whoever reaches {host} by network can see {index.info.folder}", file=sys.stderr)
        app = make_app(index.directory, model, pathlib.Path(scratch), is_local)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        print(f"{len(index)} windows of {index.info.folder}: {url} (Ctrl-C ends)", flush=True)
        options = {"access_log": False, "server_header": False, "timeout_graceful_shutdown": 2}
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **options))
        # The server ends at Ctrl-C, and raises it again or not, depending on where its loop was.
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        print("ended", file=sys.stderr)


def make_app(
    index_directory: pathlib.Path, model: Any, scratch: pathlib.Path, is_local: bool = True
) -> fastapi.FastAPI:
    """The page as an ASGI application.

    Args:
      scratch: an empty folder for uploads and for clips that are made.
      is_local: requests have to call the server by a name of this machine, so that no foreign name can point here.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"], os.environ["GRADIO_TEMP_DIR"] = "False", str(scratch / "uploads")
    (scratch / "made").mkdir()
    moments = Moments(scratch / "made")
    app = fastapi.FastAPI(openapi_url=None)

    @app.get("/media/{token}")
    def media(token: str) -> fastapi.Response:
        try:
            path, mime = moments.file(token)
        except (KeyError, DecodeError, OSError) as error:
            raise fastapi.HTTPException(404) from error
        return fastapi.responses.FileResponse(path, media_type=mime)

    @app.middleware("http")
    async def filter_requests(request: fastapi.Request, respond: Any) -> fastapi.Response:
        origin, path = request.headers.get("origin"), request.scope["path"]
        is_foreign = request.headers.get("sec-fetch-site") in ("cross-site", "same-site") or (
            origin is not None and origin.partition("://")[2] != request.headers.get("host")
        )
        if is_foreign and (request.method, path) != ("GET", "/"):  # a link to the page may stand anywhere
            response = fastapi.responses.PlainTextResponse("this request comes from another site", 403)
        elif not _OWN_REQUESTS.fullmatch(path):
            response = fastapi.responses.PlainTextResponse("the page has no such address", 404)
        else:
            response = await respond(request)
        response.headers.update(_HEADERS)
        return response

    if is_local:
        names = ["127.0.0.1", "localhost", "[::1]", "::1"]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    page = make_page(index_directory, model, moments)
    options = {"footer_links": [], "run_history": False, "show_error": False, "ssr_mode": False, "mcp_server": False}
    return gr.mount_gradio_app(app, page, "/", max_file_size=MAX_UPLOAD, css=_CSS, **options)


def make_page(index_directory: pathlib.Path, model: Any, moments: Moments) -> gr.Blocks:
    """The page itself. One function of it runs at a time, because the model does one thing at a time."""

    def current_index() -> SearchIndex:
        index = open_index(index_directory)  # anew, to find what `predict index` has added meanwhile
        index.check(model.fingerprint, model.name)
        return index

    def describe_index() -> str:
        index = current_index()
        folder, name = (pathlib.PurePath(path).name for path in (index.info.folder, model.name))
        return _as_text(f"{len(index)} windows of {folder}, by {name}")

    def search(text: str) -> list[Any]:
        with _errors_on_page():
            if not text.strip():
                raise InputError("write what to look for")
            index = current_index()
            hits = index.search(model.embed_texts([text])[0], MAX_HITS)
        _warn_of_unknown_letters(model, text)
        folder = pathlib.Path(index.info.folder)
        found = [
            Moment(folder / hit.file, hit.file, hit.start, hit.end, f"{hit.span} {hit.score:.3f}")
            for hit in hits
            if _is_within(hit.file)
        ]
        columns = [gr.Column(visible=number < len(found)) for number in range(MAX_HITS)]
        return [found, *columns, *map(show, found), *[""] * (MAX_HITS - len(found))]

    def show(moment: Moment) -> str:
        try:
            token = moments.add(moment)
        except OSError as error:
            player = f"<p>{_as_text(error.strerror or '')}</p>"
        else:
            interval = f"#t={moment.start:.3f},{moment.end:.3f}"  # a clip that is made is this interval already
            address = f"media/{token}{interval if moment.browser_type and moment.end < math.inf else ''}"
            player = f'<video src="{address}" controls muted playsinline preload="metadata"></video>'
            if moment.is_image:
                player = f'<img src="{address}" alt="">'
        return f"<div>{player}<p>{_as_text(moment.name)}</p><p>{_as_text(moment.note)}</p></div>"

    def choose(number: int, found: list[Moment]) -> list[Any]:
        return open_moment(found[number])

    def receive(path: str) -> list[Any]:
        file = pathlib.Path(path)
        with _errors_on_page():
            if not is_media_name(file.name):
                raise InputError(f"{file.name} is no video and no image by its name (such as clip.mp4)")
        return open_moment(Moment(file, file.name))

    def open_moment(moment: Moment) -> list[Any]:
        return [moment, gr.Column(visible=True), show(moment), "", "", ""]

    def describe(moment: Moment) -> str:
        with _errors_on_page(moment):
            return model.caption(Clip(moment.path, moment.start, moment.end)).text or "(the model says nothing)"

    def answer(moment: Moment, question: str) -> str:
        with _errors_on_page(moment):
            if not question.strip():
                raise InputError("write a question")
            clip = Clip(moment.path, moment.start, moment.end)
            text = model.answer(clip, question.strip()).text
        _warn_of_unknown_letters(model, question)
        return text

    async def keep(path: str) -> str:
        return path  # Gradio's own function would also fetch a URL that a request names

    with gr.Blocks(
        title="Search in videos", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as page:
        found, chosen = gr.State([]), gr.State(None)
        with gr.Row():
            text = gr.Textbox(placeholder="What to look for", container=False, scale=4, autofocus=True, elem_id="text")
            search_button = gr.Button("Search", min_width=80, elem_id="search")
            upload = gr.UploadButton("Ask about another video", min_width=260, elem_id="upload")
            upload.async_move_resource_to_block_cache = keep
        gr.Markdown(describe_index, elem_id="about")
        with gr.Row():
            with gr.Column(scale=3), gr.Row(elem_id="hits"):
                columns, players, buttons = [], [], []
                for _ in range(MAX_HITS):
                    with gr.Column(visible=False, min_width=220) as column:
                        players.append(gr.Markdown())
                        buttons.append(gr.Button("Describe, ask", size="sm"))
                    columns.append(column)
            with gr.Column(visible=False, min_width=380) as panel:
                player = gr.Markdown(elem_id="player")
                caption = gr.Textbox(label="Caption", interactive=False, elem_id="caption")
                question = gr.Textbox(label="A question about this clip", elem_id="question")
                ask = gr.Button("Ask", size="sm", elem_id="ask")
                answered = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
        on = functools.partial(gr.on, api_visibility="private", concurrency_id="model", concurrency_limit=1)
        on([text.submit, search_button.click], search, text, [found, *columns, *players])
        opened = [chosen, panel, player, caption, question, answered]
        for number, button in enumerate(buttons):
            on(button.click, functools.partial(choose, number), found, opened).success(describe, chosen, caption)
        on(upload.upload, receive, upload, opened).success(describe, chosen, caption)
        on([question.submit, ask.click], answer, [chosen, question], answered)
    return page


@contextlib.contextmanager
def _errors_on_page(moment: Moment | None = None) -> Iterator[None]:
    """Errors become messages on the page, and name a file as its user does, not by where it lies."""
    try:
        yield
    except (InputError, RunStopped) as error:
        text = str(error).replace(str(moment.path), moment.name) if moment else str(error)
        raise gr.Error(_as_text(text), print_exception=False) from error


def _warn_of_unknown_letters(model: Any, text: str) -> None:
    unknown = model.unknown_letters(text)
    if 2 * len(unknown) > len({letter for letter in text if letter.isalpha()}):
        gr.Warning(
            f"the model has learned no words with {_as_text(', '.join(unknown[:5]))}: what comes has little to do with "
            "what was written; ask in the language of its captions"
        )


def _as_text(text: str) -> str:
    """HTML that shows a text as it is, on one line: a blank line would end the HTML within Markdown."""
    return html.escape(" ".join(text.split()))


def _is_within(file: str) -> bool:
    """Whether it is a media file's path that leads out of no folder; an index may come from somebody else."""
    path = pathlib.PurePath(file)
    return not path.is_absolute() and ".." not in path.parts and is_media_name(file)


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
