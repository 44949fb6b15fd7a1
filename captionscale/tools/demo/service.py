"""One model for many askers: pictures within limits, and captions written in shared batches."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
from jaxtyping import UInt8

from captionscale.data import images
from captionscale.errors import UserError
from captionscale.tools.gaze import Gaze, View
from captionscale.tools.writer import Wish, Writer


class TooLargeError(UserError):
    """Somebody sent more than is taken."""


class BusyError(UserError):
    """As many are waiting as may wait."""


@dataclass(frozen=True)
class Limits:
    """How much of what is sent is taken."""

    size_bytes: int = 20_000_000
    """Of an image file."""
    pixels: int = 50_000_000
    """Of a picture, told by the file's head before anything is decoded."""
    waiting: int = 100
    """Requests that are in work at once."""
    decoders: int = 2
    """Pictures decoded at once: each may take several bytes for each pixel."""
    batch: int = 16
    """Pictures captioned at once."""
    uploads_bytes: int = 2_000_000_000
    """Of all files that were dropped on the page and not read yet."""
    window_s: float = 0.01
    """How long the first of a batch waits for others."""


@dataclass(frozen=True, eq=False)
class _Request:
    view: View
    wish: Wish
    number: int
    every: bool
    answer: Future[list[Gaze]]


class Service:
    """Answers requests from any thread; one thread of its own has the model.

    What an answer says does not depend on whom the request shared a batch with.
    """

    def __init__(self, writer: Writer, limits: Limits = Limits()):
        self.writer, self.limits = writer, limits
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._guests = 0
        self._counting = threading.Lock()
        self._decoders = threading.BoundedSemaphore(limits.decoders)
        self._thread = threading.Thread(target=self._work, name="captions", daemon=True)
        self._thread.start()

    @contextmanager
    def guest(self) -> Iterator[None]:
        """Count a request among those in work, from its first byte to its answer.

        Raises:
            BusyError: There are as many as may be.
        """
        with self._counting:
            if self._guests >= self.limits.waiting:
                raise BusyError(
                    f"{self._guests} requests are waiting, wanted at most {self.limits.waiting}; ask later"
                )
            self._guests += 1
        try:
            yield
        finally:
            with self._counting:
                self._guests -= 1

    def refuse_bytes(self, size: int, place: str) -> None:
        """Refuse a file of more bytes than are taken.

        Raises:
            TooLargeError: It is one.
        """
        most = self.limits.size_bytes
        if size > most:
            raise TooLargeError(
                f"{place}: {size:,} bytes or more, wanted at most {most:,}; send a smaller copy of the image"
            )

    def pixels(self, data: bytes, place: str) -> UInt8[np.ndarray, "height width 3"]:
        """Decode an image file.

        Raises:
            TooLargeError: Of too many bytes.
            UserError: Of too many pixels, damaged, or no image.
        """
        self.refuse_bytes(len(data), place)
        head = images.look(data, place, whole=False)
        if head.width * head.height > self.limits.pixels:
            raise UserError(
                f"{place}: {head.width:,} x {head.height:,} pixels, wanted at most"
                f" {self.limits.pixels:,}; send a smaller copy of the image"
            )
        with self._decoders:
            return images.pixels(data, place)

    def ask(self, view: View, wish: Wish, number: int = 0, *, every: bool = False) -> Future[list[Gaze]]:
        """Have a picture captioned.

        Args:
            view: What the model sees of it.
            wish: How captions are to be found.
            number: Of which, and of the seed, a sampled caption is a function.
            every: All captions that a beam search ends with, not the best alone.
        """
        answer: Future[list[Gaze]] = Future()
        self._requests.put(_Request(view, wish, number, every, answer))
        return answer

    def close(self) -> None:
        """Answer what was asked before, and no more."""
        self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._requests.get()) is not None:
            batch, more = [first], True
            until = time.monotonic() + self.limits.window_s
            while more and len(batch) < self.limits.batch:
                try:
                    request = self._requests.get(timeout=max(0.0, until - time.monotonic()))
                except Empty:
                    break
                more = request is not None
                batch += [] if request is None else [request]
            self._answer(batch)
            if not more:
                return

    def _answer(self, batch: list[_Request]) -> None:
        alike: dict[tuple[Wish, bool], list[_Request]] = {}
        for request in batch:
            alike.setdefault((request.wish, request.every), []).append(request)
        for (wish, every), requests in alike.items():
            views, numbers = [each.view for each in requests], [each.number for each in requests]
            try:
                answers = self.writer.write(views, wish, numbers, every=every)
            # Whatever it is, those who wait must hear of it, and others be served.
            except Exception as error:
                for request in requests:
                    request.answer.set_exception(error)
                continue
            for request, answer in zip(requests, answers, strict=True):
                request.answer.set_result(answer)
