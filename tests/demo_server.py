"""The demo's server in a thread of the test.

Requests to it pass `verify=False`: for each of them httpx would load all certificates, though it needs none.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def serve_app(app: Any, limits: Any = None) -> Iterator[str]:
    """Serve an application as the demo does; yield its address."""
    from captionscale.tools.demo.connections import Server
    from captionscale.tools.demo.origins import OriginMiddleware

    app.add_middleware(OriginMiddleware, host="127.0.0.1", allowed=["proxy.example"], secure=[])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(app, lambda: None, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def use_cache(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have gradio keep its files in a folder, and report nothing."""
    patch.setitem(os.environ, "GRADIO_TEMP_DIR", str(folder))
    patch.setitem(os.environ, "GRADIO_ANALYTICS_ENABLED", "False")
