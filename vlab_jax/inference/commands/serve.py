"""Open a page on this machine to search an index, watch what is found, and ask about it.

    python -m vlab_jax.predict serve --index=my_index --model=my_vlab
    python -m vlab_jax.predict serve --index=my_index --port=8000

The page is at the address that is printed, for browsers on this machine. With --host=0.0.0.0, whoever reaches this
machine by network can see the indexed videos; there is no password. It ends by Ctrl-C. docs/page.md says more.
"""

import argparse
import contextlib
import ipaddress
import os
import pathlib
import socket
import sys
import tempfile
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.inference.commands import common

PORT, HOST = 7860, "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command."""
    parser = common.add_command(subparsers, "serve", __doc__, run)
    parser.add_argument("--index", required=True, help="the directory of the index")
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any that is free (default: {PORT})")
    parser.add_argument("--host", default=HOST, help=f"the address to listen at (default: {HOST}, this machine alone)")
    common.add_beams_argument(parser)
    common.add_model_arguments(parser, "(default: where the model that made the index was then)")


def run(given: argparse.Namespace) -> int:
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
        service = Service(directory, common.open_model_of(about, given), pathlib.Path(scratch))
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
