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
# A download fails after this time without a byte, or below 0.3 kB/s, where a shard takes days.
_SILENCE_S = 60.0
_SLOW_S, _SLOW_BYTES = 300.0, 100_000
# Before the second, the third and the last try.
_WAITS_S = (0.5, 2.0, 8.0)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _FinalError(UserError):
    """An error that another try would meet again."""


def join_url(folder: str, name: str) -> str:
    """Return the URL of a folder's file; parameters such as a token come after its name."""
    if not name:
        return folder
    path, mark, query = folder.partition("?") if _is_http(folder) else (folder, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def fetch(folder: str, name: str, max_bytes: int) -> bytes:
    """Return a small file, or raise FileNotFoundError; the folder's URL has no credentials."""

    def action(files: Any, source: str) -> bytes:
        # On disk: a file that is too large must not fill the memory.
        with TemporaryDirectory(prefix="captionscale-") as scratch:
            path = Path(scratch, "file")
            _get(files, source, path, _Progress(join_url(folder, name), max_bytes))
            return path.read_bytes()

    return _retry(folder, name, action)


def download(folder: str, shard: Shard, path: Path) -> None:
    """Write a shard to `path`, with the manifest's size and hash; a full disk is an OSError."""
    url = join_url(folder, shard.name)

    def action(files: Any, source: str) -> None:
        # The last megabyte is a partial one.
        total = shard.size_bytes // _MB + 1
        quiet = os.environ.get("RANK", "0") != "0"
        with progress(f"downloading {url}, MB", total, quiet=quiet, transient=True, lines=True) as bar:
            _get(files, source, path, _Progress(url, shard.size_bytes, bar))
            bar.advance()
        found, size_bytes = blake3_of(path), path.stat().st_size
        if (size_bytes, found) != (shard.size_bytes, shard.blake3):
            raise UserError(
                f"{url}: {size_bytes:,} bytes with blake3 {found[:12]}... came, manifest says"
                f" {shard.size_bytes:,} bytes with {shard.blake3[:12]}...; {CURE}"
            )

    try:
        _retry(folder, shard.name, action)
    except FileNotFoundError:
        raise UserError(f"{url}: missing, manifest says {shard.size_bytes:,} bytes; {CURE}") from None


def require_filesystem(folder: str) -> None:
    """Check, without using the network, that an installed package reads such a URL."""
    _filesystem(folder, "")


class _Progress:
    """Counts the bytes that arrive of a file: no more than expected, and not too slowly."""

    def __init__(self, url: str, max_bytes: int, bar: Bar | None = None):
        self._url, self._max_bytes, self._bar = url, max_bytes, bar
        self._bytes = 0
        self._since, self._bytes_then = time.monotonic(), 0

    def count(self, size: int) -> None:
        before, self._bytes = self._bytes, self._bytes + size
        self.check_size(self._bytes)
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

    def check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise _FinalError(
                f"{self._url}: more than {self._max_bytes:,} bytes came, expected at most these by the"
                f" manifest or the format; check the URL, or {CURE}"
            )


def _get(files: Any, source: str, path: Path, arrived: _Progress) -> None:
    """Copy a file to `path`, as long as `arrived` allows it."""
    if files.async_impl:
        files.get_file(source, str(path), callback=_callback(files, arrived))
        return
    if not files.isfile(source):
        raise FileNotFoundError(source)
    # The `get_file` of these file systems calls no callback before the file is whole.
    with files.open(source, "rb") as remote, path.open("wb") as local:
        while chunk := remote.read(_CHUNK_BYTES):
            arrived.count(len(chunk))
            local.write(chunk)


def _callback(files: Any, arrived: _Progress) -> Any:
    from fsspec.callbacks import Callback

    # HTTP's size is also that of an error page, or of compressed data.
    size_is_known = "http" not in files.protocol

    class Arrived(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            if size_is_known and size is not None:
                arrived.check_size(size)

        def relative_update(self, inc: int = 1) -> None:
            arrived.count(inc)

    return Arrived()


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(folder: str, name: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, one for each process, and its name of the file."""
    import fsspec

    # After Ctrl-C in a download, asyncio would log unfinished tasks.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    url, protocol = join_url(folder, name), folder.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
        options: dict[str, Any] = {}
        if protocol in ("http", "https", "gs", "gcs"):
            from aiohttp import ClientTimeout

            # aiohttp's default ends a download after five minutes.
            timeout = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
            options = {"requests_timeout": timeout}
            if _is_http(folder):
                configured = fsspec.config.apply_config(kind, {}).get("client_kwargs", {})
                # `trust_env`: proxies and .netrc. Bytes are counted after decompression.
                headers = {"Accept-Encoding": "identity"}
                client = {"trust_env": True, "headers": headers, "trace_configs": [_tracing()]}
                options = {"timeout": timeout, "client_kwargs": client | configured}
        files, path = fsspec.core.url_to_fs(join_url(credentials.restore(folder), name), **options)
        return files, path
    except ImportError as error:
        raise UserError(
            f"{url}: no package that reads {protocol}:// ({error}); expected captionscale's extra 'remote';"
            " pip install 'captionscale[remote]'"
        ) from None
    # fsspec's file systems raise nearly any exception.
    except Exception as error:
        raise _explained(url, error) from None


@cache
def _tracing() -> Any:
    """Return aiohttp's hooks that refuse a redirect to HTTP; one, as fsspec keeps sessions by options."""
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


def _retry(folder: str, name: str, action: Callable[[Any, str], T]) -> T:
    """Do something with a remote file, again if the error may be temporary."""
    for wait_s in (*_WAITS_S, None):
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
            # S3's and Google's file systems retry by themselves.
            lasting = isinstance(error, ValueError) or "Redirect" in type(error).__name__ or _refused(error)
            if lasting or not _is_http(folder):
                raise failure from None
        if wait_s is not None:
            say(f"{failure}; trying again in {wait_s:g} s")
            time.sleep(wait_s)
    raise failure


def _explained(url: str, error: Exception) -> UserError:
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
    # HTTP's status is `status` in aiohttp and `code` in gcsfs; NoCredentialsError is botocore's.
    status = vars(error).get("status", vars(error).get("code"))
    final = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return final or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
