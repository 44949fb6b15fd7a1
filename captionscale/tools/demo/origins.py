"""Refuses requests to other hosts and from other origins than this server's own."""

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?")
_HEADERS = {
    # No other site may frame the page or embed its images.
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class OriginMiddleware:
    """Refuses requests to other hosts, and those that pages of other origins make.

    A site whose name resolves to this machine (DNS rebinding) sends that name as `Host`; another page open in
    the user's browser sends its own `Origin`. Programs send no origin, and an IP address is no site's name.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str], secure: Iterable[str]):
        """Wrap an application that listens at `host`; `allowed` and `secure` (by https) are further names."""
        self._app, self._secure = app, {name.lower() for name in secure}
        machine = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), machine, machine.partition(".")[0], *self._secure}
        self._names.update(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refusal := self._refusal(scope["method"], headers):
            status, error = refusal
            await JSONResponse({"error": error}, status)(scope, receive, send)
            return
        if _name(headers["host"]) in self._secure:
            scope = {**scope, "scheme": "https"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._names or _is_address(name)):
            found = ", ".join(hosts) or "none"
            return 421, f"Host: found {found}, expected an address or name of this server; see --allow-host"
        for origin in headers.getlist("origin"):
            if origin.partition("://")[2].lower() != hosts[0].lower():
                return 403, f"Origin: found {origin}, expected that of Host; use this server's page"
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        linked = method == "GET" and mode == "navigate" and headers.get("sec-fetch-dest") == "document"
        if site not in ("none", "same-origin") and not linked:
            return 403, f"Sec-Fetch-Site: found {site}, expected same-origin; open this server's page"
        return None


def _name(host: str) -> str | None:
    """Return the name in a Host header, without its port."""
    found = _HOST.fullmatch(host)
    return found["name"].lower() if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
