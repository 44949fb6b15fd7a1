"""Serves a run as a page and an endpoint, by default on this machine only."""

import ctypes
import errno
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from captionscale.errors import UserError
from captionscale.files import temp_folder
from captionscale.progress import say, spinner

# Of malloc.h.
_M_MMAP_THRESHOLD = -3
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    run: Path,
    *,
    checkpoint: str,
    others: Sequence[Path],
    host: str,
    port: int,
    share: bool,
    shards: str | None,
    allowed: Sequence[str],
) -> None:
    """Serve the page and the endpoint until a signal comes; the options are those of `captionscale demo`.

    Raises:
        UserError: A missing package or run, a port in use, or no public link.
    """
    needed = ("gradio", "fastapi", "fastapi_offline", "uvicorn")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(
            f"demo: {', '.join(missing)} is not installed, expected it for the page;"
            " pip install 'captionscale[demo]'"
        )
    # First, as everything else takes seconds.
    with closing(_listen(host, port)) as listening, temp_folder("demo") as folder:
        _return_freed_memory()
        # Read when gradio is imported. All that it writes is deleted with this folder, even after a kill.
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
        with spinner("making the page ready"):
            from captionscale.tools.ensemble import open_ensemble

            # Before gradio, whose import takes seconds.
            members = open_ensemble(run, others, checkpoint=checkpoint, overrides=[])
            from captionscale.tools.demo.connections import Server
            from captionscale.tools.demo.origins import OriginMiddleware
            from captionscale.tools.demo.page import open_app

            app, service = open_app(members, run.resolve().name, shards)
        public = _announce(host, listening.getsockname()[1], share)
        app.add_middleware(OriginMiddleware, host=host, allowed=allowed, secure=public)
        # uvicorn shuts down at these signals, then raises them again.
        before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            Server(app, lambda: shutil.rmtree(folder, ignore_errors=True)).run(sockets=[listening])
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        service.close()


def _return_freed_memory() -> None:
    """Have glibc return freed blocks of 1 MB and more: it would keep those of decoded images."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _listen(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port < 2**16:
            raise OSError("no such port")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: in use by another program, expected a free one; choose another, or 0 for any"
            ) from None
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error}), expected an address of this machine"
            " and a port of 1024 to 65535; correct them"
        ) from None


def _announce(host: str, port: int, share: bool) -> list[str]:
    """Print the server's addresses; return the host names of its public link."""
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}       the page\nhttp://{shown}:{port}/docs  the endpoint, for programs")
    if host not in _LOCAL:
        say(f"warning: anyone who can reach {host} can use this; leave out --host to keep it to this machine")
    if share:
        from gradio.networking import setup_tunnel

        try:
            link = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
        # It fails in many ways, all of which mean that gradio's servers cannot be reached.
        except Exception as error:
            raise UserError(
                f"--share: no public link ({error}), expected a way to gradio's servers; leave out --share"
            ) from None
        print(f"{link}  the page, for anyone who has this link, for a week")
    print("Press Ctrl-C to stop.", flush=True)
    return [urlsplit(link).hostname or ""] if share else []
