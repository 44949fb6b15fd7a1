"""Tar headers and padding, which give each member's offset in a tenth of `tarfile`'s time."""

import tarfile

BLOCK = 512
END = bytes(2 * BLOCK)


# Fixed time and owner, so that the same samples give the same bytes.
_MEMBER = tarfile.TarInfo()
_MEMBER.uname = _MEMBER.gname = "captionscale"
_BLANK = _MEMBER.tobuf(tarfile.USTAR_FORMAT)
# Checksum of a blank header without its size; the format counts the checksum field as spaces.
_BLANK_SUM = sum(_BLANK) - sum(_BLANK[124:136]) - sum(_BLANK[148:156]) + 8 * ord(" ")


def header(name: str, size: int) -> bytes:
    """Return the header of a member with an ASCII name of at most 100 characters and less than 8 GiB.

    Source:
        POSIX.1-1988 ustar, as in IEEE Std 1003.1-2017, pax, "ustar Interchange Format".
    """
    name_field, size_field = name.encode("ascii"), b"%011o\0" % size
    assert (len(name_field) <= 100, len(size_field)) == (True, 12), (name, size)
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(name_field) + sum(size_field))
    fields = (_BLANK[100:124], size_field, _BLANK[136:148], checksum, _BLANK[156:])
    return name_field.ljust(100, b"\0") + b"".join(fields)


def padding(size: int) -> bytes:
    """Return the zeros after a file."""
    return bytes(-size % BLOCK)
