"""Request bodies in memory, within bounds on size, total memory and time."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from captionscale.errors import UserError


class RequestError(UserError):
    """A request that is refused with an HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class MinRate:
    """Minimum upload rate: after t seconds, at least (t - grace_s) * bytes_per_s bytes have arrived."""

    grace_s: float = 10.0
    bytes_per_s: float = 50_000.0


async def chunks(receive: Receive, rate: MinRate, timeout_s: float = math.inf) -> AsyncIterator[bytes]:
    """Yield a request's body as it arrives, within a time limit for the whole of it, in seconds.

    Raises:
        RequestError: 408, the body is too slow.
        ClientDisconnect: The client closed the connection.
    """
    time = asyncio.get_running_loop().time
    waited_s, received, more = 0.0, 0, True
    while more:
        allowed_s = min(rate.grace_s + received / rate.bytes_per_s, timeout_s)
        started = time()
        try:
            async with asyncio.timeout(allowed_s - waited_s):
                message = await receive()
        except TimeoutError:
            raise RequestError(
                408,
                f"the body: {received:,} bytes in {allowed_s:.0f} s, expected at least"
                f" {rate.bytes_per_s:,.0f} bytes per second; use a faster connection",
            ) from None
        # The consumer's own time does not count.
        waited_s += time() - started
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        received += len(message.get("body", b""))
        yield message.get("body", b"")


class Body:
    """Bytes received so far, counted in a `MemoryBudget`."""

    def __init__(self, budget: "MemoryBudget"):
        self._budget, self._data = budget, bytearray()
        self.size, self.dropped = 0, False

    def add(self, data: bytes) -> None:
        """Append data; raises RequestError (503) if another body took this memory, or it is used up."""
        self._budget.reserve(self, len(data))
        self._data += data

    def complete(self) -> bytes:
        """Return all data. From now on no other body can take its memory."""
        self._budget.reserve(self, 0)
        del self._budget.arriving[self]
        data, self._data = bytes(self._data), bytearray()
        return data


class MemoryBudget:
    """Bounds the memory of all bodies that are being received or wait to be decoded.

    When it is used up, the body that started first is dropped, so slow clients cannot lock others out.
    Call it from the event loop only.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self._used = max_bytes, 0
        # Ordered by their start.
        self.arriving: dict[Body, None] = {}

    @contextmanager
    def body(self) -> Iterator[Body]:
        """Yield a body whose memory is released on exit."""
        body = Body(self)
        self.arriving[body] = None
        try:
            yield body
        finally:
            self.arriving.pop(body, None)
            self._release(body)

    def reserve(self, body: Body, size: int) -> None:
        """Count more bytes of a body; see `Body.add`."""
        while not body.dropped and self._used + size > self._max_bytes:
            oldest = next(iter(self.arriving))
            del self.arriving[oldest]
            self._release(oldest)
            oldest._data, oldest.dropped = bytearray(), True
        if body.dropped:
            raise RequestError(
                503,
                f"the body: all clients together are sending more than {self._max_bytes:,} bytes, expected"
                " fewer, and this body took longest; try again later",
            )
        self._used += size
        body.size += size

    def _release(self, body: Body) -> None:
        self._used -= body.size
        body.size = 0
