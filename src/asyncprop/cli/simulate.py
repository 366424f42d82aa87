"""`asyncprop simulate`: one run in virtual time, on devices that need not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from asyncprop.cli.common import Flat, given_options
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
