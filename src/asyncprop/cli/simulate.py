"""`asyncprop simulate`, `plan`: a run on devices that need not exist, and what this machine would make of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import Flat, check_writable, given_options
from asyncprop.config import SimulateConfig, SimulateOptions, resolve


def simulate(
    task: str | None = None,
    /,
    *,
    options: Annotated[SimulateOptions, Flat] = SimulateOptions(),  # noqa: B008 (frozen)
    config: Path | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> int:
    """Train TASK by one method in virtual time: for real, in the order that the devices' speeds would make.

    All seconds that are told are virtual.

    Args:
        task: Name from `asyncprop tasks`.
        options: What to train, how, and on what.
        config: TOML file of options; what is given here overrides it.
        out: Folder of the run, new or empty. Default: one under runs/.
        quiet: Print the result only.
    """
    from asyncprop.rank import train_rank
    from asyncprop.runs import create_run
    from asyncprop.simulate.session import SimulatedSession

    resolved = resolve(SimulateConfig, given_options(options, task), config)
    return train_rank(
        resolved, lambda world: SimulatedSession(resolved), lambda: create_run(out, resolved), quiet=quiet
    )


def plan(
    task: str,
    /,
    *,
    width: int | None = None,
    batch_size: int | None = None,
    passes: Annotated[int, Parameter(validator=Number(gte=4))] = 24,
    data_dir: Path | None = None,
    costs: Path | None = None,
) -> None:
    """Measure TASK's model on this machine, layer by layer, and advise how many threads should train it.

    Args:
        task: Name from `asyncprop tasks`.
        width: Width of the model. Default: the task's.
        batch_size: Samples per batch. Default: the recipe's.
        passes: Timed for each measurement; more on a busy machine.
        data_dir: Folder of the data. Default: where this machine has them.
        costs: File to write the layers' costs to, for asyncprop simulate --costs FILE.
    """
    from asyncprop.simulate.advice import plan_task, print_plan

    check_writable(costs)
    print_plan(plan_task(task, width, batch_size, passes, data_dir, costs), sys.stdout)


def bench_virtual(
    *,
    workloads: str | None = None,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 3,
    batches: Annotated[int, Parameter(validator=Number(gte=4))] = 60,
    json: Path | None = None,
) -> None:
    """Measure throughput and staleness of Async LU beside what virtual time predicts of them.

    Args:
        workloads: Names, separated by commas. Default: three.
        rounds: How often everything is measured, in turn; medians are taken.
        batches: Of one measurement.
        json: File to write the figures to.
    """
    from asyncprop.bench.virtual import bench_virtual as bench
    from asyncprop.cli.common import check_writable
    from asyncprop.runs import write_json
    from asyncprop.simulate.advice import print_virtual

    check_writable(json)
    figures = bench(workloads, rounds, batches, sys.stderr)
    print_virtual(figures, sys.stdout)
    if json:
        write_json(json, figures)


def bench_trace(
    *,
    workloads: str | None = None,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 6,
    batches: Annotated[int, Parameter(validator=Number(gte=4))] = 60,
    json: Path | None = None,
) -> None:
    """Measure what --trace and --turn ordered cost, against free running.

    Args:
        workloads: Names, separated by commas. Default: three.
        rounds: How often everything is measured, in turn; medians are taken.
        batches: Of one measurement.
        json: File to write the figures to.
    """
    from asyncprop.bench.trace import bench_trace as bench
    from asyncprop.cli.common import check_writable
    from asyncprop.runs import write_json

    check_writable(json)
    figures = bench(workloads, rounds, batches, sys.stderr)
    for row in figures["rows"]:
        print(
            f"{row['name']}: free {1e3 * row['free_s']:.2f} ms per batch, traced × {row['traced_ratio']:.3f}, "
            f"ordered × {row['ordered_ratio']:.3f}"
        )
    if json:
        write_json(json, figures)
