"""The allowlist in front of gradio: requests that are not on it never reach gradio.

Many of gradio's routes, and any object in an event, name files and URLs that gradio opens. Events pass on
numbers, short text and upload tokens only, never an object.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captionscale.errors import UserError
from captionscale.tools.demo.request_body import RequestError, chunks
from captionscale.tools.demo.service import Limits
from captionscale.tools.demo.uploads import Uploads

_MAX_EVENT_BYTES = 200_000
_ALLOWED = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json"
    r"|/(static|assets|svelte)(/(?!\.)[\w@+,.-]+)+"
    r"|/gradio_api/heartbeat/[\w-]{1,64}"
    r"|/gradio_api/queue/data"
)
_STREAMS = re.compile(r"/gradio_api/(heartbeat/.*|queue/data)")
_SESSION = re.compile(rb"session_hash=[\w-]{1,64}")
_HEADERS = frozenset((b"accept", b"accept-encoding", b"host", b"if-none-match", b"user-agent"))

# Without control characters, as messages show values.
_Text = Annotated[str, msgspec.Meta(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Real = Annotated[float, msgspec.Meta(ge=-(2.0**53), le=2.0**53)]


class _File(msgspec.Struct):
    """An upload in an event. Whatever else the page sends of it is ignored."""

    path: _Text


_Files = Annotated[list[_File], msgspec.Meta(max_length=1000)]


class _Selected(msgspec.Struct):
    index: _Whole


class _Event(msgspec.Struct):
    data: Annotated[list[bool | _Whole | _Real | _Text | _File | _Files | None], msgspec.Meta(max_length=100)]
    fn_index: _Whole
    session_hash: Annotated[str, msgspec.Meta(pattern=r"^[\w-]{1,64}$")]
    event_data: _Selected | None = None
    trigger_id: _Whole | None = None


_DECODER = msgspec.json.Decoder(_Event)


def restrict_gradio(blocks: gr.Blocks, uploads: Uploads, limits: Limits, css: str = "") -> FastAPI:
    """Return the application that serves a page, whose inputs get uploads as their tokens."""
    # Read when the page is mounted.
    blocks.state_session_capacity = limits.max_sessions
    mounted = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        # Browsers would keep uploads.
        run_history=False,
        ssr_mode=False,
        # Users see only the errors meant for them.
        show_error=False,
        css=css,
    )
    # Turns on gradio's own check of paths, off in pages that it did not launch: a second line of defense.
    blocks.has_launched = True
    values = [part["props"].get("value") for part in blocks.config["components"]]
    own_files = {path: Path(path).read_bytes() for path in _paths(values)}
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.router.lifespan_context = mounted.router.lifespan_context

    @app.post("/gradio_api/upload")
    async def upload(request: Request) -> Response:
        body = chunks(request.receive, limits.min_rate)
        try:
            return JSONResponse(await uploads.receive(request.headers.get("content-type"), body))
        except UserError as error:
            await _drain(body, limits.min_rate.grace_s)
            return PlainTextResponse(str(error), getattr(error, "status", 400))

    @app.get("/gradio_api/upload_progress")
    async def progress() -> Response:
        # The page asks for it at each upload, and shows none without an answer.
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    @app.get("/gradio_api/file={name:path}")
    async def file(name: str) -> Response:
        if name in own_files:
            return Response(own_files[name], media_type="image/webp")
        try:
            image = uploads.get(name).image
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        # Raising the stored error would add to its traceback each time.
        if failure := image.exception():
            return PlainTextResponse(str(failure), 404)
        preview = image.result().preview
        return Response(preview, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    app.mount("/", _Gradio(mounted, blocks, uploads, limits))
    return app


async def _drain(body: AsyncIterator[bytes], timeout_s: float) -> None:
    """Read the rest for a while: browsers show no answer to a request that they are still sending."""
    with suppress(UserError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            async for _ in body:
                pass


def _parse_event(data: bytearray, blocks: gr.Blocks, uploads: Uploads) -> dict[str, Any]:
    """Return an event as gradio may see it."""
    try:
        event = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"the event: {error}; expected what the page sends: reload the page") from None
    known = blocks.fns.get(event.fn_index)
    if known is None or len(known.inputs) != len(event.data):
        raise UserError(f"the event: fn_index {event.fn_index}, expected one of the page: reload the page")
    if event.event_data is None and any(name == "select" for _, name in known.targets):
        raise UserError("the event: no event_data, expected what was clicked: reload the page")
    for part, value in zip(known.inputs, event.data, strict=True):
        if not _accepts(part, value):
            found = "a list or file" if isinstance(value, list | _File) else repr(value)
            raise UserError(
                f"{part.label or 'the event'}: found {found}, expected what the page offers: reload the page"
            )
    return {
        "data": [_tokens(value, uploads) for value in event.data],
        "fn_index": event.fn_index,
        "session_hash": event.session_hash,
        "event_data": event.event_data and {"index": event.event_data.index, "value": None},
        "trigger_id": event.trigger_id,
    }


def _accepts(part: Any, value: Any) -> bool:
    """Return whether an input accepts a value; gradio prints a traceback for one that it does not."""
    if isinstance(part, gr.Slider | gr.Number):
        lowest = -math.inf if part.minimum is None else part.minimum
        highest = math.inf if part.maximum is None else part.maximum
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return lowest <= value <= highest if number else value is None and isinstance(part, gr.Number)
    if isinstance(part, gr.Radio):
        return value in [choice for _, choice in part.choices]
    if isinstance(part, gr.Image):
        return value is None or isinstance(value, _File)
    if isinstance(part, gr.File):
        return value is None or (isinstance(value, list) and all(isinstance(each, _File) for each in value))
    return value is None or not isinstance(part, gr.State)


def _tokens(value: Any, uploads: Uploads) -> Any:
    """Return a value with uploads as tokens; raises UserError for any other file."""
    if isinstance(value, _File):
        uploads.get(value.path)
        return value.path
    return [_tokens(each, uploads) for each in value] if isinstance(value, list) else value


def _paths(value: Any) -> Iterator[str]:
    """Yield the files in initial values, which the page itself made."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) and "meta" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)


