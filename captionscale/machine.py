"""Facts about this machine."""

import os
import platform
from pathlib import Path


def cpu_count() -> int:
    """Return how many cores this process may use, which in a job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """Return the processor's model name, or its architecture if the kernel gives none."""
    # psutil does not know it.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def gpu_names() -> list[str]:
    """Return the name of each GPU that torch can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(number) for number in range(count)]
