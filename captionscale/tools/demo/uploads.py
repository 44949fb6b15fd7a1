"""How much of what people send may lie on the disk at once."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class BoundedUploads:
    """Refuses uploads while those that nobody asked captions of take up too much.

    gradio bounds each file, and removes those that are left after some minutes; of their number it has no
    bound.
    """

    def __init__(self, app: "ASGIApp", folder: Path, most_bytes: int):
        """Stand before an application.

        Args:
            app: gradio's.
            folder: Where it keeps uploads.
            most_bytes: That may lie there.
        """
        self._app, self._folder, self._most_bytes = app, folder, most_bytes

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "http" and scope["path"].endswith("/upload") and self._held() > self._most_bytes:
            text = f"more than {self._most_bytes:,} bytes are waiting; come again in some minutes"
            await PlainTextResponse(text, 503)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _held(self) -> int:
        held = 0
        for folder, _, names in os.walk(self._folder):
            for name in names:
                # Others are read, and removed, meanwhile.
                with suppress(FileNotFoundError):
                    held += Path(folder, name).stat().st_size
        return held
