"""`asyncprop bench`: what this machine can give, and what of it is reached."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import App, Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import FAILED, JsonFile, check_writable, complain

app = App(name="bench", help="Measure this machine: figures are ratios within one run, interleaved, medians.")

Figures = dict[str, Any]
AtLeastOne = Annotated[int, Parameter(validator=Number(gte=1))]
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Batches = Annotated[int, Parameter(validator=Number(gte=4))]


def _bench(
    measure: Callable[[], Figures],
    show: Callable[[Figures, TextIO], None],
    json: Path | None,
    markdown: Path | None = None,
    as_markdown: Callable[[Figures], str] | None = None,
) -> int:
    """Measure, print, and write to the files that are given; return the exit code."""
    from asyncprop.runs import write_json

    check_writable(json, markdown)
    try:
        figures = measure()
    except RuntimeError as error:  # of one of its processes
        return complain(str(error), FAILED)
    show(figures, sys.stdout)
    if json:
        write_json(json, figures)
    if markdown and as_markdown:
        markdown.write_text(as_markdown(figures), encoding="utf-8")
    return 0


@app.command
def engine(
    *,
    workloads: str | None = None,
    processes: AtLeastOne = 5,
    rounds: AtLeastOne = 2,
    seconds: Seconds = 1.0,
    sweep: bool = False,
    json: JsonFile = None,
    markdown: Path | None = None,
) -> int:
    """Measure Async LU against what the machine can give, and against the best synchronous choices.

    Args:
        workloads: Names, separated by commas. Default: all.
        processes: How often all processes are started anew, as those of one kind may differ.
        rounds: How often everything is measured each time, in turn; medians over everything are taken.
        seconds: Length of one measurement.
        sweep: Measure other numbers of threads and lanes, too.
        json: File to write the figures to.
        markdown: File to write the table to, with how it was made.
    """
    from asyncprop.bench.engine import bench_engine
    from asyncprop.report.tables import engine_markdown, print_bench

    def measure() -> Figures:
        return bench_engine(
            workloads, processes=processes, rounds=rounds, seconds=seconds, sweep=sweep, messages=sys.stderr
        )

    return _bench(measure, print_bench, json, markdown, engine_markdown)


@app.command
def exchange(
    *,
    workloads: str | None = None,
    ranks: Annotated[int, Parameter(validator=Number(gte=2))] = 2,
    rounds: AtLeastOne = 9,
    seconds: Seconds = 2.0,
    json: JsonFile = None,
) -> int:
    """Measure what gossip costs a step of several ranks, by the size of its messages.

    Args:
        workloads: Names, separated by commas. Default: resnet18-width16.
        ranks: How many processes.
        rounds: How often everything is measured, in turn; medians are taken.
        seconds: Length of one measurement.
        json: File to write the figures to.
    """
    from asyncprop.bench.exchange import bench_exchange
    from asyncprop.report.tables import print_exchange

    def measure() -> Figures:
        return bench_exchange(workloads, ranks=ranks, rounds=rounds, seconds=seconds, messages=sys.stderr)

    return _bench(measure, print_exchange, json)


@app.command
def virtual(
    *,
    workloads: str | None = None,
    rounds: AtLeastOne = 3,
    batches: Batches = 60,
    json: JsonFile = None,
) -> int:
    """Measure throughput and staleness of Async LU beside what virtual time predicts of them.

    Args:
        workloads: Names, separated by commas. Default: three.
        rounds: How often everything is measured, in turn; medians are taken.
        batches: Of one measurement.
        json: File to write the figures to.
    """
    from asyncprop.bench.virtual import bench_virtual
    from asyncprop.simulate.advice import print_virtual

    return _bench(lambda: bench_virtual(workloads, rounds, batches, sys.stderr), print_virtual, json)


@app.command
def events(*, rounds: AtLeastOne = 3, json: JsonFile = None, markdown: Path | None = None) -> int:
    """Measure what a simulation costs, by the layers of its model and its workers: seconds of the CPU, of all threads.

    A layer event is a read, a gradient or a write of a layer; the clock lets time pass twice for each. A round takes
    about half a minute.

    Args:
        rounds: How often everything is run, in turn; medians are taken.
        json: File to write the figures to.
        markdown: File to write the table to.
    """
    from asyncprop.bench.events import bench_events, events_markdown, print_events

    return _bench(lambda: bench_events(sys.stderr, rounds), print_events, json, markdown, events_markdown)


@app.command
def fleets(
    *,
    devices: str | None = None,
    methods: str | None = None,
    json: JsonFile = None,
    markdown: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Train on up to 256 virtual devices, with and without a straggler, and tell the virtual time to a target.

    Args:
        devices: How many, separated by commas. Default: 3,8,32,128,256.
        methods: As `asyncprop compare` has them. Default: ddp, lapsgd, async-lu without and with attenuation, layup.
        json: File that keeps the runs; given again, those in it are not made again.
        markdown: File to write the tables to, with how they were made.
        plot: Picture to draw: .svg, .png or .pdf.
    """
    from asyncprop.bench.fleet_tables import fleets_markdown, plot_fleets, print_fleets
    from asyncprop.bench.fleets import bench_fleets
    from asyncprop.report.figures import check_picture

    check_writable(plot)
    if plot:
        check_picture(plot)

    def show(figures: Figures, stream: TextIO) -> None:
        print_fleets(figures, stream)
        if plot:
            plot_fleets(figures, plot)

    return _bench(lambda: bench_fleets(devices, methods, json, sys.stderr), show, json, markdown, fleets_markdown)


