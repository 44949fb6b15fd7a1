"""Which hosts and origins are answered: this server's own."""

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?")
_HEADERS = {
    # No other site shows the page in a frame, nor takes its images.
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def allowed_hosts(host: str, others: Iterable[str]) -> set[str]:
    """Return the names that the server is reached by, besides IP addresses.

    Args:
        host: Address or name to listen at.
        others: Names that the user allows, such as a proxy's.
    """
    machine = socket.gethostname().lower()
    return {"localhost", host.lower(), machine, machine.partition(".")[0], *(each.lower() for each in others)}


class OriginMiddleware:
    """Refuses requests to other hosts, and those that pages of other origins make.

    A site whose name leads to this machine (DNS rebinding) names itself as the host; a page elsewhere that a
    user has open names itself as the origin. Programs send no origin. An IP address as the host is no site's
    name.
    """

    def __init__(self, app: ASGIApp, names: set[str], secure: set[str]):
        """Wrap an application.

        Args:
            app: The application.
            names: Of `allowed_hosts`; more may be added later.
            secure: Of these, those that are reached by https.
        """
        self._app, self._names, self._secure = app, names, secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if (refusal := self._refusal(scope["method"], headers)) is not None:
            await refusal(scope, receive, send)
            return
        if _name(headers["host"]) in self._secure:
            scope = {**scope, "scheme": "https"}

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, sent)

    def _refusal(self, method: str, headers: Headers) -> JSONResponse | None:
        hosts = headers.getlist("host")
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._names or _is_address(name)):
            found = ", ".join(hosts) or "none"
            return _refuse(
                421, f"Host: found {found}, expected an address or name of this server; see --allow-host"
            )
        for origin in headers.getlist("origin"):
            if origin.partition("://")[2].lower() != hosts[0].lower():
                return _refuse(403, f"Origin: found {origin}, expected that of Host; use this server's page")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        linked = method == "GET" and mode == "navigate" and headers.get("sec-fetch-dest") == "document"
        if site not in ("none", "same-origin") and not linked:
            return _refuse(
                403, f"Sec-Fetch-Site: found {site}, expected same-origin; open this server's page"
            )
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


def _refuse(status: int, error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status)
