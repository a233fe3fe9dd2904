"""The page over HTTP: routes, what is refused, and what becomes of errors.

Other web sites that the same browser shows must not reach this server: a request has to name a host that is expected
(so that no foreign name can be pointed here), one that changes something must come from this page, and no other page
may show what comes from here. The page itself loads nothing from elsewhere; a policy holds it to that.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference.web.service import Service

MOST_ASKED, MOST_UPLOADED = 64 * 2**10, 512 * 2**20  # bytes

_HERE = pathlib.Path(__file__).parent
_PAGE = {"": "page.html", "page.css": "page.css", "page.js": "page.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def make_app(service: Service, hosts: Sequence[str]) -> Starlette:
    """The page of a service.

    Args:
      hosts: names by which the server may be asked; `*`: any.
    """

    def asked(answer: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(await run_in_threadpool(answer, await _json(request)))

        return endpoint

    async def about(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(service.about))

    async def media(request: Request) -> Response:
        try:
            path, kind = await run_in_threadpool(service.media, dict(request.query_params))
        except InputError as error:
            return _error(404, str(error))
        return FileResponse(path, media_type=kind)

    async def upload(request: Request) -> Response:
        name = request.query_params.get("name", "")
        _check_type(request, "application/octet-stream")
        path = service.new_upload(name)
        try:
            with path.open("wb") as file:
                await _receive(request, MOST_UPLOADED, file.write)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return JSONResponse(await run_in_threadpool(service.keep_upload, path, name))

    return Starlette(
        routes=[
            *(Route(f"/{url}", _static(name)) for url, name in _PAGE.items()),
            Route("/about", about),
            Route("/media", media),
            Route("/search", asked(service.search), methods=["POST"]),
            Route("/caption", asked(service.caption), methods=["POST"]),
            Route("/answer", asked(service.answer), methods=["POST"]),
            Route("/upload", upload, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(_Guard),
        ],
        exception_handlers={
            InputError: lambda request, error: _error(400, str(error)),
            RunStopped: lambda request, error: _error(500, str(error)),
            HTTPException: lambda request, error: _error(error.status_code, error.detail),
            Exception: lambda request, error: _error(500, "a fault of the program; the terminal says more"),
        },
    )


class _Guard:
    """Refuses what other sites' pages send, and adds the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        foreign = foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign and (scope["method"], scope["path"]) != ("GET", "/"):  # a link to the page is a link
            await _error(403, "this comes from another site")(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _static(name: str) -> Callable[[Request], Response]:
    path = _HERE / name

    def endpoint(request: Request) -> Response:
        return FileResponse(path, media_type=f"{_TYPES[path.suffix]}; charset=utf-8")

    return endpoint


async def _json(request: Request) -> dict[str, Any]:
    _check_type(request, "application/json")
    parts: list[bytes] = []
    await _receive(request, MOST_ASKED, parts.append)
    try:
        found = json.loads(b"".join(parts))
    except ValueError as error:
        raise InputError(f"the request is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError("the request is no JSON object")
    return found


async def _receive(request: Request, most: int, take: Callable[[bytes], Any]) -> None:
    """Gives the body of a request to `take`, part by part. Raises HTTPException where it is larger than `most`."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"this is too large; {most / 2**20:g} MiB is the limit")
        await run_in_threadpool(take, part)


def _check_type(request: Request, wanted: str) -> None:
    """Pages of other sites cannot send these types without being asked about first, which is never allowed."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != wanted:
        raise HTTPException(415, f"the request must be of type {wanted}")


def _error(status: int, message: str) -> Response:
    logging.info("%d: %s", status, message)
    return JSONResponse({"error": " ".join(message.split())}, status)
