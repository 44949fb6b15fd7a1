"""captionscale on one GPU: correctness, host waits, speed and resume, with one command in about ten minutes.

    python benchmarks/gpu.py --out DIR

writes DIR/gpu.json and DIR/gpu.md after each section, and traces. If a section fails, the others still run.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_correctness
import gpu_speed
import torch
from gpu_model import Report

from captionscale.machine import cpu_count
from captionscale.version import __version__

Section = Callable[[Report, Path, bool], None]


def _environment(report: Report, _: Path, __: bool) -> None:
    facts: dict[str, Any] = {"captionscale": __version__, "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "cuda": str(torch.version.cuda), "cores": cpu_count()}
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        facts |= {"gpu": torch.cuda.get_device_name(), "cudnn": str(cudnn)}
        facts |= {"memory_gb": torch.cuda.mem_get_info()[1] / 1e9}
    report.add("environment", **facts)


SECTIONS: dict[str, Section] = {
    "environment": _environment,
    "gradients": gpu_correctness.gradients,
    "captions": gpu_correctness.captions,
    "waits": gpu_correctness.waits,
    "resume": gpu_correctness.resume,
    "step": gpu_speed.step_time,
    "beam_search": gpu_speed.beam_search,
    "loader": gpu_speed.loader,
    "self_critical": gpu_speed.self_critical,
    "profile": gpu_speed.profile,
}


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the sections; return the report."""
    parser = argparse.ArgumentParser("gpu.py", description="captionscale on one GPU, in about ten minutes.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for gpu.json, gpu.md and traces"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument(
        "--tiny", action="store_true", help="a trial of this script with tiny models, on a CPU too"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("found no CUDA device; expected one, or --tiny for a trial on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    folder = Path(tempfile.mkdtemp(prefix="captionscale-gpu-"))
    try:
        for name in options.sections:
            started = time.perf_counter()
            try:
                SECTIONS[name](report, folder, options.tiny)
            # The other sections are worth having.
            except Exception as error:
                traceback.print_exc()
                report.add("failed", section=name, error=f"{type(error).__name__}: {str(error)[:300]}")
            finally:
                torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = flags
                os.environ.pop("ACCELERATE_USE_CPU", None)
            report.add("seconds", section=name, seconds=time.perf_counter() - started)
            report.write()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {"failed checks": report.failed_checks(), "failed sections": report.rows.get("failed", [])}
        )
    )
    return report


if __name__ == "__main__":
    main()