@app.command
def plan(
    *,
    workloads: str | None = None,
    plans: AtLeastOne = 3,
    rounds: AtLeastOne = 4,
    seconds: Seconds = 0.35,
    passes: Batches = 24,
    json: JsonFile = None,
    markdown: Path | None = None,
) -> int:
    """Measure every choice of threads that a plan considers, and set the advised one beside the best.

    Args:
        workloads: Names, separated by commas. Default: all, which takes half an hour.
        plans: How often each workload is planned for; the median plan counts, and the worst is told.
        rounds: How often every choice is measured after each plan, in turn; medians are taken.
        seconds: Length of one measurement.
        passes: Timed for each measurement of the plan.
        json: File to write the figures to; what it has of other workloads is kept.
        markdown: File to write the tables to, with how they were made.
    """
    from asyncprop.bench.plan import bench_plan
    from asyncprop.report.plans import plans_markdown, print_plans

    def measure() -> Figures:
        return bench_plan(workloads, plans, rounds, seconds, passes, sys.stderr, json)

    return _bench(measure, print_plans, json, markdown, plans_markdown)


@app.command
def trace(
    *,
    workloads: str | None = None,
    rounds: AtLeastOne = 40,
    seconds: Seconds = 0.25,
    json: JsonFile = None,
    markdown: Path | None = None,
) -> int:
    """Measure what --trace and --turn ordered cost, against free running.

    Args:
        workloads: Names, separated by commas. Default: three.
        rounds: How often everything is measured, in turn; medians are taken.
        seconds: Length of one measurement.
        json: File to write the figures to.
        markdown: File to write the table to, with how it was made.
    """
    from asyncprop.bench.trace import bench_trace
    from asyncprop.report.tables import print_trace, trace_markdown

    def measure() -> Figures:
        return bench_trace(workloads, rounds, seconds, sys.stderr)

    return _bench(measure, print_trace, json, markdown, trace_markdown)


@app.command
def memory(*, ranks: AtLeastOne = 1, json: JsonFile = None) -> int:
    """Measure the peak memory of Async LU beyond SGD's, by lanes, beside what is to be expected.

    Args:
        ranks: With 2 and more, measure instead a rank that gossips with so many, in copies of the parameters.
        json: File to write the figures to.
    """
    from asyncprop.bench.memory import bench_memory
    from asyncprop.bench.memory_ranks import bench_memory_of_ranks
    from asyncprop.report.tables import print_memory, print_memory_of_ranks

    if ranks > 1:
        return _bench(lambda: bench_memory_of_ranks(ranks, sys.stderr), print_memory_of_ranks, json)
    return _bench(lambda: bench_memory(sys.stderr), print_memory, json)


@app.command
def partition(*, workloads: str | None = None, json: JsonFile = None) -> int:
    """Measure what partial backward passes save: each block's, against a whole one.

    Args:
        workloads: Names, separated by commas. Default: all.
        json: File to write the figures to.
    """
    from asyncprop.bench.partition import bench_partition
    from asyncprop.report.tables import print_partition

    return _bench(lambda: bench_partition(workloads, sys.stderr), print_partition, json)


@app.command
def gpu(*, json: JsonFile = None) -> int:
    """Measure Async LU against SGD on this machine's GPU.

    Args:
        json: File to write the figures to.
    """
    from asyncprop.bench.gpu import bench_gpu
    from asyncprop.report.tables import print_gpu

    return _bench(lambda: bench_gpu(sys.stderr), print_gpu, json)
