"""Untrusted text, escaped for its target: a terminal, HTML, Markdown, a shell, a file name.

Names, captions, keys and messages come from manifests, configs, checkpoints, tars and servers. Each writer
passes them through the function of its target; `captionscale.terminal` does so for all that is printed.
"""

import hashlib
import html
import os
import re
import shlex

# C0 and C1 controls, DEL, line and paragraph separators, bidi embeddings, overrides and isolates, and lone
# surrogates. Joiners stay, as scripts and emoji need them.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_WITHIN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")
_SHORT = {"\b": r"\b", "\t": r"\t", "\n": r"\n", "\f": r"\f", "\r": r"\r"}
# Of ASCII punctuation: what starts something within a line, what does so at its start, and what makes GitHub
# turn an address into a link.
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~!#$:@]|^\d*[-+.)=]|(?<=www)\.", re.IGNORECASE)
_NOT_IN_A_NAME = re.compile(rf'[{_CONTROLS}/\\<>:"|?*]|^[-.~ ]|[. ]$')
# Windows keeps these, whatever follows the first dot.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_NAME_BYTES = 255
_DIGEST = 8


def for_terminal(text: str) -> str:
    r"""Return text as one line that moves no cursor, changes no color and reverses no direction.

    What is escaped becomes `\n` or `\u001b`, as JSON and TOML write it.

    Examples:
        >>> print(for_terminal("a\x1b[2Jb\nc"))
        a\u001b[2Jb\nc
    """
    return _CONTROL.sub(_escaped, text)


def for_terminal_lines(text: str) -> str:
    """Return the same with its lines and tabs kept."""
    return _CONTROL_WITHIN_LINES.sub(_escaped, text)


def for_html(text: str) -> str:
    """Return text for HTML, between tags or within a quoted attribute; lines and tabs are kept.

    Examples:
        >>> for_html('"><b>')
        '&quot;&gt;&lt;b&gt;'
    """
    return html.escape(for_terminal_lines(text))


def for_markdown(text: str) -> str:
    r"""Return text for a line, a heading or a table's cell of Markdown, where it is shown as it is.

    In a table a space has to follow it.

    Examples:
        >>> print(for_markdown("a_b | <i>"))
        a\_b \| \<i\>
    """
    return _MARKUP.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", for_terminal(text).strip())


def for_markdown_code(text: str) -> str:
    """Return text as a code span of Markdown, outside of tables.

    Examples:
        >>> for_markdown_code("nrefs:5|tok")
        '`nrefs:5|tok`'
        >>> for_markdown_code("a`b")
        '`` a`b ``'
    """
    text = for_terminal(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    # CommonMark takes one space off each side, unless there is nothing else.
    return f"{fence} {text} {fence}" if longest or text != text.strip() or not text else fence + text + fence


def for_shell(*words: str) -> str:
    r"""Return a command, in one line, that bash splits into these very words.

    Examples:
        >>> print(for_shell("rm", "a b", "c\nd"))
        rm 'a b' $'c\x0ad'
    """
    return " ".join(_quoted(word) if _CONTROL.search(word) else shlex.quote(word) for word in words)


def for_file_name(text: str, ending: str = "") -> str:
    """Return a file name with this ending: not hidden, no option, short enough for every file system.

    Different texts have different names: a text that cannot be one as it is gets a hash of itself.

    Examples:
        >>> for_file_name("dog 1", ".png")
        'dog 1.png'
        >>> for_file_name("../dog", ".png")
        '_._dog-4a79e6c2.png'
    """
    limit = _NAME_BYTES - len(os.fsencode(ending))
    plain = text and not _NOT_IN_A_NAME.search(text) and not _RESERVED.match(text)
    if plain and len(text.encode()) <= limit:
        return text + ending
    name = _NOT_IN_A_NAME.sub("_", text)
    if _RESERVED.match(name):
        name = f"_{name}"
    short = name.encode()[: limit - _DIGEST - 1].decode(errors="ignore")
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_DIGEST]
    return f"{short or '_'}-{digest}{ending}"


def _escaped(found: re.Match[str]) -> str:
    return _SHORT.get(found[0], f"\\u{ord(found[0]):04x}")


def _quoted(word: str) -> str:
    """Quote a word with control characters: bash's $'...' holds them escaped."""

    def as_bytes(found: re.Match[str]) -> str:
        # bash would write \u in the locale's encoding.
        undecodable = "\udc80" <= found[0] <= "\udcff"
        data = found[0].encode(errors="surrogateescape" if undecodable else "surrogatepass")
        return "".join(f"\\x{byte:02x}" for byte in data)

    quoted = re.sub(r"([\\'])", r"\\\1", word)
    return f"$'{_CONTROL.sub(as_bytes, quoted)}'"
