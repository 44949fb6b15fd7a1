"""Files that ship with the code: configs, launch profiles, recipes, SLURM scripts.

In a checkout they are top-level folders; a wheel has copies in `captionscale/_assets/`.
"""

from pathlib import Path

from captionscale.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """Return one of the folders `configs`, `launch`, `shards` or `slurm`.

    A checkout's own folder comes first, so that an editable install reads what the user edits.
    """
    checkout = _PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").is_file() else _PACKAGE / "_assets"
    return root / name


def find(kind: str, name: str, suffix: str) -> Path:
    """Return a file by its path, or by its name in a folder such as `configs`, with or without suffix.

    Raises:
        UserError: Neither a file nor a shipped name.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = folder(kind) / f"{name.removesuffix(suffix)}{suffix}"
    if shipped.is_file():
        return shipped
    raise UserError(
        f"{name}: no such file, and no such name in {kind}/; {did_you_mean(name, names(kind, suffix))}"
    )


def names(kind: str, suffix: str) -> list[str]:
    """Return the names that `find` knows, sorted."""
    return sorted(path.stem for path in folder(kind).glob(f"*{suffix}"))
