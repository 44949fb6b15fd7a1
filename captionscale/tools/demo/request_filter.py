"""The door before gradio: a request that is not on its list does not reach gradio.

Many of gradio's routes, and any object in an event, name files and URLs that gradio opens. Of the events that
a page sends, only numbers, short text and names of uploads are passed on: never an object.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captionscale.errors import UserError
from captionscale.tools.demo.request_body import BusyError, TooLargeError, TooSlowError, chunks
from captionscale.tools.demo.service import Limits
from captionscale.tools.demo.uploads import Uploads

_MOST_JSON = 200_000
_PASSED = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json"
    r"|/(static|assets|svelte)(/(?!\.)[\w@+,.-]+)+"
    r"|/gradio_api/heartbeat/[\w-]{1,64}"
    r"|/gradio_api/queue/data"
)
_STREAMS = re.compile(r"/gradio_api/(heartbeat/.*|queue/data)")
_SESSION = re.compile(rb"session_hash=[\w-]{1,64}")
_HEADERS = frozenset((b"accept", b"accept-encoding", b"host", b"if-none-match", b"user-agent"))

# No control characters, as values are shown in messages.
_Text = Annotated[str, msgspec.Meta(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Real = Annotated[float, msgspec.Meta(ge=-(2.0**53), le=2.0**53)]


class _File(msgspec.Struct):
    """How a page names an upload. All else that it says of it is ignored."""

    path: _Text


_Files = Annotated[list[_File], msgspec.Meta(max_length=1000)]


class _Selected(msgspec.Struct):
    """What was clicked: its place alone."""

    index: _Whole


class _Event(msgspec.Struct):
    """What a page sends when something is done on it."""

    data: Annotated[list[bool | _Whole | _Real | _Text | _File | _Files | None], msgspec.Meta(max_length=100)]
    fn_index: _Whole
    session_hash: Annotated[str, msgspec.Meta(pattern=r"^[\w-]{1,64}$")]
    event_data: _Selected | None = None
    trigger_id: _Whole | None = None


_EVENTS = msgspec.json.Decoder(_Event)


def restrict_gradio(blocks: gr.Blocks, uploads: Uploads, limits: Limits, **look: Any) -> FastAPI:
    """Return the application that serves a page.

    Args:
        blocks: The page. Its inputs get uploads as the names that `uploads` gives them.
        uploads: What the page receives.
        limits: Of streams, sessions and waiting events.
        look: Passed to gradio.
    """
    # Read when the page is mounted.
    blocks.state_session_capacity = limits.max_sessions
    mounted = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        # Browsers would keep what was uploaded.
        run_history=False,
        ssr_mode=False,
        # Only what is meant for users is shown.
        show_error=False,
        **look,
    )
    # gradio's own check of paths, which is off in a page that it did not launch: a second line of defence.
    blocks.has_launched = True
    made = {path: Path(path).read_bytes() for path in _paths(_shown(blocks))}
    gradio = _Passed(mounted, limits)
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.router.lifespan_context = mounted.router.lifespan_context

    @app.post("/gradio_api/upload")
    async def upload(request: Request) -> Response:
        body = chunks(request.receive, limits.min_rate)
        try:
            return JSONResponse(await uploads.receive(request.headers.get("content-type"), body))
        except UserError as error:
            await _drain(body, limits.min_rate.grace_s)
            return PlainTextResponse(str(error), _status(error))

    @app.get("/gradio_api/upload_progress")
    async def progress() -> Response:
        # The page asks for it at each upload; without an answer it shows none.
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    @app.get("/gradio_api/file={name:path}")
    async def file(name: str) -> Response:
        if name in made:
            return Response(made[name], media_type="image/webp")
        try:
            found = uploads.get(name).image
        except UserError as error:
            found = error
        if isinstance(found, UserError):
            return PlainTextResponse(str(found), 404)
        return Response(found.preview, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @app.post("/gradio_api/queue/join")
    async def join(request: Request) -> Response:
        try:
            event = await _event(request, blocks, uploads, limits)
        except UserError as error:
            # Under this key gradio's scripts look for what to show.
            return JSONResponse({"detail": str(error)}, _status(error))
        _forget_unread(blocks._queue, event["session_hash"], limits.max_unread_messages)
        return _Forwarded(gradio, msgspec.json.encode(event))

    app.mount("/", gradio)
    return app


async def _event(request: Request, blocks: gr.Blocks, uploads: Uploads, limits: Limits) -> dict[str, Any]:
    """Return an event as gradio may see it."""
    data = bytearray()
    async for chunk in chunks(request.receive, limits.min_rate):
        data += chunk
        if len(data) > _MOST_JSON:
            raise TooLargeError(f"the event: more than {_MOST_JSON:,} bytes, expected what the page sends")
    try:
        event = _EVENTS.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"the event: {error}; expected what the page sends: reload the page") from None
    known = blocks.fns.get(event.fn_index)
    if known is None or len(known.inputs) != len(event.data):
        raise UserError(f"the event: fn_index {event.fn_index}, expected one of the page: reload the page")
    if event.event_data is None and any(name == "select" for _, name in known.targets):
        raise UserError("the event: no event_data, expected what was clicked: reload the page")
    for part, value in zip(known.inputs, event.data, strict=True):
        if not _fits(part, value):
            found = "a list or file" if isinstance(value, list | _File) else repr(value)
            raise UserError(
                f"{part.label or 'the event'}: found {found}, expected what the page offers: reload the page"
            )
    return {
        "data": [_plain(value, uploads) for value in event.data],
        "fn_index": event.fn_index,
        "session_hash": event.session_hash,
        "event_data": event.event_data and {"index": event.event_data.index, "value": None},
        "trigger_id": event.trigger_id,
    }


def _fits(part: Any, value: Any) -> bool:
    """Return whether an input can have a value: gradio prints a traceback of one that it cannot have."""
    if isinstance(part, gr.Slider | gr.Number):
        least = -math.inf if part.minimum is None else part.minimum
        most = math.inf if part.maximum is None else part.maximum
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return least <= value <= most if number else value is None and isinstance(part, gr.Number)
    if isinstance(part, gr.Radio):
        return value in [choice for _, choice in part.choices]
    if isinstance(part, gr.Image):
        return value is None or isinstance(value, _File)
    if isinstance(part, gr.File):
        return value is None or (isinstance(value, list) and all(isinstance(each, _File) for each in value))
    return value is None or not isinstance(part, gr.State)


def _plain(value: Any, uploads: Uploads) -> Any:
    """Return a value with uploads as their names.

    Raises:
        UserError: It names another file.
    """
    if isinstance(value, _File):
        uploads.get(value.path)
        return value.path
    return [_plain(each, uploads) for each in value] if isinstance(value, list) else value


def _shown(blocks: gr.Blocks) -> list[Any]:
    return [part["props"].get("value") for part in blocks.config["components"]]


def _paths(value: Any) -> Iterator[str]:
    """Find the files in a value that a page shows at first: the page itself made them."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) and "meta" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)


