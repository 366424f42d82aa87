"""`asyncprop simulate`, `plan`: a run on devices that need not exist, and what this machine would make of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import Flat, check_writable, given_options
from asyncprop.config import NOT_MODELLED, SimulateConfig, SimulateOptions, resolve

for _name in (*NOT_MODELLED, "device", "turn"):  # that are refused are not offered
    _field = SimulateOptions.model_fields[_name]
    _field.metadata = [*_field.metadata, Parameter(show=False)]


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
    from asyncprop.rank import Job, train_rank
    from asyncprop.runs import create_run
    from asyncprop.simulate.session import SimulatedSession

    resolved = resolve(SimulateConfig, given_options(options, task), config)
    session, folder = lambda world: SimulatedSession(resolved), lambda: create_run(out, resolved)
    return train_rank(Job(resolved, session, folder, quiet=quiet, resumable=False))


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
    """Measure TASK's model on this machine, layer by layer, and advise what should train it: threads, SGD or DDP.

    It takes as long as some 300 batches, half a minute at least.

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
    if costs:
        print(f"The layers' costs are in {costs}: asyncprop simulate {task} --costs {costs}")
