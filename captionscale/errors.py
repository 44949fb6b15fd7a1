"""Errors that a user can fix, and helpers for their messages."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice

_FEW = 5


class UserError(Exception):
    """An error that the user can fix: the command line prints one line and exits with 1.

    The text has four parts: the place, what was found, what was expected, and the cure. Several problems are
    several arguments, a line each.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class PreemptedError(Exception):
    """The process was asked to exit before its work was done; the text names what is kept."""

    EXIT_CODE = 75
    """Exit code: EX_TEMPFAIL of sysexits.h. The same command resumes."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown word: the nearest known one, or all of them.

    Examples:
        >>> did_you_mean("globl_batch", ["global_batch", "micro_batch"])
        "did you mean 'global_batch'?"
    """
    choices = sorted(known)
    nearest = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(choices)}"


def describe_images(images: Collection[object]) -> str:
    """Return the number of images and the first three, for an error.

    Examples:
        >>> describe_images([1, 2, 3, 4])
        '4 images (1, 2, 3, ...)'
    """
    first = ", ".join(map(str, islice(images, 3)))
    return f"{len(images):,} image{'s' * (len(images) > 1)} ({first}{', ...' * (len(images) > 3)})"


def first_few(lines: Sequence[str], everything: str) -> list[str]:
    """Return the first lines, and how many more the option or file `everything` lists.

    Examples:
        >>> first_few(["a", "b", "c", "d", "e", "f", "g"], "--json")
        ['a', 'b', 'c', 'd', 'e', '... and 2 more; --json lists all 7']
    """
    more = len(lines) - _FEW
    rest = [f"... and {more:,} more; {everything} lists all {len(lines):,}"] if more > 0 else []
    return [*lines[:_FEW], *rest]