def _forget_unread(queue: Any, session: str, limit: int) -> None:
    """Bound the messages that gradio keeps for pages that do not fetch them."""
    waiting = queue.pending_messages_per_session
    if session in waiting:
        waiting.move_to_end(session)
    unread = sum(messages.qsize() for messages in waiting.values())
    for messages in waiting.values():
        while unread > limit and not messages.empty():
            messages.get_nowait()
            unread -= 1
    for each in queue.pending_event_ids_session.keys() - waiting.keys():
        del queue.pending_event_ids_session[each]


class _Gradio:
    """Passes allowed requests to gradio, and answers 404 to all others."""

    def __init__(self, app: ASGIApp, blocks: gr.Blocks, uploads: Uploads, limits: Limits):
        self._app, self._blocks, self._uploads, self._limits = app, blocks, uploads, limits
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope.get("method")
        if method == "POST" and path == "/gradio_api/queue/join":
            await self._join(scope, receive, send)
        elif method not in ("GET", "HEAD") or not _ALLOWED.fullmatch(path):
            await PlainTextResponse("not found", 404)(scope, receive, send)
        elif not _STREAMS.fullmatch(path):
            await self._forward(scope, receive, send)
        elif self._streams < self._limits.max_streams:
            self._streams += 1
            try:
                await self._forward(scope, receive, send)
            finally:
                self._streams -= 1
        else:
            text = f"{self._streams} streams are open, expected fewer; try again later"
            await PlainTextResponse(text, 503)(scope, receive, send)

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on an event of the page."""
        data = bytearray()
        try:
            async for chunk in chunks(receive, self._limits.min_rate):
                data += chunk
                if len(data) > _MAX_EVENT_BYTES:
                    raise RequestError(
                        413,
                        f"the event: more than {_MAX_EVENT_BYTES:,} bytes, expected fewer: reload the page",
                    )
            event = _parse_event(data, self._blocks, self._uploads)
        except UserError as error:
            # gradio's scripts show what is under this key.
            refusal = JSONResponse({"detail": str(error)}, getattr(error, "status", 400))
            await refusal(scope, receive, send)
            return
        _forget_unread(self._blocks._queue, event["session_hash"], self._limits.max_unread_messages)
        unread = [msgspec.json.encode(event)]
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(unread[0]))]

        async def receive_event() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._forward(scope, receive_event, send, headers)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, added: Iterable[Any] = ()) -> None:
        """Pass on the parts of a request that gradio needs."""
        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        session = _SESSION.fullmatch(scope["query_string"])
        query = session[0] if session else b""
        await self._app({**scope, "headers": [*headers, *added], "query_string": query}, receive, send)
