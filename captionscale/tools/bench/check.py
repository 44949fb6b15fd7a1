"""`captionscale bench --quick`: every benchmark at a small size, and whether one of its ratios has fallen."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from captionscale import parsing, subprocesses
from captionscale.errors import UserError
from captionscale.files import atomic_write, read_file
from captionscale.progress import SafeConsole, console, say
from captionscale.tools.bench.race import Sheet

RATIOS = Path(__file__).with_name("ratios.toml")
"""Those that are committed: of each benchmark, table and way, how many times as fast ours was."""

_LEAST = 0.5
"""Share of a committed ratio below which one has fallen; a busy machine may cost much of it."""

Ratios = dict[str, dict[str, dict[str, float]]]


def quick(benches: Mapping[str, Sequence[str]], *, check: bool, write: bool, as_json: bool) -> None:
    """Run benchmarks, each in a process of its own, and show what they measured.

    Args:
        benches: Their arguments, by their names.
        check: Compare their ratios with the committed ones.
        write: Put them in the place of the committed ones.
        as_json: As `race.show` has it.

    Raises:
        UserError: Nothing to compare with, a benchmark failed, or a ratio has fallen.
    """
    committed = {name: each for name, each in _committed().items() if name in benches}
    if check and not committed:
        raise UserError(f"{RATIOS}: no ratio of these benchmarks, wanted some to compare with; see --write")
    out = SafeConsole()
    tables: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    failed = []
    for name, arguments in benches.items():
        say(f"bench {name} ...")
        command = [sys.executable, "-m", "captionscale", "bench", name, *arguments, "--json"]
        done = subprocesses.run(command)
        if done.returncode:
            failed.append(name)
            continue
        found = parsing.loads(done.stdout)
        machine, tables = found["machine"], tables + found["tables"]
        for table in () if as_json else found["tables"]:
            Sheet(table["title"], table["columns"], table["rows"], table["notes"]).print(out)
    if as_json:
        print(json.dumps({"machine": machine, "tables": tables}, indent=1))
    measured = ratios(tables)
    if write and measured:
        _commit(measured, machine)
    if failed:
        raise UserError(f"bench --quick: {', '.join(failed)} failed, and told why; mend that first")
    if check:
        _refuse_fallen(measured, committed)


def ratios(tables: Sequence[Mapping[str, Any]]) -> Ratios:
    """Return how many times as fast ours was as each guarded way; of tables as `--json` has them."""
    found: Ratios = {}
    for table in tables:
        if others := [lane for lane in table["lanes"][1:] if lane["guarded"]]:
            lanes = found.setdefault(table["bench"], {}).setdefault(table["title"], {})
            lanes |= {lane["name"]: lane["ratio"][0] for lane in others}
    return found


def fallen(measured: Ratios, committed: Ratios) -> Iterator[tuple[str, str, str, float, float | None]]:
    """Yield the ratios that have fallen below half of the committed ones, or are no longer measured.

    Returns:
        Benchmark, table, way, and its ratios: committed and measured.
    """
    for bench, tables in committed.items():
        for title, ways in tables.items():
            for way, before in ways.items():
                now = measured.get(bench, {}).get(title, {}).get(way)
                if now is None or not now >= _LEAST * before:
                    yield bench, title, way, before, now


def _refuse_fallen(measured: Ratios, committed: Ratios) -> None:
    lost = list(fallen(measured, committed))
    count = sum(len(ways) for tables in committed.values() for ways in tables.values())
    if not lost:
        say(f"all {count:,} committed ratios hold: none is below {_LEAST:.0%} of what it was")
        return
    rows: list[Sequence[str | int | float]] = [
        (f"{bench}: {title}", way, f"{before:.2f}", "none" if now is None else f"{now:.2f}")
        for bench, title, way, before, now in lost
    ]
    columns = ("table", "ours beside", "committed", "now")
    # The standard output may be JSON.
    Sheet("Ratios that have fallen", columns, rows).print(console())
    raise UserError(
        f"bench --check: {len(lost):,} of {count:,} ratios are below {_LEAST:.0%} of the committed ones; find"
        f" what made ours slower, or, if it is the other way that got faster, renew {RATIOS.name} by --write"
    )


def _committed() -> Ratios:
    try:
        return parsing.toml(read_file(RATIOS).decode()) if RATIOS.exists() else {}
    except ValueError as error:
        raise UserError(f"{RATIOS}: {error}, wanted TOML; take it from the repository again") from None


def _commit(measured: Ratios, machine: Mapping[str, Any]) -> None:
    rounded = {
        bench: {
            title: {way: float(f"{each:.3g}") for way, each in ways.items()} for title, ways in tables.items()
        }
        for bench, tables in measured.items()
    }
    told = "; ".join(f"{key} {value}" for key, value in machine.items())
    text = (
        "# How many times as fast ours was as each other way: captionscale bench --quick --write.\n"
        f"# The last ones written: {told}.\n"
    )
    with atomic_write(RATIOS) as file:
        file.write((text + "\n" + tomli_w.dumps(_committed() | rounded)).encode())
    say(f"{RATIOS}: {sum(len(ways) for each in rounded.values() for ways in each.values()):,} ratios written")