def _forget_unread(queue: Any, session: str, most: int) -> None:
    """Bound what gradio keeps of answers that nobody fetches."""
    waiting = queue.pending_messages_per_session
    if session in waiting:
        waiting.move_to_end(session)
    unread = sum(messages.qsize() for messages in waiting.values())
    for messages in waiting.values():
        while unread > most and not messages.empty():
            messages.get_nowait()
            unread -= 1
    for each in queue.pending_event_ids_session.keys() - waiting.keys():
        del queue.pending_event_ids_session[each]


async def _drain(body: AsyncIterator[bytes], timeout_s: float) -> None:
    """Read what is left for a while: browsers show no answer to what they are still sending."""
    with suppress(TooSlowError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            async for _ in body:
                pass


def _status(error: UserError) -> int:
    kinds = ((TooLargeError, 413), (TooSlowError, 408), (BusyError, 503))
    return next((status for kind, status in kinds if isinstance(error, kind)), 400)


class _Passed:
    """Passes what a page needs, and answers 404 to all else."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits = app, limits
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not _PASSED.fullmatch(path):
            await PlainTextResponse("not found", 404)(scope, receive, send)
        elif not _STREAMS.fullmatch(path):
            await self.forward(scope, receive, send)
        elif self._streams < self._limits.max_streams:
            self._streams += 1
            try:
                await self.forward(scope, receive, send)
            finally:
                self._streams -= 1
        else:
            text = f"{self._streams} pages are open, expected at most so many; come again later"
            await PlainTextResponse(text, 503)(scope, receive, send)

    async def forward(self, scope: Scope, receive: Receive, send: Send, body: bytes | None = None) -> None:
        """Have gradio answer, which sees no more of a request than it needs."""
        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        if body is not None:
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        session = _SESSION.fullmatch(scope["query_string"])
        query = session[0] if session else b""
        await self._app({**scope, "headers": headers, "query_string": query}, receive, send)


class _Forwarded(Response):
    """An answer of gradio's to another body than was sent."""

    def __init__(self, gradio: _Passed, sent: bytes):
        self._gradio, self._sent = gradio, sent
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = [self._sent]

        async def body() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._gradio.forward(scope, body, send, self._sent)
