"""Rank: one process of a training, from its place among the others to its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncprop.config import TrainConfig

if TYPE_CHECKING:
    from asyncprop.exchange import World
    from asyncprop.methods.train import Session
    from asyncprop.runs import Run

BAD_INPUT = 2
FAILED = 1


def is_tolerant(config: TrainConfig) -> bool:
    """Tell whether ranks of this run may die, hang and join."""
    from asyncprop.methods import meeting_of

    return meeting_of(config.method, config.exchange) == "gossip"


def join_rank(address: str) -> int:
    """Train as one more of the ranks that meet at `address`; return the exit code."""
    from asyncprop.exchange import World
    from asyncprop.methods.train import Session
    from asyncprop.runs import create_run, open_run

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"join must be HOST:PORT, as the first rank told it (got {address})")
    with World(joins=address) as world:
        assert world.members
        told = world.members.board.get("run", world.members.check)
        config, path = TrainConfig.model_validate(told["config"]), Path(told["path"])
        open_folder = lambda: open_run(path) if path.exists() else create_run(path, config)  # noqa: E731
        return _train_in(world, config, lambda world: Session(config, None, world), open_folder, quiet=True)


def train_rank(
    config: TrainConfig,
    open_session: Callable[[World], Session],
    open_folder: Callable[[], Run],
    *,
    quiet: bool,
    tensorboard: bool = False,
) -> int:
    """Train as the rank that the launcher has made this process, or alone; return the exit code.

    Args:
        config: what is trained.
        open_session: makes what is trained, in its place among the ranks.
        open_folder: opens the run's folder; called on the first rank.
        quiet: tell nothing but the result.
        tensorboard: write what is told for TensorBoard, too.
    """
    from asyncprop.exchange import World

    with World(tolerant=is_tolerant(config), timeout_s=config.timeout or 10.0) as world:
        return _train_in(world, config, open_session, open_folder, quiet=quiet, tensorboard=tensorboard)


def _train_in(
    world: World,
    config: TrainConfig,
    open_session: Callable[[World], Session],
    open_folder: Callable[[], Run],
    *,
    quiet: bool,
    tensorboard: bool = False,
) -> int:
    import torch

    from asyncprop.devices import available_cores, keep_freed_memory
    from asyncprop.exchange import LeftOut
    from asyncprop.interrupt import Interrupt
    from asyncprop.methods.train import Interrupted
    from asyncprop.methods.train import train as train_session
    from asyncprop.progress import All, progress_on
    from asyncprop.runs import open_run
    from asyncprop.tasks import get_task

    keep_freed_memory(large_tensors=get_task(config.task).large_tensors)
    observer = progress_on(sys.stderr, quiet=quiet)
    if tensorboard:
        from asyncprop.loggers import tensorboard_observer

        observer = All(observer, tensorboard_observer())
    with Interrupt(sys.stderr) as interrupt, ExitStack() as stack:
        if world.size > 1:
            torch.set_num_threads(available_cores())
        session = open_session(world)
        is_new = world.members is not None and world.members.joins
        run = stack.enter_context(open_folder()) if world.is_first and not is_new else None
        if world.members and not is_new:
            told = {"config": config.model_dump(mode="json"), "path": str(run.path.resolve())} if run else None
            path = Path(world.gather(told)[0]["path"])
            if told:
                world.members.board.put("run", told)
            open_folder = lambda: open_run(path)  # noqa: E731
        stack.callback(observer.close)
        who = "" if world.size == 1 else f"rank {world.rank}: "
        go_on = f"; to go on: asyncprop train --resume {run.path}" if run else ""
        try:
            result = train_session(session, run, observer, interrupt, open_folder if world.members else None)
        except Interrupted:
            said = f"{who}stopped after {session.position.steps} batches{go_on}"
            return complain(said, interrupt.exit_code) if run else interrupt.exit_code
        except LeftOut as left_out:
            return complain(str(left_out), FAILED)
        except Exception as error:
            traceback.print_exception(error)
            code = complain(f"{who}the run failed: {type(error).__name__}: {error}{go_on}", FAILED)
            if world.size > 1:
                sys.stderr.flush()
                os._exit(code)  # threads that wait for this rank's peers would hold it up
            return code
    return print_result(result, run.path) if run else 0


def print_result(result: dict[str, Any], path: Path) -> int:
    """Print what a finished run found."""
    from asyncprop.progress import result_line

    print(f"{result_line(result)} -> {path}")
    return 0


def complain(message: str, code: int) -> int:
    """Say in one line what went wrong, and return the exit code."""
    print(f"asyncprop: {' '.join(message.split())}", file=sys.stderr)
    return code
