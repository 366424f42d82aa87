"""Rank: one process of a training, from its place among the others to its exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncprop.config import TrainConfig

if TYPE_CHECKING:
    from asyncprop.exchange import Members, World
    from asyncprop.methods.session import Session
    from asyncprop.runs import Run

BAD_INPUT = 2
FAILED = 1
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""What errors say, of whatever kind they are, if the disk, or one's share of it, is full."""
TOLD = "run"
"""Key of what all ranks know of the run."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank is to do, and to tell of it.

    Args:
        config: what is trained.
        open_session: makes what is trained, in its place among the ranks.
        open_folder: opens the run's folder; called on the first rank.
        quiet: tell nothing but the result.
        tensorboard: write what is told for TensorBoard, too.
        resumable: whether the run could go on from its checkpoint, if it ends early.
    """

    config: TrainConfig
    open_session: Callable[[World], Session]
    open_folder: Callable[[], Run]
    quiet: bool = False
    tensorboard: bool = False
    resumable: bool = True


def is_tolerant(config: TrainConfig) -> bool:
    """Tell whether ranks of this run may die, hang and join."""
    from asyncprop.methods import meeting_of

    return meeting_of(config.method, config.exchange) == "gossip"


def join_rank(address: str, *, quiet: bool = False) -> int:
    """Train as one more of the ranks that meet at `address`; return the exit code."""
    from asyncprop.exchange import LeftOut, World
    from asyncprop.exchange.board import StoreLostError
    from asyncprop.methods.session import Session
    from asyncprop.runs import create_run

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"join must be HOST:PORT, as the first rank told it, with a port from 1 to 65535 (got {address})"
        )
    try:
        with World(joins=address) as world:
            assert world.members
            told = world.members.board.get(TOLD, lambda: _check_that_some_are_left(world.members))
            config = TrainConfig.model_validate(told["config"])
            job = Job(config, lambda world: Session(config, None, world), lambda: create_run(None, config), quiet=quiet)
            return _train_in(world, job)
    except (LeftOut, StoreLostError) as error:
        return complain(str(error), FAILED)


def _check_that_some_are_left(members: Members | None) -> None:
    """Raise LeftOut if no rank of the start is alive any more: there will be nothing to join."""
    from asyncprop.exchange import LeftOut

    assert members
    members.check()
    if not any(rank < members.size for rank in members.alive):
        raise LeftOut(f"rank {members.rank} cannot join: no other rank is training")


def train_rank(job: Job) -> int:
    """Train as the rank that the launcher has made this process, or alone; return the exit code."""
    from asyncprop.exchange import World
    from asyncprop.exchange.members import TIMEOUT_S

    with World(tolerant=is_tolerant(job.config), timeout_s=job.config.timeout_s or TIMEOUT_S) as world:
        return _train_in(world, job)


def _train_in(world: World, job: Job) -> int:
    import torch

    from asyncprop.devices import available_cores, keep_freed_memory
    from asyncprop.exchange import LeftOut
    from asyncprop.exchange.board import StoreLostError
    from asyncprop.interrupt import Interrupt
    from asyncprop.launch import is_rank
    from asyncprop.methods.train import Interrupted, Left
    from asyncprop.methods.train import train as train_session
    from asyncprop.progress import All, Lines, Quiet, progress_on
    from asyncprop.tasks import get_task

    keep_freed_memory(large_tensors=get_task(job.config.task).large_tensors)
    with Interrupt(sys.stderr) as interrupt, ExitStack() as stack:
        if world.size > 1:
            torch.set_num_threads(available_cores())
        try:
            session = job.open_session(world)
            folder = _Folder(world, job, stack)
            run = folder.open() if world.is_first and not world.is_joining else None
            code = folder.tell()
        except (LeftOut, StoreLostError) as error:
            return complain(str(error), FAILED)
        if code:
            return code
        if run and world.members and not job.quiet:
            said = f"{world.size} ranks; another joins them by: asyncprop train --join {world.address}"
            print(said, file=sys.stderr, flush=True)
        # Another rank than the first has something to tell only once it is the first.
        observer = progress_on(sys.stderr, quiet=job.quiet) if run else Quiet() if job.quiet else Lines(sys.stderr)
        if job.tensorboard:
            from asyncprop.loggers import tensorboard_observer

            observer = All(observer, tensorboard_observer())
        stack.callback(observer.close)
        who = "" if world.size == 1 else f"rank {world.rank}: "

        def go_on() -> str:
            return f"; to go on: asyncprop train --resume {folder.run.path}" if folder.run and job.resumable else ""

        try:
            result = train_session(session, run, observer, interrupt, folder.open if world.members else None)
        except Left:
            assert world.members
            world.members.close()  # and wait for nobody: the others go on
            return complain(f"{who}left after {session.position.steps} batches: the others go on", interrupt.exit_code)
        except Interrupted:
            said = f"{who}stopped after {session.position.steps} batches{go_on()}"
            tells = (folder.run and world.is_first) or not is_rank()  # one of those that were launched together
            return complain(said, interrupt.exit_code) if tells else interrupt.exit_code
        except LeftOut as left_out:
            return complain(str(left_out), FAILED)
        except Exception as error:
            is_full = any(said in str(error) for said in FULL)
            if not isinstance(error, StoreLostError) and not is_full:  # which are no faults of the program
                traceback.print_exception(error)
            what = "cannot join" if world.is_joining else "the run failed"
            code = complain(f"{who}{what}: {type(error).__name__}: {error}{go_on()}", FAILED)
            if world.size > 1:
                if world.members:
                    world.members.close(failed=True)  # nobody is to wait for this rank
                sys.stderr.flush()
                os._exit(code)  # threads that wait for this rank's peers would hold it up
            return code
    if folder.run and world.is_first:
        return print_result(result, folder.run.path)
    if world.members and world.is_guest:
        return print_result(result, f"the folder that rank {min(world.members.among)} writes")
    return 0


class _Folder:
    """The run's folder, which the first rank opens at the start, and another if it becomes the first."""

    def __init__(self, world: World, job: Job, stack: ExitStack) -> None:
        self.run: Run | None = None
        self._world, self._config, self._stack = world, job.config, stack
        self._open = job.open_folder

    def open(self) -> Run:
        self.run = self._stack.enter_context(self._open())
        return self.run

    def tell(self) -> int:
        """Tell all ranks, and those that will join, what is trained and where it is written.

        Returns:
            0; or the exit code of a rank that has not been told, as the first has refused the folder, or died.
        """
        from asyncprop.runs import take_over

        members, config = self._world.members, self._config
        if members is None:
            return 0
        if not self._world.is_joining:
            own = {"config": config.model_dump(mode="json"), "path": str(self.run.path.resolve())} if self.run else None
            first = min(members.among)
            told = next((given for given in self._world.gather(own) if given is not None), None)
            if told is None and first in members.lost:
                return complain(f"rank {members.rank}: rank {first} died before it had opened the run's folder", FAILED)
            if told is None:  # it has refused the folder, and said why
                return BAD_INPUT
            members.board.put(TOLD, told)
        path = Path(members.board.get(TOLD)["path"])
        self._open = lambda: take_over(path, config)
        return 0


def print_result(result: dict[str, Any], path: Path | str) -> int:
    """Print what a finished run found, and where more of it is."""
    from asyncprop.progress import result_line

    print(f"{result_line(result)} -> {path}")
    return 0


def complain(message: str, code: int) -> int:
    """Say in one line what went wrong, and return the exit code."""
    print(f"asyncprop: {' '.join(message.split())}", file=sys.stderr)
    return code
