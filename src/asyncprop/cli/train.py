"""`asyncprop train`, `replay`: one run, on one rank or several, and every way in which it can end as an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from asyncprop.cli.common import BAD_INPUT, FAILED, Flat, complain, given_options
from asyncprop.config import TrainConfig, TrainOptions, resolve

if TYPE_CHECKING:
    from asyncprop.exchange import World
    from asyncprop.methods.train import Session
    from asyncprop.runs import Run


def train(
    task: str | None = None,
    /,
    *,
    options: Annotated[TrainOptions, Flat] = TrainOptions(),  # noqa: B008 (frozen)
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
) -> int:
    """Train TASK by one method, into a run folder.

    Args:
        task: Name from `asyncprop tasks`.
        options: What to train, and how.
        config: TOML file of options, such as a run's config.toml; what is given here overrides it.
        out: Folder of the run, new or empty. Default: one under runs/.
        resume: Folder of a run to go on with, from its last checkpoint, with its own options.
        tensorboard: Write scalars and histograms for TensorBoard, in the run's folder.
        quiet: Print the result only.
    """
    from asyncprop.runs import create_run, open_run, read_config, read_result

    given = given_options(options, task)
    if resume is None:
        resolved = resolve(TrainConfig, given, config)
        return _train(resolved, None, lambda: create_run(out, resolved), tensorboard, quiet=quiet)
    if given or config or out:
        raise ValueError(f"resume takes no other option: the run goes on as {resume / 'config.toml'} says")
    resolved = read_config(resume)
    if result := read_result(resume):
        return _print_result(result, resume)
    return _train(resolved, resume / "checkpoint", lambda: open_run(resume), tensorboard, quiet=quiet)


def _train(
    config: TrainConfig, checkpoint: Path | None, open_folder: Callable[[], Run], tensorboard: bool, *, quiet: bool
) -> int:
    """Train, on one rank or several, and turn every way in which that can end into an exit code."""
    from asyncprop.launch import is_rank, launch
    from asyncprop.methods.train import Session

    def open_session(world: World) -> Session:
        return Session(config, checkpoint, world)

    ranks = config.ranks or 1
    if not is_rank():
        if ranks == 1:
            return _train_rank(config, open_session, open_folder, tensorboard, quiet=quiet)
        code, failure = launch(ranks, sys.argv[1:])
        return complain(failure, code) if failure and code != BAD_INPUT else code
    if config.ranks not in (None, int(os.environ["WORLD_SIZE"])):
        raise ValueError(f"ranks must be left out, or what the launcher started (got {config.ranks})")
    quiet = quiet or os.environ["RANK"] != "0"
    return _train_rank(config, open_session, open_folder, tensorboard, quiet=quiet)


def _train_rank(
    config: TrainConfig,
    open_session: Callable[[World], Session],
    open_folder: Callable[[], Run],
    tensorboard: bool = False,
    *,
    quiet: bool,
) -> int:
    import torch

    from asyncprop.devices import available_cores, keep_freed_memory
    from asyncprop.exchange import World
    from asyncprop.interrupt import Interrupt
    from asyncprop.methods.train import Interrupted
    from asyncprop.methods.train import train as train_session
    from asyncprop.progress import All, progress_on
    from asyncprop.tasks import get_task

    keep_freed_memory(large_tensors=get_task(config.task).large_tensors)
    observer = progress_on(sys.stderr, quiet=quiet)
    if tensorboard:
        from asyncprop.loggers import tensorboard_observer

        observer = All(observer, tensorboard_observer())
    with World() as world, Interrupt(sys.stderr) as interrupt, ExitStack() as stack:
        if world.size > 1:
            torch.set_num_threads(available_cores())
        session = open_session(world)
        run = stack.enter_context(open_folder()) if world.is_first else None
        stack.callback(observer.close)
        who = "" if world.size == 1 else f"rank {world.rank}: "
        go_on = f"; to go on: asyncprop train --resume {run.path}" if run else ""
        try:
            result = train_session(session, run, observer, interrupt)
        except Interrupted:
            said = f"{who}stopped after {session.position.steps} batches{go_on}"
            return complain(said, interrupt.exit_code) if run else interrupt.exit_code
        except Exception as error:
            traceback.print_exception(error)
            code = complain(f"{who}the run failed: {type(error).__name__}: {error}{go_on}", FAILED)
            if world.size > 1:
                sys.stderr.flush()
                os._exit(code)  # threads that wait for this rank's peers would hold it up
            return code
    return _print_result(result, run.path) if run else 0


def replay(path: Path, /, *, out: Path | None = None, quiet: bool = False) -> int:
    """Train a run that had --turn ordered again, from its trace, and say whether it is equal to the bit, or where not.

    Args:
        path: Folder of the run.
        out: Folder of the new run, new or empty. Default: one under runs/.
        quiet: Print the answer only.
    """
    from asyncprop.methods.repeat import first_difference, read_recorded
    from asyncprop.methods.train import Session
    from asyncprop.runs import create_run

    config, trace = read_recorded(path)
    with create_run(out, config) as run:
        code = _train_rank(config, lambda world: Session(config, None, world, trace), lambda: run, quiet=quiet)
    if code:
        return code
    if difference := first_difference(path, run.path):
        return complain(f"{run.path} differs from {path}: {difference}", FAILED)
    print(f"equal to the bit: losses of all batches, and the model ({run.path}, {path})")
    return 0


def _print_result(result: dict[str, Any], path: Path) -> int:
    from asyncprop.progress import result_line

    print(f"{result_line(result)} -> {path}")
    return 0
