"""The page's uploads: decoded while they are received, and kept under names that cannot be guessed."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from captionscale.data.resize import resize_image, resized_shape
from captionscale.errors import UserError
from captionscale.tools.caption_result import View
from captionscale.tools.demo.request_body import Body, RequestError
from captionscale.tools.demo.service import Service

PREVIEW_SIZE = 448  # of a preview's shorter side, at most, in pixels
_MAX_ASPECT = 4  # of a preview: longer side by shorter side


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """What is kept of an image."""

    view: View  # what the model sees
    preview: bytes  # the image as a small JPEG


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that the page received."""

    name: str  # the sender's name for it, without folders
    image: Future[DecodedImage]  # done
    expires: float  # by `time.monotonic`


def decode_upload(service: Service, data: bytes, place: str) -> Future[DecodedImage]:
    """Decode an image; see `Service.decode`."""
    return service.decode(
        data, place, lambda pixels: DecodedImage(service.pipeline.center_crop(pixels), _preview(pixels))
    )


class Uploads:
    """The newest uploads, in memory for some minutes. Requests name an upload by its token."""

    def __init__(self, service: Service):
        self._service = service
        self._uploads: dict[str, Upload] = {}

    def get(self, token: str) -> Upload:
        """Return an upload; raises UserError if there is none (any more) with this token."""
        self._remove_old()
        if (found := self._uploads.get(token)) is None:
            raise UserError("the upload: not there, expected an image dropped on this page; drop it again")
        return found

    async def receive(self, content_type: str | None, body: AsyncIterator[bytes]) -> list[str]:
        """Receive the files of a form, from `chunks`, and return a token for each, in their order.

        Raises:
            UserError: Not a form; RequestError: too large, too many or too slow files, or no memory for one.
        """
        try:
            return await self._receive(_Form(content_type), body)
        except FormParserError as error:
            raise UserError(
                f"the upload: a damaged form ({error}), expected a form of files; use the page"
            ) from None

    async def _receive(self, form: "_Form", body: AsyncIterator[bytes]) -> list[str]:
        limit, tokens = self._service.limits.max_files, list[str]()
        with ExitStack() as held:
            async for chunk in body:
                for event, data in form.parse(chunk):
                    if event == "begin":
                        if len(tokens) == limit:
                            raise RequestError(
                                413,
                                f"the upload: more than {limit} files, expected at most {limit}; drop fewer,"
                                " or use captionscale caption",
                            )
                        name, part = _base_name(data), held.enter_context(self._service.memory_budget.body())
                    elif event == "data":
                        self._service.check_size(part.size + len(data), name)
                        part.add(data)
                    else:
                        tokens.append(await self._put(name, part))
                        held.close()
        return tokens

    async def _put(self, name: str, body: Body) -> str:
        image = decode_upload(self._service, body.complete(), name)
        # Its error is shown in place of its caption.
        with suppress(UserError):
            await asyncio.wrap_future(image)
        token = f"{secrets.token_urlsafe(24)}.jpg"
        self._uploads[token] = Upload(name, image, time.monotonic() + self._service.limits.upload_ttl_s)
        self._remove_old()
        return token

    def _remove_old(self) -> None:
        limit, now = self._service.limits.max_uploads, time.monotonic()
        # A copy, as any thread may call this.
        for token, upload in list(self._uploads.items()):
            if len(self._uploads) <= limit and upload.expires > now:
                break
            self._uploads.pop(token, None)


class _Form:
    """Parses a form of files into the events `begin` (with the file's name), `data` and `end`."""

    def __init__(self, content_type: str | None):
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise UserError("the upload: not a form, expected a form of files; use the page")
        self._events: list[tuple[str, bytes]] = []
        self._key, self._value, self._name = bytearray(), bytearray(), b""
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_header_field": lambda data, start, end: self._key.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin,
                "on_part_data": lambda data, start, end: self._events.append(("data", data[start:end])),
                "on_part_end": lambda: self._events.append(("end", b"")),
            },
        )

    def parse(self, chunk: bytes) -> list[tuple[str, bytes]]:
        self._parser.write(chunk)
        events, self._events = self._events, []
        return events

    def _end_header(self) -> None:
        if self._key.lower() == b"content-disposition":
            self._name = parse_options_header(bytes(self._value))[1].get(b"filename", b"")
        self._key.clear()
        self._value.clear()

    def _begin(self) -> None:
        self._events.append(("begin", self._name))
        self._name = b""


def _base_name(data: bytes) -> str:
    """Return a file's name as it may be shown: without folders and control characters."""
    name = data.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in name if letter.isprintable())[:200] or "the upload"


def _preview(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    height, width = pixels.shape[:2]
    short = min(height, width)
    high, wide = min(height, _MAX_ASPECT * short), min(width, _MAX_ASPECT * short)
    top, left = (height - high) // 2, (width - wide) // 2
    image = np.ascontiguousarray(pixels[top : top + high, left : left + wide])
    if short > PREVIEW_SIZE:
        image = resize_image(image, *resized_shape(high, wide, PREVIEW_SIZE), "bilinear")
    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, colorsubsampling="444")
    return jpeg
