"""Ddp: torch's DistributedDataParallel, a process per core with a batch each a step, as a plan times it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import distributed, nn
from torch.optim import Optimizer

from asyncprop.delay import Delays
from asyncprop.engine.passes import LossFn
from asyncprop.methods.ddp import DdpLoop
from asyncprop.simulate.measure import at_rest
from asyncprop.simulate.processes import Answer, Processes

Made = tuple[nn.Module, LossFn, list[Any], Optimizer]
"""What is planned for: model, loss, batches, optimizer."""
Make = Callable[[], Made]
"""Makes it anew, in a process that can import this function."""
WARM_STEPS = 2
"""At the start of a slice, that are not timed."""


class Ddp(Processes):
    """torch's DDP over gloo, on one thread a process, as `--method ddp --ranks N` has it; at learning rate 0.

    Args:
        make: what each process trains.
        ranks: how many there are.
    """

    def __init__(self, make: Make, ranks: int) -> None:
        super().__init__(partial(_prepare, make), ranks, "torch DDP")
        self._step_s = math.inf

    def slice(self, least: int, least_s: float) -> float:
        """Return the seconds of a batch of the whole machine, over at least so many steps and, once known, seconds."""
        each = self.ask(max(least, math.ceil(least_s / self._step_s)))
        self._step_s = max(each)
        return 1 / sum(1 / seconds for seconds in each)


def _prepare(make: Make, rank: int, ranks: int, meet: Path) -> Answer:
    torch.set_num_threads(1)
    model, loss_fn, batches, optimizer = make()
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    steps = DdpLoop(model, at_rest(optimizer), loss_fn, delays=Delays((), rank)).run(cycle(batches))

    def seconds_of_a_step(count: int) -> float:
        for _ in range(WARM_STEPS):
            next(steps)
        start = perf_counter()
        for _ in range(count):
            next(steps)
        return (perf_counter() - start) / count

    return seconds_of_a_step
