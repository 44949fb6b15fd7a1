"""Uploads of the page: decoded while they are received, remembered by names that cannot be guessed."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from captionscale.data.resize import resize_image, resized_shape
from captionscale.errors import UserError
from captionscale.tools.caption_result import View
from captionscale.tools.demo.request_body import Body, TooLargeError
from captionscale.tools.demo.service import Service

PREVIEW_SIZE = 448
"""Of a preview's shorter side, at most, in pixels."""
_LONGEST = 4
"""Times the shorter side, that a preview's longer one has at most."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """What remains of an image once it is decoded."""

    view: View
    """What the model sees."""
    preview: bytes
    """The image as a small JPEG."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that the page received."""

    name: str
    """As its sender calls it, without folders."""
    image: DecodedImage | UserError
    expires: float
    """By `time.monotonic`."""


def decode_upload(service: Service, data: bytes, place: str) -> Future[DecodedImage]:
    """Decode an image; as `Service.decode`."""
    return service.decode(
        data, place, lambda pixels: DecodedImage(service.pipeline.center_crop(pixels), _preview(pixels))
    )


class Uploads:
    """The newest uploads, for some minutes.

    A request refers to an upload by the name that the server gave it. No file is written.
    """

    def __init__(self, service: Service):
        self._service = service
        self._uploads: dict[str, Upload] = {}

    def get(self, token: str) -> Upload:
        """Return an upload by the name that the server gave it.

        Raises:
            UserError: There is none of this name, or none any more.
        """
        self._forget()
        if (found := self._uploads.get(token)) is None:
            raise UserError("the upload: not there, wanted what was dropped on this page; drop it again")
        return found

    async def receive(self, content_type: str | None, body: AsyncIterator[bytes]) -> list[str]:
        """Receive the files of a form, and return a name for each, in their order.

        Args:
            content_type: Of the form.
            body: Of `chunks`.

        Raises:
            TooLargeError: A file of too many bytes, or too many files.
            UserError: No form.
            BusyError: There is no memory for another file.
            TooSlowError: The form arrives too slowly.
        """
        limits, form, tokens = self._service.limits, _Form(content_type), list[str]()
        with ExitStack() as held:
            name, part = "", None
            async for chunk in body:
                for event, data in form.parse(chunk):
                    if event == "begin":
                        if len(tokens) == limits.max_files:
                            raise TooLargeError(
                                f"the upload: more than {limits.max_files} files, wanted at most {limits.max_files};"
                                " drop fewer, or see captionscale caption"
                            )
                        part = held.enter_context(self._service.memory_budget.body())
                    elif event == "name":
                        name = _base_name(data)
                    elif part is not None and event == "data":
                        self._service.check_size(part.size + len(data), name)
                        part.add(data)
                    elif part is not None:
                        tokens.append(await self._put(name, part))
                        held.close()
                        name, part = "", None
        return tokens

    async def _put(self, name: str, body: Body) -> str:
        found: DecodedImage | UserError
        try:
            found = await asyncio.wrap_future(decode_upload(self._service, body.complete(), name))
        # Told where its caption would be.
        except UserError as error:
            found = error
        token = f"{secrets.token_urlsafe(24)}.jpg"
        self._uploads[token] = Upload(name, found, time.monotonic() + self._service.limits.upload_ttl_s)
        self._forget()
        return token

    def _forget(self) -> None:
        limits, now = self._service.limits, time.monotonic()
        # Any thread may ask.
        for token in list(self._uploads):
            if len(self._uploads) <= limits.max_uploads and self._uploads[token].expires > now:
                break
            self._uploads.pop(token, None)


class _Form:
    """Parses a form of files."""

    def __init__(self, content_type: str | None):
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise UserError("the upload: not a form of files, expected one; use the page")
        self._found: list[tuple[str, bytes]] = []
        self._field, self._value = b"", b""
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": lambda: self._found.append(("begin", b"")),
                    "on_header_begin": self._begin_header,
                    "on_header_field": self._add_field,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_part_data": lambda data, start, end: self._found.append(("data", data[start:end])),
                    "on_part_end": lambda: self._found.append(("end", b"")),
                },
            )
        except FormParserError as error:
            raise _damaged(error) from None

    def parse(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield `begin`, `name`, `data` and `end` of parts, as far as they are received."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _damaged(error) from None
        found, self._found = self._found, []
        yield from found

    def _begin_header(self) -> None:
        self._field = self._value = b""

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._found.append(("name", parse_options_header(self._value)[1].get(b"filename", b"")))


def _damaged(error: FormParserError) -> UserError:
    return UserError(f"the upload: a damaged form ({error}), expected one of files; use the page")


def _base_name(data: bytes) -> str:
    """Return a file's name as it may be shown: without folders and control characters."""
    name = data.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in name if letter.isprintable())[:200] or "the upload"


def _preview(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    height, width = pixels.shape[:2]
    short = min(height, width)
    high, wide = min(height, _LONGEST * short), min(width, _LONGEST * short)
    top, left = (height - high) // 2, (width - wide) // 2
    image = np.ascontiguousarray(pixels[top : top + high, left : left + wide])
    if short > PREVIEW_SIZE:
        image = resize_image(image, *resized_shape(high, wide, PREVIEW_SIZE), "bilinear")
    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, colorsubsampling="444")
    return jpeg
