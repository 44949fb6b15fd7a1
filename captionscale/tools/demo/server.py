"""Serve a run to people and programs, on this machine unless told otherwise."""

import ctypes
import errno
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Sequence
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from captionscale.errors import UserError
from captionscale.files import temp_folder
from captionscale.progress import say, spinner

if TYPE_CHECKING:
    from fastapi import FastAPI

    from captionscale.data.shards import Split
    from captionscale.tools.demo.service import Service
    from captionscale.tools.ensemble import CheckpointEnsemble

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
    """Serve the page and the endpoint until a signal comes.

    Args:
        run: The --out of captionscale train.
        checkpoint: `best`, `last` or a step.
        others: Runs that write together with this one.
        host: Address to listen at.
        port: To listen at; 0: any that is free.
        share: Also through a public link of gradio's.
        shards: Where samples come from, instead of the run's own.
        allowed: Names besides this machine's that requests may address the server by.

    Raises:
        UserError: No gradio, no run, a port in use, or no public link.
    """
    if missing := [name for name in ("gradio", "fastapi", "uvicorn") if find_spec(name) is None]:
        raise UserError(
            f"demo: {', '.join(missing)} is not installed, wanted it for the page;"
            " pip install 'captionscale[demo]'"
        )
    # First, as all else takes seconds.
    with closing(_listen(host, port)) as listening, temp_folder("demo") as folder:
        _return_freed_memory()
        # Read when gradio is imported. All that it writes goes with this folder, also after a kill.
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
        with spinner("making the page ready"):
            from captionscale.tools.captioner_api import CaptionPipeline
            from captionscale.tools.demo.origins import OriginMiddleware, allowed_hosts
            from captionscale.tools.demo.service import Service
            from captionscale.tools.ensemble import open_ensemble

            members = open_ensemble(run, others, checkpoint=checkpoint, overrides=[])
            service = Service(CaptionPipeline(members))
            app = application(service, run.resolve().name, _samples(members, shards))
        public = _announce(host, listening.getsockname()[1], share)
        app.add_middleware(OriginMiddleware, names=allowed_hosts(host, [*allowed, *public]), secure=public)
        _run(app, listening, folder)
        service.close()


def application(service: "Service", name: str, samples: "Split | None") -> "FastAPI":
    """Return the endpoint with the page at its root.

    Args:
        service: What captions.
        name: Of the run.
        samples: A split of which some pictures are offered.
    """
    from captionscale.tools.demo.endpoint import create_api
    from captionscale.tools.demo.page import CSS, build_page
    from captionscale.tools.demo.request_filter import restrict_gradio
    from captionscale.tools.demo.uploads import Uploads

    served, uploads = create_api(service, name), Uploads(service)
    before = restrict_gradio(build_page(service, name, samples, uploads), uploads, service.limits, css=CSS)
    served.router.lifespan_context = before.router.lifespan_context
    served.mount("/", before)
    return served


def _return_freed_memory() -> None:
    """Have glibc return blocks of 1 MB and more to the system: it would keep those of decoded images."""
    # Other C libraries do not have it.
    with suppress(AttributeError, OSError):
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
                f"--port {port}: in use by another program, wanted a free one; take another, or 0 for any"
            ) from None
        raise UserError(
            f"--host {host} --port {port}: cannot be listened at ({error}), wanted an address of this machine"
            " and a port of 1024 to 65535; correct them"
        ) from None


def _samples(members: "CheckpointEnsemble", shards: str | None) -> "Split | None":
    """Return the split whose pictures are offered; none, and a note, if it is not at hand."""
    from captionscale.data.shards import Split
    from captionscale.data.storage import LocalStorage, open_storage

    data = members.config.data
    try:
        place = open_storage(shards or data.shards, data.cache, data.cache_gb)
        if isinstance(place, LocalStorage):
            return Split(place, data.val_split)
        reason = f"{place} is no folder of this machine"
    except UserError as error:
        reason = str(error)
    say(f"note: the page offers no samples: {reason}; --shards DIR says where they are")
    return None


def _announce(host: str, port: int, share: bool) -> set[str]:
    """Print where the server is; return the names of its public link."""
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}       the page\nhttp://{shown}:{port}/docs  the endpoint, for programs")
    if host not in _LOCAL:
        say(f"warning: whoever can reach {host} can use this; leave out --host to keep it to this machine")
    if share:
        from gradio.networking import setup_tunnel

        try:
            link = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
        # It fails in many ways, all of which mean that there is no way to gradio's servers.
        except Exception as error:
            raise UserError(
                f"--share: no public link ({error}), wanted a way to gradio's servers; leave out --share"
            ) from None
        print(f"{link}  the page, for anyone who has this link, for a week")
    print("Ctrl-C ends it.", flush=True)
    return {urlsplit(link).hostname or ""} if share else set()


def _run(app: "FastAPI", listening: socket.socket, folder: Path) -> None:
    from captionscale.tools.demo.connections import Server

    # uvicorn ends by itself at these signals, and then raises them again.
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(app, lambda: shutil.rmtree(folder, ignore_errors=True)).run(sockets=[listening])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
