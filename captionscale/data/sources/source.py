"""The base class of the data sets that `captionscale pack` reads."""

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path

from captionscale import plugins
from captionscale.data.sources.record import Record
from captionscale.data.sources.registry import SOURCES


class Source(ABC):
    """A data set in its own files. Derive a class to read another one; see docs/extending.md."""

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options that say where the data set is."""

    @abstractmethod
    def read(self, options: Namespace) -> Iterable[Record]:
        """Return or yield the images, in any order, each once.

        Args:
            options: The source's own options and those of packing, such as `out`.

        Raises:
            UserError: The data set is missing or broken; the message says where, what was found, what was
                expected, and the cure.
        """

    def files(self, options: Namespace) -> list[Path]:
        """Return the files that were read, whose SHA-256 the manifest keeps; by default none."""
        del options
        return []


def load(name: str) -> Source:
    """Return the source of a name in the registry, or of a plug-in, `module:Class`."""
    return plugins.load(SOURCES[name][0] if name in SOURCES else name, Source)()  # type: ignore[type-abstract]
