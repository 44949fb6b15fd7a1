"""The wheel alone, in an empty environment, away from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment in which only the wheel and what it needs are installed."""
    home = tmp_path_factory.mktemp("wheel")
    python = home / "venv" / "bin" / "python"
    for command in (
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(home)],
        [sys.executable, "-m", "venv", "--without-pip", str(home / "venv")],
    ):
        subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    [wheel] = home.glob("*.whl")
    constraints = str(CHECKOUT / "constraints.txt")
    install = ["uv", "pip", "install", "--quiet", "--python", str(python), "--constraint", constraints]
    subprocess.run([sys.executable, "-m", *install, str(wheel)], check=True)
    return home


def _say(home: Path, *words: str) -> str:
    command = [str(home / "venv" / "bin" / "captionscale"), *words]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    return subprocess.run(
        command, cwd=home, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def test_the_wheel_carries_the_configs(home: Path) -> None:
    assert 'name = "resnet50"' in _say(home, "config", "attention")


@pytest.mark.parametrize(
    "command",
    [
        "pack",
        "verify",
        "show",
        "stats",
        "train",
        "launch",
        "submit",
        "drill",
        "caption",
        "score",
        "board",
        "leaderboard",
        "demo",
        "export",
        "config",
        "quickstart",
    ],
)
def test_every_command_has_help(home: Path, command: str) -> None:
    assert "usage: captionscale" in _say(home, command, "--help")


def test_the_wheel_carries_the_launch_profiles(home: Path) -> None:
    said = _say(home, "launch", "--profile", "cpu", "--dry-run", "--", "train", "attention", "--out", "run")
    assert "accelerate launch" in said
    assert "_assets/launch/cpu.yaml" in said
