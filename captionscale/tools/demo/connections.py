"""uvicorn with bounds on connections and time, and a shutdown that does not wait for requests in progress."""

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

_SHUTDOWN_S = 5.0


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of one server's connections, and the connections that count."""

    # Open at once. One more closes the connection that has waited longest for a request's headers.
    connections: int = 500
    max_per_address: int = 64  # other than this machine's own
    headers_timeout_s: float = 10.0  # until a request's headers are complete
    write_timeout_s: float = 30.0  # for a client that does not read its answer
    # Connections without complete headers, the longest wait first.
    waiting: dict["_Connection", None] = field(default_factory=dict)
    addresses: Counter[str] = field(default_factory=Counter)


class _Connection(H11Protocol):
    """A connection whose client has to send headers and read answers in time."""

    def __init__(self, limits: ConnectionLimits, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does this for named protocols only; without it, each answer takes 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limits, address = self._limits, self.client[0] if self.client else ""
        self._address = address
        limits.addresses[address] += 1
        local = bool(address) and ip_address(address).is_loopback
        crowded = limits.addresses[address] > limits.max_per_address and not local
        if crowded or (len(self.connections) > limits.connections and not self._close_oldest()):
            transport.abort()
        else:
            limits.waiting[self] = None
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self.resume_writing()
        self._limits.addresses[self._address] -= 1
        if not self._limits.addresses[self._address]:
            del self._limits.addresses[self._address]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._headers_timer is None:
            self._start_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._limits.waiting[self] = None
            # uvicorn times idle connections, but not one that owes the rest of a refused body.
            if self.conn.their_state is h11.SEND_BODY:
                self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _start_timer(self) -> None:
        self._headers_timer = self.loop.call_later(self._limits.headers_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._limits.waiting.pop(self, None)
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _close_oldest(self) -> bool:
        """Close the connection that has waited longest for headers; return whether there was one."""
        oldest = next(iter(self._limits.waiting), None)
        if oldest is not None:
            oldest._stop_waiting()
            oldest.transport.abort()
        return oldest is not None


class Server(uvicorn.Server):
    """A server that a signal ends within seconds, even if a thread never returns."""

    def __init__(self, app: Any, cleanup: Callable[[], None], limits: ConnectionLimits | None = None):
        """Configure the server; `cleanup` is called if the process has to be ended."""
        http: Any = partial(_Connection, limits or ConnectionLimits())
        # Pages keep streams open that would never end by themselves.
        timeouts: Any = {"timeout_keep_alive": 60, "timeout_graceful_shutdown": 2}
        super().__init__(uvicorn.Config(app, http=http, ws="none", log_level="critical", **timeouts))
        self._cleanup = cleanup

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down, and end the process if that takes too long."""
        super().handle_exit(sig, frame)
        timer = threading.Timer(_SHUTDOWN_S, self._exit)
        timer.daemon = True
        timer.start()

    def _exit(self) -> None:
        self._cleanup()
        os._exit(0)
