"""Fleet tables: what `bench fleets` found: time to target, what a straggler costs, and what the runs cost here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TextIO

from asyncprop.bench.fleets import best_of
from asyncprop.report.figures import new_figure
from asyncprop.report.tables import markdown_table, print_table, provenance

Run = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def print_fleets(found: dict[str, Any], stream: TextIO) -> None:
    """Print the tables."""
    for title, table in _tables(found):
        print(f"\n{title}", file=stream)
        print_table(stream, *table, numbers_from=0)


def fleets_markdown(found: dict[str, Any]) -> str:
    """Return the tables in Markdown, with the command and the machine."""
    parts = [f"{title}\n\n{markdown_table(*table)}" for title, table in _tables(found)]
    return "\n".join(["# Fleets in virtual time\n", *parts, f"Made by {provenance(found['environment'])}\n"])


def plot_fleets(found: dict[str, Any], path: Path) -> None:
    """Draw each method's time to target against the number of devices; dashed with a straggler.

    Means over seeds. The legend says with how many devices some seed did not reach the target.

    Raises:
        ValueError: if the suffix is of no picture, or matplotlib is not installed.
    """
    figure, axes = new_figure(path)
    from matplotlib import rc_context

    for place, method in enumerate(_methods(found)):
        for straggler in (False, True):
            times = {count: _seconds(_runs_of(found, method, count, straggler)) for count in _devices(found)}
            reached = [(count, fmean(seconds)) for count, seconds in times.items() if seconds]
            missed = [str(count) for count, seconds in times.items() if seconds == []]
            label = f"{method}, a straggler" if straggler else method
            axes.plot(
                [count for count, _ in reached], [seconds for _, seconds in reached], marker="osD^vP*X"[place % 8],
                color=f"C{place}", linestyle="--" if straggler else "-",
                label=f"{label}, not reached with {', '.join(missed)}" if missed else label,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    if any(run["time_to_target_s"] for run in found["runs"]):
        axes.set_yscale("log")
    axes.set_xticks(_devices(found), [str(count) for count in _devices(found)])
    axes.set_xlabel("virtual devices")
    axes.set_ylabel(f"virtual seconds to {found['task']['target']:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, dpi=150)


def _tables(found: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    target = f"{found['task']['target']:g}"
    yield f"Virtual seconds to {target}, mean ± std over seeds", _times(found, straggler=False)
    yield (
        f"Virtual seconds to {target}, each step of one device or worker {found['straggler_s']:g} s longer; and over "
        "those without",
        _times(found, straggler=True),
    )
    yield "Learning rate and momentum that were best, and staleness with them", _choices(found)
    yield "What the runs cost here: seconds of one core, and how often time passed for a thread", _costs(found)


def _times(found: dict[str, Any], *, straggler: bool) -> Table:
    lines = []
    for count in _devices(found):
        cells = []
        for method in _methods(found):
            runs = _runs_of(found, method, count, straggler)
            cell, seconds, alone = _time(runs), _seconds(runs), _seconds(_runs_of(found, method, count, False))
            if straggler and seconds and alone:
                cell += f" ({fmean(seconds) / fmean(alone):.1f}x)"
            cells.append(cell)
        lines.append([str(count), *cells])
    return ["devices", *_methods(found)], lines


def _time(runs: list[Run]) -> str:
    """Return what runs with different seeds took, or how many of them did not get there."""
    seconds = _seconds(runs)
    if seconds is None:
        return "–"
    if seconds:
        return f"{fmean(seconds):.2f} ± {stdev(seconds):.2f}" if len(seconds) > 1 else f"{seconds[0]:.2f}"
    missed = [run for run in runs if not run["time_to_target_s"]]
    if all(run["diverged"] for run in missed):
        said = "diverged"
    else:
        said = f"not reached ({fmean(run['best_metric'] for run in missed if not run['diverged']):.3f})"
    return said if len(missed) == len(runs) else f"{said} in {len(missed)} of {len(runs)}"


def _seconds(runs: list[Run]) -> list[float] | None:
    """Return each run's time to target; none of them if one did not get there, and None if there are no runs."""
    times = [run["time_to_target_s"] for run in runs]
    if not runs:
        return None
    return times if all(times) else []


def _choices(found: dict[str, Any]) -> Table:
    lines = []
    for count in _devices(found):
        runs = [best_of(found["runs"], method, count) for method in _methods(found)]
        cells = [f"{run['lr']:g}, {run['momentum']:g}; {run['mean_staleness']:.1f}" if run else "–" for run in runs]
        lines.append([str(count), *cells])
    return ["devices", *_methods(found)], lines


def _costs(found: dict[str, Any]) -> Table:
    """Return a row for each number of devices: all its runs together, but those that failed."""
    lines = []
    for method in _methods(found):
        for count in _devices(found):
            runs = [
                run for run in found["runs"]
                if (run["method"], run["devices"]) == (method, count) and not run["diverged"] and run["steps"]
            ]  # fmt: skip
            if not runs:
                continue
            events, steps = (sum(run[key] for run in runs) for key in ("events", "steps"))
            seconds = fmean(run["computing_s"] for run in runs) * len(runs)
            lines.append([
                method, str(count), str(steps), f"{events / steps:.1f}", f"{seconds:.1f}",
                f"{1e3 * seconds / steps:.2f}", f"{1e6 * seconds / events:.0f}",
            ])  # fmt: skip
    return ["method", "devices", "batches", "events per batch", "s", "ms per batch", "µs per event"], lines


def _runs_of(found: dict[str, Any], method: str, devices: int, straggler: bool) -> list[Run]:
    """Return the runs with the best learning rate and momentum, one for each seed."""
    if not (best := best_of(found["runs"], method, devices)):
        return []
    names = ("method", "devices", "lr", "momentum")
    wanted = (*(best[name] for name in names), straggler)
    return [run for run in found["runs"] if (*(run[name] for name in names), run["straggler"]) == wanted]


def _devices(found: dict[str, Any]) -> list[int]:
    return sorted({run["devices"] for run in found["runs"]})


def _methods(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in found["runs"]))
