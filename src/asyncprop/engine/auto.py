"""Auto: numbers of threads and lanes that a plan chooses, by what it measures on an engine's first batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asyncprop.devices import Device
from asyncprop.engine.checks import compiled_parts
from asyncprop.engine.partition import Partition
from asyncprop.engine.passes import LossFn
from asyncprop.engine.turn import Turn
from asyncprop.engine.update import Update
from asyncprop.engine.workers import Decoupled

BATCHES = 4
"""Batches that the plan measures with, at most; training then uses them as if nothing had been."""
PASSES = 16
"""Of each of the plan's measurements."""


def check_auto(
    model: nn.Module, update: Update, partition: Partition | None, turn: Turn | None, device: Device
) -> None:
    """Refuse what must know the number of lanes before the first batch, or what a plan cannot measure.

    Raises:
        ValueError: with the way out.
    """
    reasons = {
        "a turn, which orders lanes that it must know": turn is not None,
        "a partition, which has a block for each lane": partition is not None,
        "private state, which each lane has": update.state == "private",
        "a compiled model, whose layers cannot be timed one by one": bool(compiled_parts(model)),
        "a GPU, of which nothing tells what it computes at once": device.passes_at_once is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"forward must be a number, not 'auto', with {reason}")


def look_ahead(loader: Iterable[Any]) -> tuple[list[Any], Iterator[Any]]:
    """Return the first batches of a loader, and an iterator over all of them."""
    batches = iter(loader)
    first = list(itertools.islice(batches, BATCHES))
    return first, itertools.chain(first, batches)


def choose_workers(
    model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, batches: list[Any], update: Update
) -> Decoupled:
    """Plan on these batches, and return the forward and backward threads that it advises.

    Copies are measured: model, optimizer and the random state stay as they are.
    """
    from asyncprop.simulate.planning import plan_decoupled  # it runs engines, so it is above them: they call it back

    return plan_decoupled(model, loss_fn, batches, optimizer, update, PASSES)


def numbers_of(workers: Decoupled) -> dict[str, int | None]:
    """Return what workers like these are made of."""
    names = ("forward", "backward", "lanes", "intraop_threads")
    return {name: getattr(workers, name) for name in names}
