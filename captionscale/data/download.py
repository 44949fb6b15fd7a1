"""Files behind URLs, by fsspec: never more bytes than expected, tried again where that may help."""

import errno
import logging
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from captionscale import credentials
from captionscale.data.manifest import CURE, Shard
from captionscale.errors import UserError
from captionscale.files import blake3_of
from captionscale.progress import Bar, progress, say

T = TypeVar("T")

_MB = 10**6
_CHUNK_BYTES = 1 << 20
_CONNECT_S = 20.0
_SILENCE_S = 60.0
"""A server that sends nothing for so long is given up."""
_SLOW_S, _SLOW_BYTES = 300.0, 100_000
"""So is one that sends less than so many bytes in so long, 0.3 kB/s, where a shard takes days."""
_WAITS_S = (0.5, 2.0, 8.0)
"""Before the second, the third and the last try."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _FinalError(UserError):
    """What another try would meet again."""


def join_url(folder: str, name: str) -> str:
    """Return the URL of a folder's file; parameters such as a token come after its name."""
    if not name:
        return folder
    path, mark, query = (
        folder.partition("?") if folder.startswith(("http://", "https://")) else (folder, "", "")
    )
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def fetch(folder: str, name: str, max_bytes: int) -> bytes:
    """Return a small file whole.

    Args:
        folder: URL of its folder, without credentials.
        name: Of the file.
        max_bytes: What it may have at most.

    Raises:
        FileNotFoundError: It is not there.
        UserError: The server does not give it, or it is larger.
    """

    def action(files: Any, source: str) -> bytes:
        # On the disk, so that what is too large is in nobody's memory.
        with TemporaryDirectory(prefix="captionscale-") as scratch:
            path = Path(scratch, "file")
            _get(files, source, path, _Progress(join_url(folder, name), max_bytes))
            return path.read_bytes()

    return _patiently(folder, name, action, _WAITS_S)


def download(folder: str, shard: Shard, path: Path) -> None:
    """Write a shard to `path`, proven to be the manifest's.

    Args:
        folder: URL of its folder, without credentials.
        shard: Which.
        path: Where to write.

    Raises:
        OSError: The disk is full.
        UserError: The server does not give it, or gives something else.
    """
    url = join_url(folder, shard.name)

    def action(files: Any, source: str) -> None:
        # The last one is begun, and never whole.
        total = shard.size_bytes // _MB + 1
        quiet = os.environ.get("RANK", "0") != "0"
        with progress(f"downloading {url}, MB", total, quiet=quiet, transient=True, lines=True) as bar:
            _get(files, source, path, _Progress(url, shard.size_bytes, bar))
            bar.advance()
        found = blake3_of(path)
        size_bytes = path.stat().st_size
        if (size_bytes, found) != (shard.size_bytes, shard.blake3):
            raise UserError(
                f"{url}: {size_bytes:,} bytes with blake3 {found[:12]}... came, manifest says"
                f" {shard.size_bytes:,} bytes with {shard.blake3[:12]}...; {CURE}"
            )

    try:
        _patiently(folder, shard.name, action, _WAITS_S)
    except FileNotFoundError:
        raise UserError(f"{url}: missing, manifest says {shard.size_bytes:,} bytes; {CURE}") from None


def require_filesystem(folder: str) -> None:
    """Prove, without using the network, that something installed can read such a URL.

    Raises:
        UserError: Nothing can.
    """
    _filesystem(folder, "")


def _get(files: Any, source: str, path: Path, arrived: "_Progress") -> None:
    """Copy a file to `path`, as long as `arrived` allows it."""
    if files.async_impl:
        files.get_file(source, str(path), callback=_callback(files, arrived))
        return
    if not files.isfile(source):
        raise FileNotFoundError(source)
    # What these have of their own copies without a word, however much it is.
    with files.open(source, "rb") as remote, path.open("wb") as local:
        while chunk := remote.read(_CHUNK_BYTES):
            arrived.count(len(chunk))
            local.write(chunk)


