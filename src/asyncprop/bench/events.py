"""Bench events: what a simulation costs here, by its layers and workers: in proportion to its events."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import process_time
from typing import Any, TextIO

from asyncprop.engine import Coupled
from asyncprop.report.tables import markdown_table, print_table, provenance
from asyncprop.runs import environment
from asyncprop.simulate import Machine
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.predict import run_stand_in
from asyncprop.simulate.virtual_time import VirtualTime

LAYERS = (4, 16, 64)
WORKERS = (3, 8, 32, 128, 256)
PASSES = 4
"""Of each worker, in a run."""
MOMENTS = 3
"""At which a pass comes to each layer: its read, its gradient, its write."""


def bench_events(
    messages: TextIO, rounds: int, layers: Sequence[int] = LAYERS, workers: Sequence[int] = WORKERS
) -> dict[str, Any]:
    """Run a stand-in model of so many layers, each a number, by so many workers, each on a device of its own.

    Args:
        messages: where progress is told.
        rounds: of all runs, in turn; medians count.
        layers, workers: of which each is run with each.

    Returns:
        `rows`: of each run the layer events (passes × layers × MOMENTS), the events of the clock, and the seconds of
        computing, of all threads together.
    """
    took: dict[tuple[int, int], list[float]] = {}
    events: dict[tuple[int, int], int] = {}
    _run(layers[0], workers[0])  # the first pass of a process takes a second
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=messages, flush=True)
        for depth in layers:
            for count in workers:
                events[depth, count], seconds = _run(depth, count)
                took.setdefault((depth, count), []).append(seconds)
    rows = [
        {
            "layers": depth,
            "workers": count,
            "layer_events": PASSES * count * depth * MOMENTS,
            "events": events[depth, count],
            "computing_s": median(seconds),
            "rounds_s": seconds,
        }
        for (depth, count), seconds in took.items()
    ]
    return {"rows": rows, "environment": environment()}


def _run(layers: int, workers: int) -> tuple[int, float]:
    """Return the clock's events, and the seconds of computing."""
    each = (1.0 / layers,) * layers
    costs = LayerCosts(each, each, each, (0.0,) * layers)
    time, began = VirtualTime(), process_time()
    run_stand_in(time, costs, Coupled(workers), [Machine() for _ in range(workers)], batches=PASSES * workers)
    return time.events, process_time() - began


HEADINGS = ["layers", "workers", "layer events", "events of the clock", "CPU s", "µs per layer event"]


def print_events(found: dict[str, Any], stream: TextIO) -> None:
    """Print a row for each run."""
    print_table(stream, HEADINGS, _cells(found), numbers_from=0)


def events_markdown(found: dict[str, Any]) -> str:
    """Return the table in Markdown, with the command and the machine."""
    table = markdown_table(HEADINGS, _cells(found))
    return f"# What a simulation costs\n\n{table}\n\nMade by {provenance(found['environment'])}\n"


def _cells(found: dict[str, Any]) -> list[list[str]]:
    return [
        [f"{row['layers']}", f"{row['workers']}", f"{row['layer_events']:,}", f"{row['events']:,}",
         f"{row['computing_s']:.2f}", f"{1e6 * row['computing_s'] / row['layer_events']:.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
