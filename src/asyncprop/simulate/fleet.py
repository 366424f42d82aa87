"""Fleet: several replicas in one process, each trained by a trainer of its own, with the face of one trainer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol, Self

from torch.optim import Optimizer

from asyncprop.engine.update import Stopping
from asyncprop.engine.workers import GRACE_S
from asyncprop.methods.trainer import Trainer
from asyncprop.simulate.virtual_time import VirtualTime
from asyncprop.trace import Statistics, Step


@dataclass
class Member:
    """One replica's trainer, and the optimizer that it steps with."""

    trainer: Trainer
    optimizer: Optimizer


class Settles(Protocol):
    """What lets replicas become equal."""

    def settle(self) -> None:
        """Let them; none trains."""


class Fleet:
    """Trains all members at once. Which takes a batch is decided by who is ready first, or by rounds, in step.

    Args:
        time: by which they train; the thread that made it is the one that calls.
        members: the first one's optimizer is the session's: the hyper-parameters of the others follow it.
        meeting: how they meet; settles when all have ended.
        in_step: whether every member takes one batch a round; what is left over at the end of a loader is left out.
    """

    def __init__(self, time: VirtualTime, members: list[Member], meeting: Settles, *, in_step: bool) -> None:
        self._time, self._members, self._meeting, self._in_step = time, members, meeting, in_step
        self._stack = ExitStack()
        self._changed = time.condition()
        self._steps: deque[Step] = deque()
        self._drivers: list[threading.Thread] = []
        self._driving = 0
        self._failure: BaseException | None = None
        self._index = 0

    def __enter__(self) -> Self:
        for member in self._members:
            self._stack.enter_context(member.trainer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def run(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Train on every batch of `loader`, and yield each Step in the order of finishing."""
        count = len(self._members)
        shares = _rounds(iter(loader), count) if self._in_step else [iter(loader)] * count
        self._driving = count
        self._follow()
        self._drivers = [
            self._time.thread(self._drive, (rank, share), f"asyncprop-driver-{rank}")
            for rank, share in enumerate(shares)
        ]
        for driver in self._drivers:
            driver.start()
        while (step := self._next()) is not None:
            yield replace(step, index=self._index)
            self._index += 1
            self._follow()

    def settle(self) -> None:
        """Let the models of all members become equal."""
        self._meeting.settle()

    def statistics(self) -> Statistics:
        """Return what the members have done together: staleness is weighted by updates, threads are named by rank."""
        each = [member.trainer.statistics() for member in self._members]
        versions, staleness = _by_layer(each)
        return replace(
            each[0],
            batches=sum(one.batches for one in each),
            samples=sum(one.samples for one in each),
            skipped=sum(one.skipped for one in each),
            in_flight=sum(one.in_flight for one in each),
            lanes=sum(one.lanes for one in each),
            versions=versions,
            staleness=staleness,
            mean_queue_depth=fmean(one.mean_queue_depth for one in each),
            max_queue_depth=max(one.max_queue_depth for one in each),
            threads=tuple(
                replace(thread, name=f"rank {rank} {thread.name}")
                for rank, one in enumerate(each)
                for thread in one.threads
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the first member's."""
        return self._members[0].trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse: a simulation is not resumed."""
        if state:
            raise ValueError("a simulation cannot go on from a checkpoint: start it anew")

    def _drive(self, rank: int, share: Iterator[Any]) -> None:
        try:
            for step in self._members[rank].trainer.run(share):
                with self._changed:
                    self._steps.append(step)
                    self._changed.notify_all()
        except Stopping:
            pass  # another has failed
        except BaseException as error:
            self._failure = self._failure or error
            self._time.stop()
        finally:
            with self._changed:
                self._driving -= 1
                self._changed.notify_all()

    def _next(self) -> Step | None:
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._steps or not self._driving)
        except BaseException as stopped:
            self._time.stop()
            for driver in self._drivers:
                driver.join(GRACE_S)
            if self._failure:
                raise self._failure from stopped
            raise
        if self._failure:
            raise self._failure
        return self._steps.popleft() if self._steps else None

    def _follow(self) -> None:
        """Give every member the hyper-parameters that the first has."""
        for member in self._members[1:]:
            for own, first in zip(member.optimizer.param_groups, self._members[0].optimizer.param_groups, strict=True):
                own.update({name: value for name, value in first.items() if name != "params"})


def _by_layer(each: list[Statistics]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return, by layer, the updates of all members, and their mean staleness."""
    versions = tuple(sum(counts) for counts in zip(*(one.versions for one in each), strict=True))
    weighted = ([mean * count for mean, count in zip(one.staleness, one.versions, strict=True)] for one in each)
    ages = (sum(ages) for ages in zip(*weighted, strict=True))
    return versions, tuple(age / count if count else 0.0 for age, count in zip(ages, versions, strict=True))


def _rounds(batches: Iterator[Any], count: int) -> list[Iterator[Any]]:
    """Return an iterator for each of `count` members: each has one batch of every whole round, in turn."""
    waiting: list[deque[Any]] = [deque() for _ in range(count)]

    def of(rank: int) -> Iterator[Any]:
        while True:
            if not waiting[rank]:
                batch_of_each = [batch for _, batch in zip(range(count), batches, strict=False)]
                if len(batch_of_each) < count:
                    return
                for theirs, batch in zip(waiting, batch_of_each, strict=True):
                    theirs.append(batch)
            yield waiting[rank].popleft()

    return [of(rank) for rank in range(count)]
