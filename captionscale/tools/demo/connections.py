"""uvicorn with bounds on connections and time, and an end that comes whatever is in work."""

import asyncio
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_END_S = 5.0


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may take, and the connections of one server that take it."""

    connections: int = 500
    """Open at once. For one more, the one that has waited longest for a request's headers is closed."""
    max_per_address: int = 64
    """Of these, from one address other than this machine's own."""
    headers_timeout_s: float = 10.0
    """Until a request's headers must be complete."""
    write_timeout_s: float = 30.0
    """That a client may leave an answer unread."""
    waiting: dict["Connection", None] = field(default_factory=dict)
    """Those without complete headers, in the order in which they began to wait."""
    addresses: Counter[str] = field(default_factory=Counter)


class Connection(H11Protocol):
    """A connection whose client has to send headers and read answers in time."""

    def __init__(self, bounds: ConnectionLimits, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._bounds = bounds
        self._headers_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or close it."""
        super().connection_made(transport)
        # asyncio does so only for sockets of a named protocol. Without it, each answer takes 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._address = self.client[0] if self.client else ""
        self._bounds.addresses[self._address] += 1
        from_there = self._bounds.addresses[self._address]
        crowded = from_there > self._bounds.max_per_address and not _is_loopback(self._address)
        if crowded or (len(self.connections) > self._bounds.connections and not self._close_another()):
            transport.abort()
        else:
            self._bounds.waiting[self] = None
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        super().connection_lost(exc)
        self._stop_waiting()
        self.resume_writing()
        self._bounds.addresses[self._address] -= 1
        if not self._bounds.addresses[self._address]:
            del self._bounds.addresses[self._address]

    def data_received(self, data: bytes) -> None:
        """Parse what was received."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._headers_timer is None:
            self._start_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._bounds.waiting[self] = None
            # Of an idle connection, uvicorn's timer runs; here the rest of a refused body is missing.
            if self.conn.their_state is h11.SEND_BODY:
                self._start_timer()

    def pause_writing(self) -> None:
        """Give the client some time to read."""
        super().pause_writing()
        self._answer_timer = self.loop.call_later(self._bounds.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        if self._answer_timer is not None:
            self._answer_timer.cancel()

    def _start_timer(self) -> None:
        self._headers_timer = self.loop.call_later(self._bounds.headers_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._bounds.waiting.pop(self, None)
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _close_another(self) -> bool:
        """Close the connection that has waited longest for headers; return whether there was one."""
        oldest = next(iter(self._bounds.waiting), None)
        if oldest is not None:
            oldest._stop_waiting()
            oldest.transport.abort()
        return oldest is not None


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


class Server(uvicorn.Server):
    """A server that a signal ends within seconds, even if a thread never comes back."""

    def __init__(self, app: Any, at_end: Callable[[], None], bounds: ConnectionLimits | None = None):
        """Prepare.

        Args:
            app: The application.
            at_end: What is to be done before the process is ended, if it does not end by itself.
            bounds: Of connections.
        """
        http: Any = partial(Connection, bounds or ConnectionLimits())
        # Pages keep connections open that would never end by themselves.
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws="none",
                log_level="critical",
                timeout_keep_alive=60,
                timeout_graceful_shutdown=2,
            )
        )
        self._at_end = at_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, and see to it that the process does."""
        super().handle_exit(sig, frame)
        timer = threading.Timer(_END_S, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        self._at_end()
        os._exit(0)
