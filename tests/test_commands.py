"""Properties of every command of the command line."""

import argparse
import shlex
from collections import defaultdict
from collections.abc import Iterator

import pytest

from captionscale.commands.parser import parser

PARSER = parser()


def commands(top: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command, and each source of `pack`, with its parser."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each, inner in action.choices.items():
                yield f"{name} {each}".strip(), inner
                yield from commands(inner, f"{name} {each}".strip())


COMMANDS = dict(commands(PARSER))


def usage_error(capsys: pytest.CaptureFixture[str], line: str) -> str:
    with pytest.raises(SystemExit) as caught:
        PARSER.parse_args(shlex.split(line))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_help_lists_every_command_once_under_a_group() -> None:
    lines = PARSER.format_help().splitlines()
    for name in (name for name in COMMANDS if " " not in name):
        assert len([line for line in lines if line.startswith(f"  {name} ")]) == 1, name
    assert [line for line in lines if line.endswith(":")][1:] == [
        "data:", "training:", "captions and scores:", "looking at a run, and sharing it:",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_explains_every_argument_and_ends_with_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    for action in command._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action
    example = command.format_help().splitlines()[-1].split()
    assert example[0] == "captionscale"
    assert " ".join(example[1:]).startswith(name)
    PARSER.parse_args(example[1:])


def test_an_option_means_the_same_in_every_command() -> None:
    uses = defaultdict(list)
    for name, command in COMMANDS.items():
        for option, action in command._option_string_actions.items():
            uses[option].append((name, action))
    for option, actions in uses.items():
        # `drill` takes several numbers of processes.
        kinds = {(type(each), each.dest, option == "--processes" or each.type) for _, each in actions}
        assert len(kinds) == 1, f"{option} in {[name for name, _ in actions]}: {kinds}"
    for option in ("--json", "--set", "--shards", "--checkpoint", "--ensemble", "--nodes", "--gpus"):
        assert len({each.help for _, each in uses[option]}) == 1, option
    # Defaults differ.
    assert {each.help.partition(" (")[0] for _, each in uses["--profile"]} == {
        "launch profile: a file, or a name in launch/"
    }
    assert {name for name, _ in uses["--profile"]} == {"launch", "submit", "doctor", "drill"}
    assert {each.metavar.split(".")[-1] for _, each in uses["--set"]} == {"key=value"}


def test_only_out_names_what_a_command_writes() -> None:
    assert {"--output", "--save", "--plot"}.isdisjoint(
        option for command in COMMANDS.values() for option in command._option_string_actions
    )


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("train attention --lr 1e-3", "did you mean --set train.lr=1e-3?"),
        ("train attention --lr=1e-3 --out run", "did you mean --set train.lr=1e-3?"),
        ("train attention --train.lr 1 --out run", "did you mean --set train.lr=1?"),
        (
            "train attention --batch-size 64 --out run",
            "did you mean --set train.global_batch=64 or --set search.batch_size=64?",
        ),
        ("train attention --epoch 3 --out run", "did you mean --set train.epochs=3?"),
        ("train attention --resume --out run", "training resumes by itself"),
        ("train attention --gpus 8 --out run", "captionscale launch --processes N -- train"),
        ("train attention --profile 20 --out run", "--trace-steps N"),
        ("caption run a.jpg --num-beams 3", "did you mean --set search.beam=3?"),
        ("caption run a.jpg --chekpoint last", "did you mean --checkpoint?"),
        ("verify shards --zebra", "known: --allow-leaks, --deep, --help, --json, --workers"),
        ("pack coco --imges x", "did you mean --images?"),
        ("show shards 1 2", "unrecognized arguments: 2"),
    ],
)
def test_an_unknown_option_is_refused_under_its_commands_usage_with_a_suggestion(
    line, suggestion, capsys
) -> None:
    error = usage_error(capsys, line)
    assert suggestion in error.splitlines()[-1]
    command = " ".join(line.split()[: 2 if line.startswith("pack") else 1])
    assert error.startswith(f"usage: captionscale {command} ")


def test_what_follows_launch_belongs_to_the_command_that_it_runs() -> None:
    assert PARSER.parse_args(["launch", "--", "train", "x", "--lr", "1"]).command[2:] == ["x", "--lr", "1"]


def test_a_command_without_arguments_parses() -> None:
    assert PARSER.parse_args(["config"]).config is None
