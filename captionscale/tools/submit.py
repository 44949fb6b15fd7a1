"""The command `submit`: make one SLURM script from those in `slurm/`, and submit it with sbatch."""

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
from captionscale.train.run_folder import JOB_CONFIG, JOB_SCRIPT

_SOURCE = re.compile(r"^(?:\[\[ -f slurm.*\n)?source slurm/(\S+)\n", re.MULTILINE)


def submit(
    config: Config,
    run: Path,
    *,
    nodes: int,
    gpus: int | None,
    time: str | None,
    profile: str,
    dry_run: bool,
) -> None:
    """Write `job.sbatch` and `job.toml` into a run's folder, submit the job, and print how to follow it.

    The job reads only these two files: later changes to the checkout do not change a requeued job.

    Args:
        config: The experiment.
        run: Folder of the run; created.
        nodes: Number of nodes.
        gpus: Of each node; None: the job requests none.
        time: As sbatch takes it, such as `4:00:00`; None: the partition's default.
        profile: A file, or a name in `launch/`.
        dry_run: Print the job instead.

    Raises:
        UserError: No SLURM here, or it refuses the job; processes that do not fit the experiment;
            a folder that cannot be written or named in a job; or a script that bash cannot parse.
    """
    if credentials.restore(config.data.shards) != config.data.shards:
        raise UserError(
            f"data.shards = {config.data.shards}: was given with a password, key or token, which is not"
            " written to a job, expected a URL without it; put it where the job finds it, such as .netrc,"
            " ~/.aws/credentials or GOOGLE_APPLICATION_CREDENTIALS"
        )
    for option, value in (("--out", str(run)), ("--time", time or "")):
        # SLURM does not expand % in a log's name with a backslash.
        if for_terminal(value) != value or "\\" in value:
            raise UserError(
                f"{option} {value}: holds a line break, another control character or a backslash, expected a"
                f" value that fits into an #SBATCH line; choose another {option}"
            )
    if str(run).startswith("-"):
        # Commands would take it for an option.
        run = run.absolute()
    facts = read_profile(assets.find("launch", profile, ".yaml"))
    local_processes = gpus or int(facts["num_processes"])
    check_process_count(config, nodes * local_processes, nodes, facts)
    # SLURM expands % in the name of a log file.
    log = f"{str(run / 'logs').replace('%', '%%')}/%j.log"
    options = [f"--job-name={run.name}", f"--nodes={nodes}", f"--output={log}"]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += [f"--time={time}"] if time else []
    # Several nodes are allocated whole.
    options += [f"--cpus-per-task={local_processes * config.data.workers}"] if nodes == 1 else []
    job, experiment = run / JOB_SCRIPT, run / JOB_CONFIG
    script = _script("multi_node" if nodes > 1 else "single_node", options, profile, experiment, run)
    _check_syntax(script)
    if dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found, expected a login node of a SLURM cluster; log in there, or train here with"
            " captionscale launch"
        )
    # Without the folder of its log, a job vanishes without a message.
    (run / "logs").mkdir(parents=True, exist_ok=True)
    for path, text in ((experiment, toml.dumps(config)), (job, script)):
        with atomic_write(path) as file:
            file.write(text.encode())
    number = _sbatch(job)
    again, follow = for_shell("sbatch", str(job)), for_shell("tail", "-F", f"{run / 'logs' / number}.log")
    print(f"job {number}, written to {for_terminal(str(job))}; `{again}` submits it again")
    print(f"follow its log:     {follow}")
    print(f"see its state:      {for_shell('squeue', f'--job={number}')}")
    print(f"save and requeue:   {for_shell('scancel', '--signal=USR1', number)}")
    print(f"save and stop:      {for_shell('scancel', number)}")


def _check_syntax(script: str) -> None:
    """Refuse a script that bash cannot parse, such as after an edit of `site.sh`."""
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    if done.returncode:
        found = " ".join(done.stderr.decode(errors="replace").split())
        raise UserError(
            f"{assets.folder('slurm')}: the job made from it is no valid script ({found}), expected one that"
            " bash parses; correct site.sh, and submit again"
        )


def _script(name: str, options: list[str], profile: str, experiment: Path, run: Path) -> str:
    """Return a script of `slurm/` with its sourced files, arguments and options inlined."""
    folder = assets.folder("slurm")
    text = (folder / f"{name}.sbatch").read_text(encoding="utf-8")
    while found := _SOURCE.search(text):
        text = text[: found.start()] + (folder / found[1]).read_text(encoding="utf-8") + text[found.end() :]
    # Not splitlines: bash ends a comment at a line feed alone.
    lines = text.removesuffix("\n").split("\n")
    # sbatch takes the later of two options, and reads none after the first command.
    start = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) + 1
    added = [
        f"# Written by: {for_shell('captionscale', *sys.argv[1:])}",
        *(f"#SBATCH {for_shell(option)}" for option in options),
        for_shell("set", "--", str(experiment), str(run)),
        for_shell("export", f"CAPTIONSCALE_PROFILE={profile}", f"CAPTIONSCALE_LOGS={run / 'logs'}"),
        # Clusters may not pass on the environment of the submitting shell.
        f'export PATH={for_shell(str(Path(sys.executable).parent))}:"$PATH"',
    ]
    return "\n".join([*lines[:start], *added, *lines[start:], ""])


def _sbatch(job: Path) -> str:
    """Submit a script in the environment of `site.sh`, and return the job's number."""
    site = assets.folder("slurm") / "site.sh"
    command = 'source "$0" >/dev/null 2>&1; exec sbatch --parsable "$1"'
    done = subprocess.run(
        ["bash", "-c", command, str(site), str(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        found = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(
            f"{job}: sbatch refuses it ({found}), expected a job that the cluster accepts; correct the"
            f" options, {site}, or data.workers, which sets the number of cores"
        )
    # On several clusters: 123;name.
    return done.stdout.strip().partition(";")[0]
