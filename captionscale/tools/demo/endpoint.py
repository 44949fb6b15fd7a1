"""The HTTP endpoint for programs: POST /caption."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from captionscale.config import Search
from captionscale.errors import UserError
from captionscale.escape import for_markdown_code
from captionscale.tools.demo.request_body import RequestError, chunks
from captionscale.tools.demo.service import MAX_BEAM, Service
from captionscale.version import __version__

_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif", "application/octet-stream")
_PLACE = "the image"
_SEARCH = Search.model_json_schema()["properties"]
_BOUNDS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le"}
_Answer = TypeVar("_Answer")


def search_bounds(key: str) -> dict[str, Any]:
    """Return the bounds (ge, gt, le) of a key of the config's section `search`."""
    schema = _SEARCH[key].get("anyOf", [_SEARCH[key]])[0]
    return {bound: schema[name] for name, bound in _BOUNDS.items() if name in schema}


def _option(key: str, **tighter: Any) -> Any:
    return Field(None, description=Search.model_fields[key].description, **search_bounds(key) | tighter)


class Options(BaseModel):
    """Search options; the run's config decides on the ones that are left out."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["beam", "sample"] | None = _option("method")
    beam: int | None = _option("beam", le=MAX_BEAM)
    length_penalty: float | None = _option("length_penalty")
    no_repeat_ngram_size: int | None = _option("no_repeat_ngram_size")
    temperature: float | None = _option("temperature")
    top_k: int | None = _option("top_k")
    top_p: float | None = _option("top_p")
    seed: int | None = Field(None, ge=0, description="Random seed of a sampled caption.")
    prefix: str = Field("", max_length=200, description="Words that the caption begins with.")


class Word(BaseModel):
    """A word of a caption."""

    word: str
    probability: float = Field(description="Given the image and the words before it.")


class CaptionResponse(BaseModel):
    """A caption."""

    caption: str
    log_prob: float = Field(description="Natural logarithm of its probability, end token included.")
    words: list[Word]


class ErrorResponse(BaseModel):
    """Why there is no caption."""

    error: str = Field(description="Where, what was found, what was expected, and what to do.")


_ERRORS = {
    408: "The image did not arrive in time",
    413: "The image has too many bytes",
    415: "The Content-Type is not an image's",
    422: "Not an image, a damaged one or one of too many pixels; or an invalid option",
    503: "Too many requests are waiting: ask again after Retry-After seconds",
}


def create_api(service: Service, name: str) -> FastAPI:
    """Return the application; `name` is the run's, for the documentation page."""
    limits = service.limits
    app = FastAPIOffline(
        title="captionscale",
        version=__version__,
        description=f"Captions by {for_markdown_code(name)}, of images of at most {limits.max_file_bytes:,}"
        f" bytes and {limits.max_pixels:,} pixels. Nothing that you send is kept.",
        redoc_url=None,
        # Swagger UI would have a server elsewhere check openapi.json.
        swagger_ui_parameters={"validatorUrl": "none"},
    )
    image = {"schema": {"type": "string", "format": "binary"}}
    body = {"required": True, "content": dict.fromkeys(_TYPES, image)}

    @app.post(
        "/caption",
        summary="Caption an image",
        description="The body is the image file itself: JPEG, PNG, WebP, BMP or GIF.",
        responses={code: {"model": ErrorResponse, "description": text} for code, text in _ERRORS.items()},
        openapi_extra={"requestBody": body},
    )
    async def caption(request: Request, options: Annotated[Options, Query()]) -> CaptionResponse:
        _check_headers(request, service)
        # The body's memory counts until it is decoded.
        with service.memory_budget.body() as body:
            async for chunk in chunks(request.receive, limits.min_rate, limits.upload_timeout_s):
                service.check_size(body.size + len(chunk), _PLACE)
                body.add(chunk)
            with service.admit():
                search = service.pipeline.generation_request(**options.model_dump(exclude_none=True))
                view = service.decode(body.complete(), _PLACE, service.pipeline.center_crop)
                answer = service.submit(await _unless_gone(view, request.receive), search)
                [found, *_] = await _unless_gone(answer, request.receive)
        pairs = zip(found.words, found.probabilities, strict=True)
        words = [Word(word=word, probability=probability) for word, probability in pairs]
        return CaptionResponse(caption=found.caption, log_prob=found.log_prob, words=words)

    @app.get("/caption", include_in_schema=False)
    async def get() -> JSONResponse:
        return _refuse(405, "GET /caption: expected POST, with the image file as the body; see /docs")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"][1:])), first["msg"]
        return _refuse(422, f"{key}={first.get('input')}: {message[:1].lower()}{message[1:]}; see /docs")

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return _refuse(getattr(error, "status", 422), str(error))

    return app


def _check_headers(request: Request, service: Service) -> None:
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind not in _TYPES:
        raise RequestError(
            415, f"Content-Type: found {kind}, expected {', '.join(_TYPES)}; send the image file as the body"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        service.check_size(int(declared), _PLACE)


async def _unless_gone(future: Future[_Answer], receive: Receive) -> _Answer:
    """Wait for an answer as long as the client is connected."""
    answer, gone = asyncio.wrap_future(future), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


def _refuse(status: int, error: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": error}, status, headers)
