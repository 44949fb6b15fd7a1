"""Unknown options are refused with what was meant, under their command's own usage."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

_LAUNCH = "launch sets the number of processes: captionscale launch --processes N -- train"
_TRAIN_HINTS = {
    "resume": "training resumes by itself from the last checkpoint in --out RUN; leave it out",
    "profile": "--profile is a launch profile (captionscale launch); --trace-steps N traces N steps",
    **dict.fromkeys(("processes", "nproc_per_node", "num_processes", "gpus", "num_gpus"), _LAUNCH),
}
"""Cures for options of other tools' training commands."""
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
"""Config keys by their names in other tools."""


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
            if word == "--":
                return
            option, equals, value = word.partition("=")
            known = any(name.startswith(option) for name in self._option_string_actions)
            if option.startswith("--") and " " not in word and not known:
                if not equals:
                    value = "..." if following.startswith("--") else following
                self.error(f"unknown option {option}; {self._suggestion(option, value)}")

    def _suggestion(self, option: str, value: str) -> str:
        name = option.removeprefix("--").replace("-", "_")
        if self.prog.split()[-1] == "train" and name in _TRAIN_HINTS:
            return _TRAIN_HINTS[name]
        settable = self._option_string_actions.get("--set")
        # --set takes keys of any `section.`, or of the section that it names.
        start = str(settable.metavar).partition("key")[0].removeprefix("section.") if settable else "none"
        keys = {key: key.rpartition(".")[2] for key in _config_keys() if key.startswith(start)}
        exact = [key for key in keys if key == _OTHER_NAMES.get(name)]
        exact += [key for key, last in keys.items() if name in (key, last)]
        if exact:
            return f"did you mean {' or '.join(f'--set {key}={value}' for key in exact)}?"
        options = sorted(each for each in self._option_string_actions if each.startswith("--"))
        if near := get_close_matches(option, options, n=1, cutoff=0.6):
            return f"did you mean {near[0]}?"
        by_last = {last: key for key, last in keys.items()}
        if near := get_close_matches(name, by_last, n=1, cutoff=0.7):
            return f"did you mean --set {by_last[near[0]]}={value}?"
        return f"known: {', '.join(options)}"


def _config_keys() -> list[str]:
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

    return list(dict.fromkeys(walk(Config, "")))
