"""PyTorch profiler traces of training steps: `captionscale train ... --trace-steps N`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP_STEPS = 5
"""Steps before those profiled: the first ones allocate memory and choose kernels."""

_ROWS = 10


@contextmanager
def profiling(run: Path, steps: int, start: int, say: Callable[..., None]) -> Iterator[Callable[[], None]]:
    """Profile this number of steps after a warm-up: write a trace, and print the most expensive operations.

    Yields:
        A function to call after each step.
    """
    if not steps:
        yield lambda: None
        return
    written = False

    def write_trace(profiler: profile) -> None:
        nonlocal written
        written = True
        path = run / "profile" / f"step-{start + profiler.step_num:08d}.json.gz"
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        events = profiler.key_averages()
        place = "device" if any(event.self_device_time_total for event in events) else "cpu"
        table = events.table(f"self_{place}_time_total", row_limit=_ROWS, max_name_column_width=50)
        say(*table.splitlines())
        say(f"{path}: the trace, for ui.perfetto.dev or chrome://tracing")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    phases = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write_trace) as profiler:
        yield profiler.step
    if not written:
        say(f"--trace-steps: no trace, as no step came after {WARMUP_STEPS} of warm-up")
