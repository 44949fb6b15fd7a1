"""One model for many clients: images decoded within limits, and captions computed in shared batches."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from captionscale.data import decode
from captionscale.errors import UserError
from captionscale.tools.caption_result import CaptionResult, View
from captionscale.tools.captioner_api import CaptionPipeline, GenerationRequest
from captionscale.tools.demo.request_body import BusyError, MemoryBudget, MinRate, TooLargeError

_Pixels = UInt8[np.ndarray, "height width 3"]
_Reduced = TypeVar("_Reduced")


@dataclass(frozen=True)
class Limits:
    """What is accepted, and how much of it at once."""

    max_file_bytes: int = 20_000_000
    """Of an image file."""
    max_pixels: int = 50_000_000
    """Of an image, read from its header before anything is decoded."""
    large_image_pixels: int = 12_500_000
    """Images of more are decoded one at a time, and do not delay smaller ones."""
    decode_threads: int = 2
    """Smaller images decoded at once."""
    max_incoming_bytes: int = 256_000_000
    """Of all bodies that are being received or wait to be decoded."""
    min_rate: MinRate = field(default_factory=MinRate)
    upload_timeout_s: float = 60
    """That an image may take to arrive at the endpoint."""
    max_requests: int = 100
    """Requests that are in work at once, after their body was received."""
    max_batch_size: int = 16
    """Images captioned at once."""
    max_queue_delay_s: float = 0.01
    """How long the first of a batch waits for others."""
    max_files: int = 100
    """In one upload to the page."""
    max_uploads: int = 300
    """Of the page that are remembered, each as a view and a preview; the oldest are forgotten first."""
    upload_ttl_s: float = 300
    """After which an upload is forgotten."""
    max_sessions: int = 200
    """Of the page that are remembered; the oldest are forgotten first."""
    max_streams: int = 200
    """That pages keep open to hear of answers: two for each page."""
    max_unread_messages: int = 500
    """Messages to pages that were not fetched; the oldest are dropped first."""


@dataclass(frozen=True, eq=False)
class _Request:
    view: View
    generation_request: GenerationRequest
    number: int
    return_all: bool
    answer: Future[list[CaptionResult]]


class Service:
    """Answers requests from any thread; one thread has the model, and others decode.

    A caption does not depend on the requests that share its batch.

    Attributes:
        pipeline: The model.
        limits: What is accepted.
        memory_budget: For bodies that are being received.
    """

    def __init__(self, pipeline: CaptionPipeline, limits: Limits = Limits()):
        self.pipeline, self.limits = pipeline, limits
        self.memory_budget = MemoryBudget(limits.max_incoming_bytes)
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._guests = 0
        self._counting = threading.Lock()
        self._small = ThreadPoolExecutor(limits.decode_threads, "decode")
        self._large = ThreadPoolExecutor(1, "decode-large")
        self._thread = threading.Thread(target=self._work, name="captions", daemon=True)
        self._thread.start()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request among those in work, from its last byte to its answer.

        Raises:
            BusyError: There are as many as may be.
        """
        with self._counting:
            if self._guests >= self.limits.max_requests:
                raise BusyError(
                    f"{self._guests} requests are waiting, wanted at most {self.limits.max_requests}; ask later"
                )
            self._guests += 1
        try:
            yield
        finally:
            with self._counting:
                self._guests -= 1

    def check_size(self, size: int, place: str) -> None:
        """Refuse a file of more bytes than are taken.

        Raises:
            TooLargeError: It is one.
        """
        most = self.limits.max_file_bytes
        if size > most:
            raise TooLargeError(
                f"{place}: {size:,} bytes or more, wanted at most {most:,}; send a smaller copy of the image"
            )

    def decode(self, data: bytes, place: str, reduced: Callable[[_Pixels], _Reduced]) -> Future[_Reduced]:
        """Decode an image file, and keep only what a function makes of its pixels.

        Decoded images take up to several hundred megabytes: none leaves the few threads that decode.

        Args:
            data: The file.
            place: Its name, for the error.
            reduced: Makes something small of the pixels, in the thread that decoded them.

        Returns:
            A future of that. It may raise TooLargeError, of too many bytes, and UserError, of too many
            pixels, a damaged file, or no image.
        """
        answer: Future[_Reduced] = Future()

        def look() -> None:
            # Whose client has gone is not decoded any more.
            if not answer.set_running_or_notify_cancel():
                return
            with _telling(answer):
                self.check_size(len(data), place)
                pixels = decode.count_pixels(data, place)
                if pixels > self.limits.max_pixels:
                    raise UserError(
                        f"{place}: {pixels:,} pixels, wanted at most {self.limits.max_pixels:,};"
                        " send a smaller copy of the image"
                    )
                if pixels > self.limits.large_image_pixels:
                    self._large.submit(run)
                else:
                    run()

        def run() -> None:
            with _telling(answer):
                answer.set_result(reduced(decode.decode_image(data, place)))

        self._small.submit(look)
        return answer

    def submit(
        self, view: View, generation_request: GenerationRequest, number: int = 0, *, return_all: bool = False
    ) -> Future[list[CaptionResult]]:
        """Have a picture captioned.

        Args:
            view: What the model sees of it.
            generation_request: How captions are to be found.
            number: Of which, and of the seed, a sampled caption is a function.
            return_all: All captions that a beam search ends with, not the best alone.
        """
        answer: Future[list[CaptionResult]] = Future()
        self._requests.put(_Request(view, generation_request, number, return_all, answer))
        return answer

    def close(self) -> None:
        """Answer what was asked before, and no more."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
        self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._requests.get()) is not None:
            batch, more = [first], True
            until = time.monotonic() + self.limits.max_queue_delay_s
            while more and len(batch) < self.limits.max_batch_size:
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
        alike: dict[tuple[GenerationRequest, bool], list[_Request]] = {}
        for request in batch:
            # Whose client has gone is not captioned any more.
            if request.answer.set_running_or_notify_cancel():
                alike.setdefault((request.generation_request, request.return_all), []).append(request)
        for (generation_request, return_all), requests in alike.items():
            views, numbers = [each.view for each in requests], [each.number for each in requests]
            try:
                answers = self.pipeline.generate(views, generation_request, numbers, return_all=return_all)
            # Whatever it is, those who wait must hear of it, and others be served.
            except Exception as error:
                for request in requests:
                    request.answer.set_exception(error)
                continue
            for request, answer in zip(requests, answers, strict=True):
                request.answer.set_result(answer)


@contextmanager
def _telling(answer: Future[_Reduced]) -> Iterator[None]:
    """Have whatever goes wrong raised where the answer is awaited."""
    try:
        yield
    # MemoryError and a closed service too: a request without an answer would wait for ever.
    except Exception as error:
        answer.set_exception(error)
