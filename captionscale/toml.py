"""Configs as TOML files."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import getitem
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from captionscale import assets, credentials, parsing
from captionscale.config import Config
from captionscale.config_base import Section
from captionscale.config_model import DecoderConfig, EncoderConfig, Model
from captionscale.config_renames import RENAMED
from captionscale.errors import UserError, did_you_mean
from captionscale.files import read_file

_MAX_SHOWN = 200


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config: a path, or the name of a file in `configs/`.

    An override is `section.key=value`, the value as TOML writes it (a bare word is a string).

    Raises:
        UserError: No such file, not TOML, an unknown key, or a value out of range.
    """
    path = assets.find("configs", str(source), ".toml")
    try:
        tree = parsing.toml(read_file(path).decode())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), expected a config; correct the path"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not a TOML file: {error}; correct that line") from None
    return _validate(path, tree, overrides)


def override(config: Config, overrides: Sequence[str], section: str, *, option: str = "--set ") -> Config:
    """Return a config with other values in one section; errors put `option` before an override.

    Raises:
        UserError: A key of another section, an unknown key, or a value out of range.
    """
    for each in overrides:
        if not each.strip().startswith(f"{section}."):
            raise UserError(
                f"{option}{each}: expected a key of section {section}, as training has fixed the others;"
                f" see {section} in captionscale config, and write --set {section}.key=value"
            )
    place = option.strip() or section
    return _validate(place, config.model_dump(mode="json", exclude_none=True), overrides, option)


def _validate(
    place: Path | str, tree: dict[str, Any], overrides: Sequence[str], option: str = "--set "
) -> Config:
    """Return a tree as a config, after overrides."""
    for each in overrides:
        _put(tree, each)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = _explain(place, overrides, tree, error.errors(), option)
        raise UserError(*map(credentials.strip, lines)) from None


def dumps(config: Config) -> str:
    """Return the whole tree as TOML, defaults included, that `load` reads back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested tree as one level of dotted keys.

    Examples:
        >>> flatten({"seed": 1, "train": {"lr": 0.1}})
        {'seed': 1, 'train.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _put(tree: dict[str, Any], change: str) -> None:
    """Write one `section.key=value` into the tree."""
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"--set {change}: no '='; write --set section.key=value")
    try:
        change.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--set {change}: not UTF-8, expected text that a TOML file can hold; rename the file or folder"
        ) from None
    try:
        value = parsing.toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {change}: '{section}' is a value, not a section; see captionscale config")
    tree[last] = value


def _explain(
    path: Path | str, overrides: Sequence[str], tree: dict[str, Any], findings: Iterable[Any], option: str
) -> Iterator[str]:
    """Turn pydantic's findings into place, found, expected, cure: one line for each key."""
    for (section, key), group in groupby(findings, lambda found: _locate(found["loc"], tree)):
        first, *others = group
        if first["type"] == "value_error":
            yield f"{path}: {first['ctx']['error']}"
            continue
        *sections, name = key
        dotted = ".".join(key)
        place = ": ".join([str(path), ".".join(sections)] if sections else [str(path)])
        change = next((each for each in overrides if each.split("=")[0].strip() == dotted), None)
        if change is not None:
            place = f"{option}{change}"
        if first["type"] == "extra_forbidden" and dotted in RENAMED:
            where = path if change is None else place
            yield f"{where}: {dotted} is a key of version 0.1, expected {RENAMED[dotted]}; rename it"
        elif first["type"] == "extra_forbidden" and issubclass(section, EncoderConfig | DecoderConfig):
            kind = sections[-1]
            network = reduce(getitem, sections, tree).get("name") or getattr(Model(), kind).name
            hint = did_you_mean(name, section.model_fields)
            join = " If not," if hint.endswith("?") else ";"
            yield (
                f"{place}: unknown key '{name}' with {kind} '{network}'; {hint}{join} leave it out, or"
                f" change model.{kind}.name"
            )
        elif first["type"] == "extra_forbidden":
            yield f"{place}: unknown key '{name}'; {did_you_mean(name, section.model_fields)}"
        elif first["type"] == "missing" and first["loc"] == key:
            yield f"{place}: key '{name}' is missing; add it to the file or pass --set {dotted}=..."
        else:
            texts = [found["msg"] for found in (first, *others)]
            messages = dict.fromkeys(text[:1].lower() + text[1:] for text in texts)
            meaning = " ".join((section.model_fields[name].description or "").split())
            value = _shown(reduce(getitem, key, tree))
            yield f"{place}: {name} = {value}: {' or '.join(messages)}" + f" ({meaning})" * bool(meaning)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits.
        text = "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _locate(place: tuple[Any, ...], tree: Any) -> tuple[type[Section], tuple[Any, ...]]:
    """Return the section and the key that a finding is about.

    What follows the key in pydantic's place is an item of the value, or a type that it tried.
    """
    section: type[Section] = Config
    for depth, name in enumerate(place, start=1):
        field = section.model_fields.get(name)
        inner = field.annotation if field else None
        if depth == len(place) or not (isinstance(inner, type) and issubclass(inner, Section)):
            return section, place[:depth]
        tree = tree.get(name, {})
        section = inner.of(tree)
    return section, ()
