"""Passwords and tokens in URLs: used while the command runs, absent from all that it prints, logs and saves.

A URL is stripped of them where it enters: each argument of the command line, each key of an experiment, each
place of shards. What is passed on is a plain URL; only a download asks for the one that was given.
"""

import json
import os
import re

_GIVEN = "CAPTIONSCALE_URLS"
"""Environment variable with each stripped URL and the given one, as JSON: launched ranks inherit it."""
# Bounded: a long text without a URL would take the square of its length.
_URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.:-]{0,63}://[^\s"'<>]+""")
_AUTHORITY = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?")
_SECRET = re.compile(r"token|sig|secret|pass|pwd|key|auth|cred|session|jwt|sas|access", re.IGNORECASE)
_KEY_LENGTH = 16
"""A parameter's value of so many characters may be a key, unless the name is that of a version or path."""
_WHAT = re.compile(r"(version|generation)(id)?|revision|commit|ref|branch|path|prefix", re.IGNORECASE)
_AZURE = re.compile(r"(.*::)?(az|abfss?|wasbs?)")


def strip(text: str) -> str:
    """Return a text with its URLs stripped of user, password, and parameters that may be keys.

    Examples:
        >>> strip("data.shards=https://me:secret@host:8000/coco?version=2&token=secret")
        'data.shards=https://host:8000/coco?version=2'
        >>> strip("s3://KEY:SECRET@bucket/coco"), strip("me@host: no URL")
        ('s3://bucket/coco', 'me@host: no URL')
        >>> strip("https://host/coco?revision=2c1d7f3a9b8e6054"), strip("abfss://container@account/coco")
        ('https://host/coco?revision=2c1d7f3a9b8e6054', 'abfss://container@account/coco')
    """
    return _URL.sub(lambda found: _strip(found[0]), text)


def strip_and_remember(text: str) -> str:
    """Return a text as `strip` does; `restore` knows the URLs as they were, in this process and its children.

    One warning for each of them: they are not saved.
    """
    return _URL.sub(_strip_and_remember, text)


def restore(url: str) -> str:
    """Return a URL as it was given, with its credentials."""
    return _remembered().get(url.rstrip("/"), url)


def _strip_and_remember(found: re.Match[str]) -> str:
    stripped = _strip(found[0])
    if stripped != found[0] and restore(stripped) != found[0]:
        urls = _remembered() | {stripped.rstrip("/"): found[0]}
        os.environ[_GIVEN] = json.dumps(urls)
        _warn(stripped)
    return stripped


def _remembered() -> dict[str, str]:
    urls: dict[str, str] = json.loads(os.environ.get(_GIVEN, "{}"))
    return urls


def _warn(stripped: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        # The command line imports this module, also where nothing is installed.
        from captionscale.progress import say

        say(
            f"warning: {stripped}: was given with a password, key or token, which is used now but saved"
            " nowhere; give it in the environment instead: .netrc, AWS_PROFILE or"
            " GOOGLE_APPLICATION_CREDENTIALS"
        )


def _strip(url: str) -> str:
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at:
        # In Azure's URLs it is a container, unless there is a password.
        if ":" in user or not _AZURE.fullmatch(scheme):
            rest = rest[len(user) + 1 :]
    elif not _AUTHORITY.fullmatch(authority):
        # A password that holds a slash or the like, which should have been escaped.
        rest = rest.rpartition("@")[2]
    address, _, query = rest.partition("?")
    parts = [part for part in query.split("&") if part and not _is_secret(part)]
    return f"{scheme}://{address}" + "?" * bool(parts) + "&".join(parts)


def _is_secret(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return bool(_SECRET.search(name)) or (len(value) >= _KEY_LENGTH and not _WHAT.fullmatch(name))
