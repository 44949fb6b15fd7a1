"""The error that a user can fix, and the words that help to fix it."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice

_FEW = 5


class UserError(Exception):
    """Something that the user can put right: the command line prints it in one line and exits with 1.

    Its text has four parts: the place, what was found, what was wanted, and the cure. Several problems are as
    many arguments, and as many lines.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class PreemptedError(Exception):
    """The process was asked to leave before its work was done, and has; its text says what is kept."""

    EXIT_CODE = 75
    """What it exits with: sysexits.h's EX_TEMPFAIL. The same command goes on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the tail of an error about an unknown word: the nearest known one, or all of them.

    Args:
        word: What the user wrote.
        known: What could have been written.

    Examples:
        >>> did_you_mean("globl_batch", ["global_batch", "micro_batch"])
        "did you mean 'global_batch'?"
    """
    choices = sorted(known)
    nearest = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(choices)}"


def describe_images(images: Collection[object]) -> str:
    """Return how many images these are, and the first three of them, for an error.

    Examples:
        >>> describe_images([1, 2, 3, 4])
        '4 images (1, 2, 3, ...)'
    """
    first = ", ".join(map(str, islice(images, 3)))
    return f"{len(images):,} image{'s' * (len(images) > 1)} ({first}{', ...' * (len(images) > 3)})"


def first_few(lines: Sequence[str], everything: str) -> list[str]:
    """Return the first lines of those that there is one of for each image, and how many more there are.

    Args:
        lines: All of them.
        everything: Where all of them can be read.

    Examples:
        >>> first_few(["a", "b", "c", "d", "e", "f", "g"], "--json")
        ['a', 'b', 'c', 'd', 'e', '... and 2 more; --json lists all 7']
    """
    more = len(lines) - _FEW
    rest = [f"... and {more:,} more; {everything} lists all {len(lines):,}"] if more > 0 else []
    return [*lines[:_FEW], *rest]
