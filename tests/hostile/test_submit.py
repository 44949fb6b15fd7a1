"""Whatever `submit` and the recipes are given travels as it is, or is refused; none of it is run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from captionscale import assets, cli, toml
from captionscale.errors import UserError
from captionscale.tools import submit

SHARDS = Path(__file__).parents[2] / "shards"
NASTY = [
    "plain",
    "a b",
    "a\nb",
    "x\ntouch PWNED",
    "x\n#SBATCH --wrap=true\n",
    "x\r",
    "x\x1b[31m",
    "x\u2028touch PWNED",
    "x\x85touch PWNED",
    "x\udcff",
    "x\\",
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED #",
    "' ; touch PWNED ; '",
    '" ; touch PWNED ; "',
    'it\'s "so"',
    "a # b",
    "100%j",
    "$HOME",
    "~",
    "*",
    "[a-z]?{x,y}",
    "-rf",
    "--help",
    "!! é 狗 👩‍👩‍👧",
    "",
]
# Stand-ins for SLURM: sbatch runs the script here, srun says what it was to run.
SBATCH = """#!/usr/bin/env bash
export SLURM_JOB_ID=7 SLURM_JOB_END_TIME=0 SLURM_CPUS_ON_NODE=2
bash "${@: -1}" >&2 && echo 7
"""
SRUN = """#!/usr/bin/env bash
while (($#)) && [[ $1 != captionscale ]]; do shift; done
printf '%s\\0' "$@" >>"$TOLD"
printf ';END;\\0' >>"$TOLD"
"""
CAPTIONSCALE = """#!/usr/bin/env bash
printf '%s\\0' captionscale "$@" >>"$TOLD"
printf ';END;\\0' >>"$TOLD"
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of what srun and captionscale were given, NUL after each; we are in an empty folder."""
    programs, here = tmp_path / "bin", tmp_path / "here"
    programs.mkdir()
    here.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "captionscale": CAPTIONSCALE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.delenv("CAPTIONSCALE_PROFILE", raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(here)
    return tmp_path / "told"


def commands(told: Path) -> list[list[str]]:
    """Return the commands that a file of `told` holds."""
    if not told.exists():
        return []
    text = told.read_bytes().decode(errors="surrogateescape")
    return [command.split("\0")[:-1] for command in text.split(";END;\0")[:-1]]


def code(arguments: list[str]) -> int:
    """Run a command that succeeds or is refused, and return its exit code."""
    try:
        cli.main(arguments)
    except SystemExit as end:
        if end.code != 1:
            raise
        return 1
    return 0


def options(script: str) -> list[str]:
    r"""Return the words of the #SBATCH lines, split as sbatch's opt.c does: \\ escapes in quotes too."""
    words = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            word, quote, letters = "", "", iter(line.removeprefix("#SBATCH").strip() + " ")
            for letter in letters:
                if letter == "\\":
                    word += next(letters)
                elif quote:
                    word, quote = (word, "") if letter == quote else (word + letter, quote)
                elif letter in "'\"":
                    quote = letter
                elif letter == "#":
                    break
                elif letter.isspace():
                    words += [word] * bool(word)
                    word = ""
                else:
                    word += letter
        elif line and not line.startswith("#"):
            break
    return words


@pytest.mark.parametrize("nasty", NASTY)
def test_the_folder_of_a_run_travels_or_is_refused(nasty, told: Path, capsys) -> None:
    arguments = ["submit", "attention", f"--out={nasty}/run" if nasty else "--out=run"]
    if code(arguments):
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "holds a line break, another control character or a backslash" in said
        assert not commands(told)
        assert not list(Path.cwd().iterdir())
        return
    run = Path(nasty, "run").absolute() if nasty.startswith("-") else Path(nasty, "run")
    doctor, train = commands(told)
    assert doctor[-3:] == [str(run / "job.toml"), "--out", str(run)]
    assert train[-4:] == ["train", str(run / "job.toml"), "--out", str(run)]
    assert train[train.index("--log-dir") + 1] == f"{run}/logs/7.0"
    words = options((run / "job.sbatch").read_text(encoding="utf-8"))
    log = f"{str(run / 'logs').replace('%', '%%')}/%j.log"
    assert [word for word in words if word.startswith("--output")][-1] == f"--output={log}"
    assert [word for word in words if word.startswith("--job-name")][-1] == "--job-name=run"
    assert toml.load(run / "job.toml") == toml.load("attention")
    assert {path.name for path in Path.cwd().iterdir()} == {Path(nasty, "run").parts[0]}
    said = capsys.readouterr().out
    shown = [line.partition("tail ")[2] for line in said.splitlines() if "tail " in line]
    done = subprocess.run(["bash", "-c", f"printf %s {shown[0]}"], capture_output=True, check=True)
    assert done.stdout.decode() == f"-F{run}/logs/7.log"


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("option", ["--set", "--profile", "--time"])
def test_other_arguments_travel_or_are_refused(option, nasty, told: Path, capsys) -> None:
    profile = "gpu"
    if option == "--profile":
        if "/" in nasty or not nasty:
            return
        profile = f"./{nasty}.yaml"
        shutil.copy(assets.find("launch", "gpu", ".yaml"), profile)
    value = {"--set": f"data.shards={nasty}", "--profile": profile, "--time": nasty}[option]
    if code(["submit", "attention", "--out", "run", f"{option}={value}"]):
        assert capsys.readouterr().err.count("\n") == 1
        assert not commands(told)
        assert not Path("run").exists()
        # Only what cannot be said is refused.
        assert not nasty.isprintable() or "\\" in nasty
        return
    assert not Path("PWNED").exists()
    doctor, train = commands(told)
    assert train[train.index("--profile") + 1] == doctor[doctor.index("--profile") + 1] == profile
    if option == "--time" and nasty:
        assert options(Path("run/job.sbatch").read_text(encoding="utf-8"))[-2] == f"--time={nasty}"
    if option == "--set":
        assert toml.load(Path("run/job.toml")) == toml.load("attention", [value])


def test_a_script_that_bash_cannot_read_is_neither_written_nor_submitted(told, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "slurm"
    shutil.copytree(assets.folder("slurm"), folder)
    with (folder / "site.sh").open("a") as file:
        file.write("if true; then\n")
    find = assets.folder
    monkeypatch.setattr(assets, "folder", lambda name: folder if name == "slurm" else find(name))
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"slurm: the job made .* no valid script \(.*correct site.sh"):
            submit.submit(
                toml.load("attention"),
                Path("run"),
                nodes=1,
                gpus=1,
                time=None,
                profile="gpu",
                dry_run=dry_run,
            )
    assert not commands(told)
    assert not Path("run").exists()


def test_a_line_separator_in_a_comment_of_the_site_ends_no_comment(told, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "slurm"
    shutil.copytree(assets.folder("slurm"), folder)
    with (folder / "site.sh").open("a", encoding="utf-8") as file:
        file.write("# ours\u2028touch PWNED\x0btouch PWNED\x85touch PWNED\n")
    find = assets.folder
    monkeypatch.setattr(assets, "folder", lambda name: folder if name == "slurm" else find(name))
    cli.main(["submit", "attention", "--out", "run"])
    assert len(commands(told)) == 2
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("nasty", [each for each in NASTY if each and not each.startswith("-")])
def test_a_recipe_hands_its_arguments_on(nasty, told: Path) -> None:
    raw, out = Path(nasty), f"{nasty}/out"
    for name in ("train2014", "val2014", "test2014", "annotations"):
        (raw / name).mkdir(parents=True)
    for name in ("captions_train2014", "captions_val2014", "image_info_test2014"):
        (raw / "annotations" / f"{name}.json").touch()
    done = subprocess.run(
        ["bash", SHARDS / "coco2014.sh", raw, out, "--expect", "train=5", nasty, f"--expect=val={nasty}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *packs, verify = commands(told)
    assert [each[each.index("--images") + 1] for each in packs] == [
        f"{raw}/{name}" for name in ("train2014", "val2014", "test2014")
    ]
    assert all(each[each.index("--out") + 1] == out for each in packs)
    assert packs[0][-3:] == ["--expect", "train=5", nasty]
    assert packs[1][-3:] == ["--expect", f"val={nasty}", nasty]
    assert verify == ["captionscale", "verify", out, "--allow-leaks"]
    assert [path.name for path in Path.cwd().iterdir()] == [raw.parts[0]]
