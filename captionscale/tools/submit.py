"""Train as a SLURM job: one script made from those in `slurm/`, kept in the run's folder, given to sbatch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from captionscale import assets, credentials, toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.escape import for_shell, for_terminal
from captionscale.files import atomic_write
from captionscale.tools.profiles import check_process_count, read_profile

_SOURCE = re.compile(r"^(?:\[\[ -f slurm.*\n)?source slurm/(\S+)\n", re.MULTILINE)


def submit(
    settings: Config,
    run: Path,
    *,
    nodes: int,
    gpus: int | None,
    time: str | None,
    profile: str,
    dry_run: bool,
) -> None:
    """Write a run's job, `job.sbatch` and `job.toml` in its folder, submit it, and say how to follow it.

    Both hold all that the job reads: what changes in the checkout does not change a job that goes on later.

    Args:
        settings: The experiment.
        run: Folder of the run, which is made.
        nodes: How many machines.
        gpus: Of each; none: the job asks for none.
        time: As sbatch writes it, such as `4:00:00`; none: the partition's.
        profile: A file, or a name in `launch/`.
        dry_run: Print the job instead.

    Raises:
        UserError: No SLURM here, or it refuses the job; more processes than the experiment can have; a folder
            that cannot be written or that SLURM cannot be told of; or a script that bash cannot read.
    """
    if credentials.restore(settings.data.shards) != settings.data.shards:
        raise UserError(
            f"data.shards = {settings.data.shards}: was given with a password, key or token, which is not"
            " written to a job; expected a URL without it; put it where the job finds it, such as .netrc,"
            " ~/.aws/credentials or GOOGLE_APPLICATION_CREDENTIALS"
        )
    _refuse_unsayable("--out", str(run))
    _refuse_unsayable("--time", time or "")
    if str(run).startswith("-"):
        # It would be an option of each command that it is given to.
        run = run.absolute()
    facts = read_profile(assets.find("launch", profile, ".yaml"))
    here = gpus or int(facts["num_processes"])
    check_process_count(settings, nodes * here, nodes, facts)
    # In the name of a log file SLURM takes % for the start of a field.
    log = f"{str(run / 'logs').replace('%', '%%')}/%j.log"
    options = [f"--job-name={run.name}", f"--nodes={nodes}", f"--output={log}"]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += [f"--time={time}"] if time else []
    # Several nodes are had whole.
    options += [f"--cpus-per-task={here * settings.data.workers}"] if nodes == 1 else []
    job, experiment = run / "job.sbatch", run / "job.toml"
    script = _script("multi_node" if nodes > 1 else "single_node", options, profile, experiment, run)
    _refuse_unreadable(script)
    if dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found, wanted a machine from which SLURM takes jobs; log in there,"
            " or train here: captionscale launch"
        )
    # SLURM does not make the folder of a job's log: the job would just vanish.
    (run / "logs").mkdir(parents=True, exist_ok=True)
    for path, text in ((experiment, toml.dumps(settings)), (job, script)):
        with atomic_write(path) as file:
            file.write(text.encode())
    number = _sbatch(job)
    again, follow = for_shell("sbatch", str(job)), for_shell("tail", "-F", f"{run / 'logs' / number}.log")
    print(f"job {number}, written to {for_terminal(str(job))}, which `{again}` submits again")
    print(f"follow it:          {follow}")
    print(f"where it stands:    {for_shell('squeue', f'--job={number}')}")
    print(f"save and requeue:   {for_shell('scancel', '--signal=USR1', number)}")
    print(f"save and stop:      {for_shell('scancel', number)}")


def _refuse_unsayable(option: str, value: str) -> None:
    """Refuse what no `#SBATCH` line can hold."""
    # A log's name with a backslash would have no fields, such as the job's number.
    if for_terminal(value) != value or "\\" in value:
        raise UserError(
            f"{option} {value}: holds a line break, another control character or a backslash; expected a"
            f" value that fits into a line #SBATCH of a job; take another {option}"
        )


def _refuse_unreadable(script: str) -> None:
    """Refuse a script that bash cannot read, as after an edit of `site.sh`."""
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    if done.returncode:
        found = " ".join(done.stderr.decode(errors="replace").split())
        raise UserError(
            f"{assets.folder('slurm')}: the job made of it is no script ({found}); expected what bash reads;"
            " correct site.sh, and submit again"
        )


def _script(name: str, options: list[str], profile: str, experiment: Path, run: Path) -> str:
    """Return a script of `slurm/` with what it sources, its arguments and more options in it."""
    folder = assets.folder("slurm")
    text = (folder / f"{name}.sbatch").read_text(encoding="utf-8")
    while found := _SOURCE.search(text):
        text = text[: found.start()] + (folder / found[1]).read_text(encoding="utf-8") + text[found.end() :]
    # Not splitlines: bash ends a comment at a line feed alone.
    lines = text.removesuffix("\n").split("\n")
    # Of two options that differ, sbatch takes the later one, and looks no further than the first command.
    start = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) + 1
    said = for_shell("captionscale", *sys.argv[1:])
    ours = [
        f"# Written by: {said}",
        *(f"#SBATCH {for_shell(option)}" for option in options),
        for_shell("set", "--", str(experiment), str(run)),
        for_shell("export", f"CAPTIONSCALE_PROFILE={profile}", f"CAPTIONSCALE_LOGS={run / 'logs'}"),
        # Also where the cluster does not hand on the environment of who submits.
        f'export PATH={for_shell(str(Path(sys.executable).parent))}:"$PATH"',
    ]
    return "\n".join([*lines[:start], *ours, *lines[start:], ""])


def _sbatch(job: Path) -> str:
    """Submit a script as `site.sh` wants it, and return the job's number."""
    site = assets.folder("slurm") / "site.sh"
    command = 'source "$0" >/dev/null 2>&1; exec sbatch --parsable "$1"'
    done = subprocess.run(
        ["bash", "-c", command, str(site), str(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        found = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(
            f"{job}: sbatch refuses ({found}); correct the options, {site},"
            " or data.workers, by which it asks for cores"
        )
    # With several clusters: 123;name.
    return done.stdout.strip().partition(";")[0]
