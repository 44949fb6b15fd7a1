"""Request bodies in memory, within bounds of size, total memory and time."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from captionscale.errors import UserError


class TooLargeError(UserError):
    """A client sent more than is accepted."""


class BusyError(UserError):
    """As many requests are in work as may be."""


class TooSlowError(UserError):
    """A body did not arrive in time."""


@dataclass(frozen=True)
class MinRate:
    """How slowly a body may arrive: after t seconds, at least (t - grace_s) * bytes_per_s bytes."""

    grace_s: float = 10.0
    bytes_per_s: float = 50_000.0
    """Bytes per second."""


async def chunks(receive: Receive, pace: MinRate, timeout_s: float | None = None) -> AsyncIterator[bytes]:
    """Yield a request's body as it arrives.

    Args:
        receive: ASGI's.
        pace: How slowly it may arrive.
        timeout_s: Seconds that the whole body may take; none: no limit but the pace.

    Raises:
        TooSlowError: It arrives too slowly.
        ClientDisconnect: The client has gone.
    """
    time = asyncio.get_running_loop().time
    waited_s, received, more = 0.0, 0, True
    while more:
        allowed_s = min(pace.grace_s + received / pace.bytes_per_s, timeout_s or math.inf)
        begun = time()
        try:
            async with asyncio.timeout(allowed_s - waited_s):
                message = await receive()
        except TimeoutError:
            raise TooSlowError(
                f"the body: {received:,} bytes in {allowed_s:.0f} s, expected at least"
                f" {pace.bytes_per_s:,.0f} bytes per second; try a faster connection"
            ) from None
        # Without the time that its consumer takes.
        waited_s += time() - begun
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        received += len(message.get("body", b""))
        yield message.get("body", b"")


class Body:
    """Bytes received so far, counted in a `MemoryBudget`."""

    def __init__(self, memory: "MemoryBudget"):
        self._memory = memory
        self._data = bytearray()
        self.size = 0
        self.dropped = False

    def add(self, data: bytes) -> None:
        """Append data.

        Raises:
            BusyError: There is no memory for it, or another body took it.
        """
        self._memory.reserve(self, len(data))
        self._data += data

    def complete(self) -> bytes:
        """Return all data. From now on, no other body takes its memory."""
        self._memory.keep(self)
        data = bytes(self._data)
        self._data = bytearray()
        return data

    def drop(self) -> None:
        """Forget all data."""
        self._data = bytearray()
        self.dropped = True


class MemoryBudget:
    """Bounds the memory of all bodies that are being received or wait to be decoded.

    When it is full, the body that has been arriving for longest is dropped: slow clients cannot keep others
    out. To be used in the event loop only.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._held = 0
        # In the order of their begin.
        self._arriving: dict[Body, None] = {}

    @contextmanager
    def body(self) -> Iterator[Body]:
        """Give a body whose memory is freed at the end of the context."""
        body = Body(self)
        self._arriving[body] = None
        try:
            yield body
        finally:
            self._arriving.pop(body, None)
            self._release(body)

    def reserve(self, body: Body, size: int) -> None:
        """Count more bytes of a body; see `Body.add`."""
        while not body.dropped and self._held + size > self._most_bytes:
            oldest = next(iter(self._arriving))
            del self._arriving[oldest]
            self._release(oldest)
            oldest.drop()
        if body.dropped:
            raise BusyError(
                f"the body: more than {self._most_bytes:,} bytes are being received from all clients, and"
                " this body took longest; ask later"
            )
        self._held += size
        body.size += size

    def keep(self, body: Body) -> None:
        """Count a body as complete."""
        if body.dropped:
            self.reserve(body, 0)
        del self._arriving[body]

    def _release(self, body: Body) -> None:
        self._held -= body.size
        body.size = 0
