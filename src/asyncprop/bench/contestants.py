"""Contestants: each way to train, in processes that live as long as the benchmark and are idle while others are timed.

A contestant answers `count` with the seconds that `count` batches take: the next ones, after some that are not timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from asyncprop.bench.workloads import Workload, one_step, set_threads
from asyncprop.simulate.processes import Answer, Processes

WARM_BATCHES = 4
"""Batches before each measurement that are not timed: they bring caches and pipelines into their steady state."""

Serve = Generator[float | None, int, None]
"""Receives a number of batches, yields the seconds that as many take."""


@dataclass(frozen=True)
class Loop:
    """The plain PyTorch loop, on `threads` intra-op threads."""

    threads: int

    def serve(self, workload: Workload, rank: int, ranks: int, meet: Path) -> Serve:
        """Train on what is asked for."""
        trained, batches = workload.make(), workload.batches()
        count = yield None
        while True:
            set_threads(self.threads)  # each time: kinds that share the process have other numbers
            for _ in range(WARM_BATCHES):
                one_step(trained, next(batches))
            start = time.perf_counter()
            for _ in range(count):
                one_step(trained, next(batches))
            count = yield time.perf_counter() - start


@dataclass(frozen=True)
class Ddp:
    """torch's DistributedDataParallel over gloo: a process per core with one thread, each a batch of its own a step."""

    def serve(self, workload: Workload, rank: int, ranks: int, meet: Path) -> Serve:
        """Train on what is asked for, in step with the other ranks."""
        from dataclasses import replace

        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        set_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
        trained, batches = workload.make(), workload.batches()
        trained = replace(trained, model=DistributedDataParallel(trained.model))
        count = yield None
        while True:
            for _ in range(WARM_BATCHES):
                one_step(trained, next(batches))
            start = time.perf_counter()
            for _ in range(count):
                one_step(trained, next(batches))
            count = yield time.perf_counter() - start


@dataclass(frozen=True)
class Async:
    """Our engine. What is timed is its steady state, from one finished batch to another, over whole bursts.

    Lanes that run abreast finish their batches together, and half of such a burst would count for a whole one or for
    none (7 % of 13 batches). So as many batches of each lane are timed, `count` of all at least.

    Several ranks do not meet, unless `gossip` has the options of a LayerGossip. `traced` notes what threads do, and
    `ordered` lets them be replayed.
    """

    workers: Any
    lockstep: bool = False
    telemetry: bool = True
    threads: int | None = None
    gossip: dict[str, Any] | None = None
    traced: bool = False
    ordered: bool = False

    def serve(self, workload: Workload, rank: int, ranks: int, meet: Path) -> Serve:
        """Train on what is asked for."""
        from asyncprop import Engine, Ordered, Recorder
        from asyncprop.exchange import LayerGossip

        if self.threads:
            set_threads(self.threads)
        if self.gossip is not None:
            from torch import distributed

            distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
        trained, batches = workload.make(), workload.batches()
        with Engine(
            trained.model,
            trained.optimizer,
            trained.loss,
            workers=self.workers,
            turn=Ordered() if self.ordered else "lockstep" if self.lockstep else "free",
            trace=Recorder() if self.traced else None,
            telemetry=self.telemetry,
            exchange=None if self.gossip is None else LayerGossip(**self.gossip),
        ) as engine:
            lanes = engine.statistics().lanes
            count = yield None
            while True:
                steps: Any = engine.run(batches)
                for _ in range(WARM_BATCHES + lanes):
                    next(steps)
                whole = math.ceil(count / lanes) * lanes
                start = time.perf_counter()
                for _ in range(whole):
                    next(steps)
                seconds = time.perf_counter() - start
                steps.close()
                count = yield seconds * count / whole


Kind = Loop | Ddp | Async


class Contestant(Processes):
    """The processes of one contestant. `measure` runs them, at once, and returns seconds per batch of the machine.

    Args:
        kinds: what each process does. Several kinds live in one process and are measured in turn: processes of one
            kind differ by 3 % among themselves, which would hide what a small difference costs.
        workload: on what.
        ranks: how many processes; each trains on batches of its own.
    """

    def __init__(self, kinds: Sequence[Kind], workload: Workload, ranks: int = 1) -> None:
        super().__init__(partial(_prepare, kinds, workload), ranks, f"{type(kinds[0]).__name__} on {workload.name}")

    def measure(self, count: int, which: int = 0) -> float:
        """Let every process train on `count` batches at once, by the kind whose number is `which`.

        Returns:
            Seconds per batch of the whole machine: the inverse of the sum of the processes' rates.
        """
        return 1 / sum(count / seconds for seconds in self.ask((which, count)))


def _prepare(kinds: Sequence[Kind], workload: Workload, rank: int, ranks: int, meet: Path) -> Answer:
    from asyncprop.devices import keep_freed_memory
    from asyncprop.tasks import get_task

    keep_freed_memory(large_tensors=get_task(workload.task).large_tensors)
    serves = [_started(kind.serve(workload, rank, ranks, meet)) for kind in kinds]
    return lambda asked: serves[asked[0]](asked[1])


def _started(serve: Serve) -> Callable[[int], Any]:
    next(serve)
    return serve.send
