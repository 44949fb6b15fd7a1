"""Where the time of training steps goes: `captionscale train ... --trace-steps N`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP_STEPS = 5
"""Steps before those that are looked at: the first ones allocate, and choose kernels."""

_ROWS = 10


@contextmanager
def profiling(run: Path, steps: int, start: int, say: Callable[..., None]) -> Iterator[Callable[[], None]]:
    """Write what some steps spent their time on into a run's folder, and tell of the costliest operations.

    Args:
        run: Its folder.
        steps: How many, after a warm-up; with 0, none.
        start: Steps that were taken before.
        say: Tells people lines.

    Yields:
        What is to be called after each step.
    """
    if not steps:
        yield lambda: None
        return
    told = False

    def tell(profiler: profile) -> None:
        nonlocal told
        told = True
        path = run / "profile" / f"step-{start + profiler.step_num:08d}.json.gz"
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        say(*_table(profiler))
        say(f"{path}: the trace, for ui.perfetto.dev or chrome://tracing")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    phases = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=tell) as profiler:
        yield profiler.step
    if not told:
        say(f"--trace-steps: no trace, as no step came after {WARMUP_STEPS} of warm-up")


def _table(profiler: profile) -> list[str]:
    """Return the costliest operations by their own time, that of what they call left out."""
    events = profiler.key_averages()
    place = "device" if any(event.self_device_time_total for event in events) else "cpu"
    microseconds = {event.key: float(getattr(event, f"self_{place}_time_total")) for event in events}
    calls, whole = {event.key: event.count for event in events}, sum(microseconds.values())
    costliest = sorted(microseconds, key=lambda key: -microseconds[key])[:_ROWS]
    names = {
        key: "Python, between operations" if key.startswith("ProfilerStep") else key for key in costliest
    }
    rows = [
        f"{names[key][:50]:50} {calls[key]:8,} {own / 1000:10,.1f} {own / whole:6.1%}"
        for key, own in ((key, microseconds[key]) for key in costliest)
    ]
    return [f"{'operation':50} {'calls':>8} {place + ' ms':>10} {'share':>6}", *rows]