class _Progress:
    """What has arrived of a file: no more than expected, and not too slowly."""

    def __init__(self, url: str, max_bytes: int, bar: Bar | None = None):
        self._url, self._max_bytes, self._bar = url, max_bytes, bar
        self._bytes = 0
        self._since, self._bytes_then = time.monotonic(), 0

    def count(self, size: int) -> None:
        """Count bytes.

        Raises:
            UserError: They are too many, or too few for the time that they took.
        """
        before, self._bytes = self._bytes, self._bytes + size
        self.need(self._bytes)
        if self._bar is not None and (whole := self._bytes // _MB - before // _MB):
            self._bar.advance(whole)
        seconds = time.monotonic() - self._since
        if seconds > _SLOW_S:
            if (came := self._bytes - self._bytes_then) < _SLOW_BYTES:
                raise UserError(
                    f"{self._url}: {came:,} bytes came in {seconds:.0f} s, expected at least {_SLOW_BYTES:,};"
                    " check the network, or take the shards from another server"
                )
            self._since, self._bytes_then = time.monotonic(), self._bytes

    def need(self, size: int) -> None:
        """Refuse a size above what is expected.

        Raises:
            UserError: It is.
        """
        if size > self._max_bytes:
            raise _FinalError(
                f"{self._url}: more than {self._max_bytes:,} bytes came, expected at most these by the"
                f" manifest or the format; check the URL, or {CURE}"
            )


def _callback(files: Any, arrived: _Progress) -> Any:
    """Return what fsspec tells of the bytes that come."""
    from fsspec.callbacks import Callback

    # HTTP's size is that of an error's page too, and of what is still compressed.
    believed = "http" not in files.protocol

    class Arrived(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            if believed and size is not None:
                arrived.need(size)

        def relative_update(self, inc: int = 1) -> None:
            arrived.count(inc)

    return Arrived()


def _filesystem(folder: str, name: str) -> tuple[Any, str]:
    """Return what reads a URL, and the name by which it knows the file.

    fsspec keeps one for each process, so that a fork gets its own.
    """
    import fsspec

    # After Ctrl-C in a download asyncio would complain of what it had begun.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    url, protocol = join_url(folder, name), folder.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
        options: dict[str, Any] = {}
        if protocol in ("http", "https", "gs", "gcs"):
            from aiohttp import ClientTimeout

            # aiohttp's own would end a download after five minutes, however well it goes.
            timeout = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
            options = {"requests_timeout": timeout}
            if protocol in ("http", "https"):
                configured = fsspec.config.apply_config(kind, {}).get("client_kwargs", {})
                # Proxies and .netrc, as other programs read them. What is compressed anyway is counted when
                # it is not any more.
                client = {
                    "trust_env": True,
                    "headers": {"Accept-Encoding": "identity"},
                    "trace_configs": [_tracing()],
                }
                options = {"timeout": timeout, "client_kwargs": {**client, **configured}}
        files, path = fsspec.core.url_to_fs(join_url(credentials.restore(folder), name), **options)
        return files, path
    except ImportError as error:
        raise UserError(
            f"{url}: no package that reads {protocol}:// ({error}); expected captionscale's extra 'remote';"
            " pip install 'captionscale[remote]'"
        ) from None
    # What each of fsspec's many file systems raises is its own affair.
    except Exception as error:
        raise _explained(url, error) from None


@cache
def _tracing() -> Any:
    """Return what aiohttp calls at a redirect: one for all, as fsspec keeps sessions by their options."""
    from aiohttp import TraceConfig

    async def refuse_downgrade(_: Any, __: Any, redirect: Any) -> None:
        target = redirect.response.headers.get("Location", "")
        if redirect.url.scheme == "https" and target.lower().startswith("http:"):
            raise _FinalError(
                f"{credentials.strip(str(redirect.url))}: redirects to {credentials.strip(target)!r:.200},"
                " expected https://; correct the server, or give that URL if anyone on the way may read it"
            )

    tracing = TraceConfig()
    tracing.on_request_redirect.append(refuse_downgrade)
    return tracing


def _patiently(folder: str, name: str, action: Callable[[Any, str], T], waits_s: tuple[float, ...]) -> T:
    """Do something with a remote file, again if what hinders it may pass."""
    files, path = _filesystem(folder, name)
    try:
        return action(files, path)
    except (FileNotFoundError, _FinalError):
        raise
    except UserError as error:
        failure = error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        failure = _explained(join_url(folder, name), error)
        # Those of S3 and Google retry by themselves.
        passing = folder.startswith(("http://", "https://")) and not isinstance(error, ValueError)
        if _refused(error) or "Redirect" in type(error).__name__ or not passing:
            raise failure from None
    if not waits_s:
        raise failure
    say(f"{failure}; trying again in {waits_s[0]:g} s")
    time.sleep(waits_s[0])
    return _patiently(folder, name, action, waits_s[1:])


def _explained(url: str, error: Exception) -> UserError:
    """Return what the user can do about what a file system of fsspec raised."""
    found = credentials.strip(" ".join(f"{type(error).__name__}: {error}".split()))[:300].removesuffix(":")
    if _refused(error):
        return UserError(
            f"{url}: not allowed, or not there ({found}); expected the right to read it; check the URL and"
            " give credentials, such as AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or .netrc; those in a URL"
            " are not saved with a run"
        )
    return UserError(
        f"{url}: cannot be read ({found}); expected the file; check the URL and the network, then run the"
        " same command again"
    )


def _refused(error: Exception) -> bool:
    # aiohttp and gcsfs tell HTTP's number, each by its own name; botocore tells the absence of credentials.
    number = vars(error).get("status", vars(error).get("code"))
    final = isinstance(number, int) and 400 <= number < 500 and number not in (408, 429)
    return final or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
