"""Trial: times choices on a copy of the model, in turn: what predictions cannot tell apart, short runs can."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncprop.devices import CpuDevice
from asyncprop.engine import Engine
from asyncprop.engine.passes import LossFn
from asyncprop.engine.update import Update
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.methods.trainer import Trainer
from asyncprop.simulate.choices import Choice
from asyncprop.simulate.ddp import Ddp, Make
from asyncprop.simulate.measure import optimizer_like

ROUNDS = 6
"""In which all choices are timed, and then twice as many of the leaders."""
CLOSE = 0.1
"""Leaders are slower than the fastest by no more than this."""
WARM_ROUNDS = 2
"""Batches of each lane at the start of a slice that are not timed."""
LEAST_S = 0.1
"""Of a slice; tiny batches are timed by more of them."""


def time_choices(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    batches: Sequence[Any],
    update: Update,
    choices: Sequence[Choice],
    passes: int,
    make: Make | None = None,
) -> list[float]:
    """Return the seconds per batch of each choice: medians of slices, each choice's turn coming round and round.

    The slices of one choice differ by some 7 %, so those that may be the fastest get three times as many.

    Args:
        model, optimizer, loss_fn, update: as for `asyncprop.Engine`; neither is changed. All choices train one copy.
        batches: used again and again.
        choices: whose engines and loops are timed.
        passes: that are timed of each, at least.
        make: makes the like of all this for choices of several ranks, in whose processes it is trained.
    """
    took: list[list[float]] = [[] for _ in choices]
    with torch.random.fork_rng(), ExitStack() as stack:
        own = copy.deepcopy(model)
        steps = optimizer_like(optimizer, model, own)

        def open_trainer(choice: Choice) -> Trainer:
            if choice.workers is None:
                return SequentialLoop(own, steps, loss_fn)
            return Engine(own, steps, loss_fn, workers=choice.workers, update=update)

        def open_slices(choice: Choice) -> Callable[[int], float]:
            if choice.ranks == 1:
                return partial(_slice, stack.enter_context(open_trainer(choice)), choice, batches)
            assert make
            ddp = stack.enter_context(Ddp(make, choice.ranks))
            ddp.slice(1, LEAST_S)  # waits for its processes, whose start would be in the others' slices
            return partial(ddp.slice, least_s=LEAST_S)

        slices = [open_slices(choice) for choice in choices]

        def time_in_turn(places: Sequence[int], rounds: int) -> None:
            for number in range(rounds):
                for turn in range(len(places)):
                    place = places[(turn + number) % len(places)]
                    took[place].append(slices[place](max(1, passes // ROUNDS)))

        time_in_turn(range(len(choices)), ROUNDS)
        medians = [median(seconds) for seconds in took]
        leaders = [place for place, seconds in enumerate(medians) if seconds <= (1 + CLOSE) * min(medians)]
        if len(leaders) > 1:
            time_in_turn(leaders, 2 * ROUNDS)
    return [median(seconds) for seconds in took]


def _slice(trainer: Trainer, choice: Choice, batches: Sequence[Any], least: int) -> float:
    """Return the seconds of a batch in the steady state, over so many batches at least.

    As many from each lane: batches that began together end together, and half of a burst would count for a whole one.
    """
    lanes = trainer.statistics().lanes
    with CpuDevice().thread(choice.intraop_threads):
        steps: Any = trainer.run(cycle(batches))
        for _ in range(WARM_ROUNDS * lanes):
            next(steps)
        start, count = perf_counter(), 0
        while count < least or count % lanes or perf_counter() - start < LEAST_S:
            next(steps)
            count += 1
        seconds = perf_counter() - start
        steps.close()
    return seconds / count
