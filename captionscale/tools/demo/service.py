"""One model for many clients: images are decoded within limits and captioned in shared batches."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from captionscale.data import decode
from captionscale.errors import UserError
from captionscale.tools.caption_result import CaptionResult, View
from captionscale.tools.captioner_api import CaptionPipeline, GenerationRequest
from captionscale.tools.demo.request_body import MemoryBudget, MinRate, RequestError

MAX_BEAM = 20  # that a request may ask for; the config allows more
MAX_SAMPLES = 10  # captions that the page samples at once
_Pixels = UInt8[np.ndarray, "height width 3"]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """What the server accepts, and how much of it at once."""

    max_file_bytes: int = 20_000_000
    max_pixels: int = 50_000_000  # read from the image's header before it is decoded
    large_image_pixels: int = 12_500_000  # larger images are decoded one at a time, and do not delay others
    decode_threads: int = 2  # for smaller images
    max_incoming_bytes: int = 256_000_000  # of all bodies that are being received or wait to be decoded
    min_rate: MinRate = field(default_factory=MinRate)
    upload_timeout_s: float = 60  # for an image sent to the endpoint
    max_requests: int = 100  # in progress at once, counted once their bodies have arrived
    max_batch_size: int = 16
    max_queue_delay_s: float = 0.01  # how long the first image of a batch waits for others
    max_files: int = 100  # in one upload to the page
    # Of these, the oldest are removed first.
    max_uploads: int = 300  # that the page keeps, each as a view and a preview
    upload_ttl_s: float = 300
    max_sessions: int = 200  # of the page
    max_streams: int = 200  # event streams of open pages, two for each page
    max_unread_messages: int = 500  # that pages have not fetched


@dataclass(frozen=True, eq=False)
class _Request:
    view: View
    generation_request: GenerationRequest
    number: int
    return_all: bool
    answer: Future[list[CaptionResult]]


class Service:
    """Answers requests from any thread: one thread owns the model, others decode.

    A caption does not depend on the requests that share its batch.
    """

    def __init__(self, pipeline: CaptionPipeline, limits: Limits = Limits()):
        self.pipeline, self.limits = pipeline, limits
        self.memory_budget = MemoryBudget(limits.max_incoming_bytes)
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._slots = threading.Semaphore(limits.max_requests)
        self._small = ThreadPoolExecutor(limits.decode_threads, "decode")
        self._large = ThreadPoolExecutor(1, "decode-large")
        self._thread = threading.Thread(target=self._work, name="captions", daemon=True)
        self._thread.start()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as in progress within the context; raises RequestError (503) if too many are."""
        limit = self.limits.max_requests
        if not self._slots.acquire(blocking=False):
            raise RequestError(
                503, f"{limit} requests are waiting, expected at most {limit}; try again later"
            )
        try:
            yield
        finally:
            self._slots.release()

    def check_size(self, size: int, place: str) -> None:
        """Raise RequestError (413) for a file of too many bytes."""
        limit = self.limits.max_file_bytes
        if size > limit:
            raise RequestError(
                413,
                f"{place}: {size:,} bytes or more, expected at most {limit:,}; send a smaller copy of the"
                " image",
            )

    def decode(self, data: bytes, place: str, reduce: Callable[[_Pixels], _Result]) -> Future[_Result]:
        """Decode an image file, named `place` in errors, and return what `reduce` makes of its pixels.

        Decoded images take up to several hundred megabytes, so none leaves the threads that decode.

        Returns:
            A future, which raises UserError for too many bytes or pixels, a damaged file, or no image.
        """
        answer: Future[_Result] = Future()

        def inspect() -> None:
            # The client has disconnected.
            if not answer.set_running_or_notify_cancel():
                return
            with _errors_to(answer):
                self.check_size(len(data), place)
                pixels = decode.count_pixels(data, place)
                if pixels > self.limits.max_pixels:
                    raise UserError(
                        f"{place}: {pixels:,} pixels, expected at most {self.limits.max_pixels:,};"
                        " send a smaller copy of the image"
                    )
                if pixels > self.limits.large_image_pixels:
                    self._large.submit(run)
                else:
                    run()

        def run() -> None:
            with _errors_to(answer):
                answer.set_result(reduce(decode.decode_image(data, place)))

        self._small.submit(inspect)
        return answer

    def submit(
        self, view: View, generation_request: GenerationRequest, number: int = 0, *, return_all: bool = False
    ) -> Future[list[CaptionResult]]:
        """Queue an image for the next batch; the arguments are those of `CaptionPipeline.generate`."""
        answer: Future[list[CaptionResult]] = Future()
        self._requests.put(_Request(view, generation_request, number, return_all, answer))
        return answer

    def close(self) -> None:
        """Answer queued requests, then stop."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
        self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        request = self._requests.get()
        while request is not None:
            batch, deadline = [request], time.monotonic() + self.limits.max_queue_delay_s
            with suppress(Empty):
                while len(batch) < self.limits.max_batch_size:
                    request = self._requests.get(timeout=max(0.0, deadline - time.monotonic()))
                    if request is None:
                        break
                    batch.append(request)
            self._answer(batch)
            request = request and self._requests.get()

    def _answer(self, batch: list[_Request]) -> None:
        groups: dict[tuple[GenerationRequest, bool], list[_Request]] = {}
        for request in batch:
            # False: the client has disconnected.
            if request.answer.set_running_or_notify_cancel():
                groups.setdefault((request.generation_request, request.return_all), []).append(request)
        for (generation_request, return_all), requests in groups.items():
            views, numbers = [each.view for each in requests], [each.number for each in requests]
            try:
                answers = self.pipeline.generate(views, generation_request, numbers, return_all=return_all)
            # Any error goes to those who wait, and the thread serves others.
            except Exception as error:
                for request in requests:
                    request.answer.set_exception(error)
                continue
            for request, answer in zip(requests, answers, strict=True):
                request.answer.set_result(answer)


@contextmanager
def _errors_to(answer: Future[_Result]) -> Iterator[None]:
    """Raise any error where the answer is awaited."""
    try:
        yield
    # MemoryError and a closed service too: without an answer, a request would wait forever.
    except Exception as error:
        answer.set_exception(error)
