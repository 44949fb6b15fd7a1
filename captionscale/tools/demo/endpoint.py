"""Captions over HTTP, for programs: POST /caption."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from captionscale.config import Search
from captionscale.errors import UserError
from captionscale.tools.demo.api_page import render_api_docs
from captionscale.tools.demo.request_body import Body, BusyError, TooLargeError, TooSlowError, chunks
from captionscale.tools.demo.service import Service
from captionscale.version import __version__

MAX_BEAMS = 20
_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif", "application/octet-stream")
_PLACE = "the image"
_Answer = TypeVar("_Answer")


def _as_in_config(key: str) -> str | None:
    return Search.model_fields[key].description


class Options(BaseModel):
    """How the caption is to be found; what is left out is as the run's config has it."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["beam", "sample"] | None = Field(None, description=_as_in_config("method"))
    beam: int | None = Field(None, ge=1, le=MAX_BEAMS, description=_as_in_config("beam"))
    length_penalty: float | None = Field(None, ge=0, le=10, description=_as_in_config("length_penalty"))
    no_repeat_ngram_size: int | None = Field(None, ge=0, description=_as_in_config("no_repeat_ngram_size"))
    temperature: float | None = Field(None, gt=0, description=_as_in_config("temperature"))
    top_k: int | None = Field(None, ge=1, description=_as_in_config("top_k"))
    top_p: float | None = Field(None, gt=0, le=1, description=_as_in_config("top_p"))
    seed: int | None = Field(None, ge=0, description="Of a sampled caption, which is a function of it.")
    prefix: str = Field("", max_length=200, description="Words that the caption begins with.")


class Word(BaseModel):
    """A word of a caption."""

    word: str
    probability: float = Field(description="Given the picture and the words before it.")


class CaptionResponse(BaseModel):
    """A caption."""

    caption: str
    log_prob: float = Field(description="Natural logarithm, of all words and the end.")
    words: list[Word]


class ErrorResponse(BaseModel):
    """Why there is no caption."""

    error: str = Field(description="Where, what was found, what was wanted, and what to do.")


class _WrongTypeError(UserError):
    """The body says that it is no image."""


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BusyError, 503),
    (TooLargeError, 413),
    (_WrongTypeError, 415),
    (TooSlowError, 408),
    (UserError, 422),
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    408: {"model": ErrorResponse, "description": "The image did not arrive in time"},
    413: {"model": ErrorResponse, "description": "An image of too many bytes"},
    415: {"model": ErrorResponse, "description": "The Content-Type is no image's"},
    422: {
        "model": ErrorResponse,
        "description": "No image, a damaged one or one of too many pixels; or a bad option",
    },
    503: {"model": ErrorResponse, "description": "Too many are waiting: ask again after Retry-After seconds"},
}


def create_api(service: Service, name: str) -> FastAPI:
    """Return the application.

    Args:
        service: Decodes and captions.
        name: Of the run.
    """
    limits = service.limits
    app = FastAPI(
        title=f"captionscale: {name}",
        version=__version__,
        description=f"Captions of images of at most {limits.max_file_bytes:,} bytes and {limits.max_pixels:,} pixels."
        " Nothing that is sent is kept.",
        # FastAPI's own page loads its scripts from elsewhere and stays empty without a network.
        docs_url=None,
        redoc_url=None,
    )

    @app.post(
        "/caption",
        summary="Caption an image",
        description="The body is the image file itself: JPEG, PNG, WebP, BMP or GIF.",
        responses=_REFUSALS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _TYPES},
            }
        },
    )
    async def caption(request: Request, options: Annotated[Options, Query()]) -> CaptionResponse:
        _refuse_head(request, service)
        # The memory of the body is counted until it was decoded.
        with service.memory_budget.body() as body:
            await _receive(request, service, body)
            with service.admit():
                generation_request = service.pipeline.generation_request(
                    **options.model_dump(exclude_none=True)
                )
                view = service.decode(body.complete(), _PLACE, service.pipeline.center_crop)
                answer = service.submit(await _unless_gone(view, request.receive), generation_request)
                [found, *_] = await _unless_gone(answer, request.receive)
        words = [
            Word(word=word, probability=probability)
            for word, probability in zip(found.words, found.probabilities, strict=True)
        ]
        return CaptionResponse(caption=found.caption, log_prob=found.log_prob, words=words)

    @app.get("/caption", include_in_schema=False)
    async def get() -> JSONResponse:
        return _refuse(405, "GET /caption: wanted POST, with the image file as the body; see /docs")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(render_api_docs(app.openapi(), str(request.base_url).rstrip("/")))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][1:]))
        found = first.get("input")
        return _refuse(422, f"{key}={found}: {first['msg'][:1].lower()}{first['msg'][1:]}; see /docs")

    for kind, status in _STATUS:
        app.add_exception_handler(kind, _handler(status))
    return app


def _refuse_head(request: Request, service: Service) -> None:
    """Refuse a body by its headers."""
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind not in _TYPES:
        raise _WrongTypeError(
            f"Content-Type: found {kind}, wanted {', '.join(_TYPES)}; send the image file itself as the body"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        service.check_size(int(declared), _PLACE)


async def _receive(request: Request, service: Service, body: Body) -> None:
    limits = service.limits
    async for chunk in chunks(request.receive, limits.min_rate, limits.upload_timeout_s):
        service.check_size(body.size + len(chunk), _PLACE)
        body.add(chunk)


async def _unless_gone(future: Future[_Answer], receive: Receive) -> _Answer:
    """Wait for an answer, as long as there is a client for it."""
    answer, gone = asyncio.wrap_future(future), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


def _handler(status: int) -> Any:
    async def handle(_: Request, error: Exception) -> JSONResponse:
        return _refuse(status, str(error))

    return handle


def _refuse(status: int, error: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(ErrorResponse(error=error).model_dump(), status, headers)
