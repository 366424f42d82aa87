"""`asyncprop bench`: what this machine can give, and what of it is reached."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import FAILED, JsonFile, check_writable, complain

app = App(name="bench", help="Measure this machine: figures are ratios within one run, interleaved, medians.")


@app.command
def engine(
    *,
    workloads: str | None = None,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 9,
    seconds: Annotated[float, Parameter(validator=Number(gt=0))] = 2.0,
    sweep: bool = False,
    json: JsonFile = None,
    markdown: Path | None = None,
) -> int:
    """Measure Async LU against what the machine can give, and against the best synchronous choices.

    Args:
        workloads: Names, separated by commas. Default: all.
        rounds: How often everything is measured, in turn; medians are taken.
        seconds: Length of one measurement.
        sweep: Measure other numbers of threads and lanes, too.
        json: File to write the figures to.
        markdown: File to write the table to, with how it was made.
    """
    from asyncprop.bench.engine import bench_engine
    from asyncprop.report.tables import engine_markdown, print_bench
    from asyncprop.runs import write_json

    check_writable(json, markdown)
    try:
        figures = bench_engine(workloads, rounds=rounds, seconds=seconds, sweep=sweep, messages=sys.stderr)
    except RuntimeError as error:  # of one of its processes
        return complain(str(error), FAILED)
    print_bench(figures, sys.stdout)
    if json:
        write_json(json, figures)
    if markdown:
        markdown.write_text(engine_markdown(figures), encoding="utf-8")
    return 0


@app.command
def exchange(
    *,
    workloads: str | None = None,
    ranks: Annotated[int, Parameter(validator=Number(gte=2))] = 2,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 9,
    seconds: Annotated[float, Parameter(validator=Number(gt=0))] = 2.0,
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
    from asyncprop.runs import write_json

    check_writable(json)
    try:
        figures = bench_exchange(workloads, ranks=ranks, rounds=rounds, seconds=seconds, messages=sys.stderr)
    except RuntimeError as error:  # of one of its processes
        return complain(str(error), FAILED)
    print_exchange(figures, sys.stdout)
    if json:
        write_json(json, figures)
    return 0


@app.command
def virtual(
    *,
    workloads: str | None = None,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 3,
    batches: Annotated[int, Parameter(validator=Number(gte=4))] = 60,
    json: JsonFile = None,
) -> None:
    """Measure throughput and staleness of Async LU beside what virtual time predicts of them.

    Args:
        workloads: Names, separated by commas. Default: three.
        rounds: How often everything is measured, in turn; medians are taken.
        batches: Of one measurement.
        json: File to write the figures to.
    """
    from asyncprop.bench.virtual import bench_virtual
    from asyncprop.runs import write_json
    from asyncprop.simulate.advice import print_virtual

    check_writable(json)
    figures = bench_virtual(workloads, rounds, batches, sys.stderr)
    print_virtual(figures, sys.stdout)
    if json:
        write_json(json, figures)


@app.command
def trace(
    *,
    workloads: str | None = None,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 6,
    batches: Annotated[int, Parameter(validator=Number(gte=4))] = 60,
    json: JsonFile = None,
) -> None:
    """Measure what --trace and --turn ordered cost, against free running.

    Args:
        workloads: Names, separated by commas. Default: three.
        rounds: How often everything is measured, in turn; medians are taken.
        batches: Of one measurement.
        json: File to write the figures to.
    """
    from asyncprop.bench.trace import bench_trace
    from asyncprop.runs import write_json

    check_writable(json)
    figures = bench_trace(workloads, rounds, batches, sys.stderr)
    for row in figures["rows"]:
        print(
            f"{row['name']}: free {1e3 * row['free_s']:.2f} ms per batch, traced × {row['traced_ratio']:.3f}, "
            f"ordered × {row['ordered_ratio']:.3f}"
        )
    if json:
        write_json(json, figures)


@app.command
def memory(*, json: JsonFile = None) -> None:
    """Measure the peak memory of Async LU beyond SGD's, by lanes, beside what is to be expected.

    Args:
        json: File to write the figures to.
    """
    from asyncprop.bench.memory import bench_memory
    from asyncprop.report.tables import print_memory
    from asyncprop.runs import write_json

    check_writable(json)
    figures = bench_memory(sys.stderr)
    print_memory(figures, sys.stdout)
    if json:
        write_json(json, figures)


@app.command
def partition(*, workloads: str | None = None, json: JsonFile = None) -> None:
    """Measure what partial backward passes save: each block's, against a whole one.

    Args:
        workloads: Names, separated by commas. Default: all.
        json: File to write the figures to.
    """
    from asyncprop.bench.partition import bench_partition
    from asyncprop.report.tables import print_partition
    from asyncprop.runs import write_json

    check_writable(json)
    figures = bench_partition(workloads, sys.stderr)
    print_partition(figures, sys.stdout)
    if json:
        write_json(json, figures)


@app.command
def gpu(*, json: JsonFile = None) -> None:
    """Measure Async LU against SGD on this machine's GPU.

    Args:
        json: File to write the figures to.
    """
    from asyncprop.bench.gpu import bench_gpu
    from asyncprop.report.tables import print_gpu
    from asyncprop.runs import write_json

    check_writable(json)
    figures = bench_gpu(sys.stderr)
    print_gpu(figures, sys.stdout)
    if json:
        write_json(json, figures)
