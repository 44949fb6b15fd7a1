"""Unknown options are refused with what was meant, under their command's own usage."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

_LAUNCH = "launch sets the number of processes: captionscale launch --processes N -- {}"
_HINTS = {
    "resume": "training resumes by itself from the last checkpoint in --out RUN; leave it out",
    "profile": "--profile is a launch profile (captionscale launch); --trace-steps N traces N steps",
    "processes": _LAUNCH,
    "nproc_per_node": _LAUNCH,
    "num_processes": _LAUNCH,
    "gpus": _LAUNCH,
    "num_gpus": _LAUNCH,
}
"""What the options of `train` that other tools have are called here."""
_OTHER_NAMES = {
    "batch_size": "train.global_batch",
    "beam_size": "search.beam",
    "checkpoint": "train.init_from",
    "encoder": "model.encoder.name",
    "decoder": "model.decoder.name",
    "learning_rate": "train.lr",
    "max_epochs": "train.epochs",
    "max_length": "data.max_words",
    "max_steps": "train.steps",
    "mixed_precision": "train.precision",
    "num_beams": "search.beam",
    "num_epochs": "train.epochs",
    "num_workers": "data.workers",
    "wd": "train.weight_decay",
}
"""Config keys by the names that other tools have for them."""


class CommandParser(argparse.ArgumentParser):
    """Refuses an unknown option itself, where argparse leaves it to the parser of all commands."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and exit with this command's usage if something is unknown."""
        words = list(sys.argv[1:] if args is None else args)
        # Before argparse names a missing argument. What follows another command's name is for that one.
        if not any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            self._refuse_unknown(words)
        options, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self._refuse_unknown(unknown)
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        for word, following in zip(words, [*words, "--"][1:], strict=True):
            option, equals, value = word.partition("=")
            if word == "--":
                return
            known = self._option_string_actions
            if option.startswith("--") and " " not in word and not any(k.startswith(option) for k in known):
                if not equals:
                    value = "..." if following.startswith("--") else following
                self.error(f"unknown option {option}; {self._meant(option, value)}")

    def _meant(self, option: str, value: str) -> str:
        name = option.removeprefix("--").replace("-", "_")
        command = self.prog.split()[-1]
        if command == "train" and name in _HINTS:
            return _HINTS[name].format(command)
        settable = self._option_string_actions.get("--set")
        keys = list(_config_keys(str(settable.metavar).partition("key")[0])) if settable else []
        exact = [key for key in keys if key == _OTHER_NAMES.get(name)]
        exact += [key for key in keys if name in (key, key.rpartition(".")[2])]
        if exact:
            return f"did you mean {' or '.join(f'--set {key}={value}' for key in exact)}?"
        options = sorted(each for each in self._option_string_actions if each.startswith("--"))
        if near := get_close_matches(option, options, n=1, cutoff=0.6):
            return f"did you mean {near[0]}?"
        last = {key.rpartition(".")[2]: key for key in keys}
        if near := get_close_matches(name, last, n=1, cutoff=0.7):
            return f"did you mean --set {last[near[0]]}={value}?"
        return f"known: {', '.join(options)}"


def _config_keys(start: str) -> Iterator[str]:
    """Yield the config keys below `section.` for any section, or below the one that is named."""
    from captionscale.config import Config
    from captionscale.config_base import Section

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            kinds: list[Any] = [field.annotation, *get_args(field.annotation)]
            inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
            for kind in inner:
                yield from walk(kind, f"{prefix}{name}.")
            if not inner:
                yield prefix + name

    keys = dict.fromkeys(walk(Config, ""))
    yield from (key for key in keys if start == "section." or key.startswith(start))
