"""Predict: throughput and staleness of workers on given machines, by a run in virtual time of a stand-in model.

The stand-in has as many layers, each a number that multiplies: what happens when does not depend on what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from asyncprop.engine import BlockUpdate, Coupled, Decoupled, Engine, LayerUpdate
from asyncprop.simulate.costs import KINDS, Costs, LayerCosts
from asyncprop.simulate.pace import Machine, Pace, SimulatedDevice
from asyncprop.simulate.virtual_time import VirtualTime

BATCHES = 40
"""Enough where passes all take equally long."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What workers are predicted to do in their steady state: seconds per batch, and mean staleness of an update."""

    seconds_per_batch: float
    staleness: float


def predict(
    costs: LayerCosts,
    workers: Coupled | Decoupled,
    machines: list[Machine],
    *,
    by_layer: bool = True,
    batches: int = BATCHES,
    seed: int = 0,
) -> Prediction:
    """Return throughput and staleness of these workers, put on the machines one after the other.

    Args:
        costs: of the layers; if passes vary, more batches make staleness more certain.
        workers, machines: who computes, and on what.
        by_layer: whether layers are stepped one by one.
        batches: whose mean is taken, or a few more: as many of each lane.
        seed: of what is drawn, if passes vary.
    """
    lanes = workers.lanes_on(sum(machine.slots for machine in machines))
    warm, batches = 2 * lanes, math.ceil(batches / lanes) * lanes  # passes that began together end together
    whole = warm + batches + lanes
    seen = run_stand_in(VirtualTime(), costs, workers, machines, by_layer=by_layer, batches=whole, seed=seed)
    steady = seen[warm : warm + batches]  # the last passes run with lanes empty beside them
    return Prediction((steady[-1][0] - seen[warm - 1][0]) / batches, fmean(age for _, age in steady))


def run_stand_in(
    time: VirtualTime,
    costs: LayerCosts,
    workers: Coupled | Decoupled,
    machines: list[Machine],
    *,
    by_layer: bool = True,
    batches: int,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Train the stand-in on so many batches, and return when each ended, and its updates' mean staleness.

    Args:
        time: a new clock, which the calling thread has made.
        costs, workers, machines, by_layer, seed: as for `predict`.
        batches: of the run.
    """
    layers = len(costs.forward_s)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(layers)))
    named = {str(layer): {kind: getattr(costs, kind)[layer] for kind in KINDS} for layer in range(layers)}
    with (
        _one_thread(),
        Engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            lambda module, batch: module(batch).sum(),
            workers=workers,
            update=LayerUpdate() if by_layer else BlockUpdate(),
            turn=Pace(time, Costs("", "", {}, named, costs.variation), machines, seed=seed),
            device=SimulatedDevice(time, machines),
        ) as engine,
    ):
        some: list[Tensor] = [torch.zeros(1, 1)] * batches
        return [(time.now(), step.mean_staleness) for step in engine.run(some)]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
