"""`asyncprop train`, `replay`: one run, on one rank or several, and every way in which it can end as an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import BAD_INPUT, FAILED, Flat, complain, given_options
from asyncprop.config import TrainConfig, TrainOptions, resolve
from asyncprop.delay import parse_delays

if TYPE_CHECKING:
    from asyncprop.rank import Job


def train(
    task: str | None = None,
    /,
    *,
    options: Annotated[TrainOptions, Flat] = TrainOptions(),  # noqa: B008 (frozen)
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    join: str | None = None,
    replacements: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    tensorboard: bool = False,
    quiet: bool = False,
) -> int:
    """Train TASK by one method, into a run folder.

    Args:
        task: Name from `asyncprop tasks`.
        options: What to train, and how.
        config: TOML file of options, such as a run's config.toml; what is given here overrides it.
        out: Folder of the run, new or empty. Default: one under runs/.
        resume: Folder of a run to go on with, from its last checkpoint, with its own options and as many ranks, unless
            --ranks is given.
        join: Address HOST:PORT, as told at the start, of ranks that gossip: train with them as one more.
        replacements: Ranks that may be started anew for ranks that were killed, where the others go on.
        tensorboard: Write scalars and histograms for TensorBoard, in the run's folder.
        quiet: Print the result only.
    """
    from asyncprop.methods.session import Session
    from asyncprop.rank import Job, join_rank, print_result
    from asyncprop.runs import create_run, open_run, read_config, read_result

    given = given_options(options, task)
    if join is not None:
        if given or config or out or resume or tensorboard or replacements:
            raise ValueError("join takes no other option: the run goes on as the others train it")
        return join_rank(join, quiet=quiet)
    if resume is None:
        resolved = resolve(TrainConfig, given, config)
        checkpoint, open_folder = None, lambda: create_run(out, resolved)
    else:
        if set(given) - {"ranks"} or config or out:
            raise ValueError(f"resume takes no option but ranks: the run goes on as {resume / 'config.toml'} says")
        resolved = read_config(resume).model_copy(update=given)
        if result := read_result(resume):
            if not quiet:
                print(f"{resume} is finished: nothing is left to train", file=sys.stderr)
            return print_result(result, resume)
        checkpoint, open_folder = resume / "checkpoint", lambda: open_run(resume)
    session = lambda world: Session(resolved, checkpoint, world)  # noqa: E731
    return _train(Job(resolved, session, open_folder, quiet=quiet, tensorboard=tensorboard), replacements)


def _train(job: Job, replacements: int) -> int:
    """Train, on one rank or several, and turn every way in which that can end into an exit code."""
    from asyncprop.launch import is_rank, launch, launch_tolerant
    from asyncprop.methods.fitting import refuse_misfits
    from asyncprop.rank import is_tolerant, train_rank

    ranks = job.config.ranks or 1
    if replacements and (ranks == 1 or not is_tolerant(job.config)):
        raise ValueError("replacements must be left out: only ranks that gossip go on when one of them dies")
    if not is_rank():
        if ranks == 1:
            return train_rank(job)
        refuse_misfits(job.config)  # once, before any rank is there
        if not job.quiet:
            _tell_of_absent(job.config, ranks)
        if is_tolerant(job.config):
            code, failure = launch_tolerant(ranks, sys.argv[1:], replacements=replacements, quiet=job.quiet)
        else:
            code, failure = launch(ranks, sys.argv[1:])
        return complain(failure, code) if failure and code != BAD_INPUT else code
    if job.config.ranks not in (None, int(os.environ["WORLD_SIZE"])):
        raise ValueError(f"ranks must be left out, or what the launcher started (got {job.config.ranks})")
    return train_rank(job)


def _tell_of_absent(config: TrainConfig, ranks: int) -> None:
    """Say which of the ranks that are to be slowed have yet to join."""
    named = {delay.rank for delay in parse_delays(config.delay) if delay.rank is not None}
    for rank in sorted(rank for rank in named if rank >= ranks):
        print(f"delay: rank {rank} is not there yet, and slowed if it joins", file=sys.stderr, flush=True)


def replay(path: Path, /, *, out: Path | None = None, quiet: bool = False) -> int:
    """Train a run that had --turn ordered again, from its trace; say if it is equal, or where not, and by how much.

    Args:
        path: Folder of the run.
        out: Folder of the new run, new or empty. Default: one under runs/.
        quiet: Print the answer only.
    """
    from asyncprop.methods.repeat import first_difference, read_recorded
    from asyncprop.methods.session import Session
    from asyncprop.rank import Job, train_rank
    from asyncprop.runs import create_run

    config, trace = read_recorded(path)
    with create_run(out, config) as run:
        session = lambda world: Session(config, None, world, trace)  # noqa: E731
        code = train_rank(Job(config, session, lambda: run, quiet=quiet, resumable=False))
    if code:
        return code
    if difference := first_difference(path, run.path):
        return complain(f"{run.path} differs from {path}: {difference}", FAILED)
    print(f"equal to the bit: losses of all batches, and the model ({run.path}, {path})")
    return 0
