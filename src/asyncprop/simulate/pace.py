"""Pace: makes an engine's passes take, in virtual time, what their layers cost on the machines that its workers are on.

A layer is read when its forward pass starts, and written when its update ends. What its backward pass reads, it reads
when it is asked for, which on a busy device is before it starts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from asyncprop.devices import CpuDevice
from asyncprop.engine.layers import Layer
from asyncprop.engine.turn import NOTHING, Moment, Turn
from asyncprop.simulate.costs import Costs, Draws, LayerCosts
from asyncprop.simulate.virtual_time import Process, VirtualTime

THROUGH = 0.5
"""Share of a layer's backward pass that a pass still takes which only goes through it: the gradient of its input."""


class Machine:
    """A device: computes so many operations at once, in the order in which they are asked for.

    Args:
        speed: by which costs are divided.
        slots: operations at once; of a CPU its cores, if an operation takes one.
    """

    def __init__(self, speed: float = 1.0, slots: int = 1) -> None:
        if not 0 < speed < math.inf:
            raise ValueError(f"speeds must be > 0 and finite (got {speed})")
        self.speed, self.slots = speed, slots
        self._free_at = [0.0] * slots

    def start(self, now_s: float, cost_s: float) -> tuple[float, float]:
        """Take on an operation at `now_s`, which no earlier call was later than; return when it starts, and how long
        it takes. What costs nothing starts at once.
        """
        if not cost_s:
            return now_s, 0.0
        takes = cost_s / self.speed
        start = max(now_s, self._free_at[0])
        heapq.heapreplace(self._free_at, start + takes)
        return start, takes


class SimulatedDevice(CpuDevice):
    """The CPU, by the clock of virtual time."""

    def __init__(self, time: VirtualTime, machines: Sequence[Machine]) -> None:
        self._time = time
        self._slots = sum(machine.slots for machine in machines)

    @property
    def passes_at_once(self) -> int:
        """As many as the machines compute at once."""
        return self._slots

    def mark(self) -> float:
        """Return the virtual time."""
        return self._time.now()


class Pace(Turn):
    """A turn that asks nobody to wait, but for time to pass.

    Args:
        time: the clock.
        costs: of the layers.
        machines: which the workers are put on, one after the other, in the order in which they first compute.
        seed: of what is drawn, if passes vary.
    """

    def __init__(self, time: VirtualTime, costs: Costs, machines: Sequence[Machine], *, seed: int = 0) -> None:
        self.clock = self._time = time
        self._given_costs, self._machines = costs, machines
        self._workers = 0
        self._draws = Draws(costs.variation, seed)
        self._factors: dict[int, float] = {}  # by batch, of those in flight
        self._costs = LayerCosts((), (), (), ())
        self._by_layer = True
        self._read: dict[int, set[int]] = {}  # by batch: the layers that its forward pass has read

    def open(self, model: nn.Module, layers: tuple[Layer, ...], *, by_layer: bool) -> None:
        """Look the layers' costs up."""
        self._costs = self._given_costs.of([layer.name for layer in layers])
        self._by_layer = by_layer

    def at(self, batch: int, moment: Moment, layer: int) -> AbstractContextManager[None]:
        """Let time pass for what the pass has done, and take on what it is about to do."""
        costs = self._costs
        if moment == "read":
            return self._reading(batch, layer)
        if moment == "forward":
            self._read[batch] = set()
            self._factors[batch] = self._draws.of(batch)
        elif moment == "handover":
            read = self._read.pop(batch)  # no module was called for the others
            self._compute(batch, sum(cost for layer, cost in enumerate(costs.forward_s) if layer not in read))
        elif moment == "through":
            self._compute(batch, costs.backward_s[layer] * THROUGH)
        elif moment == "ready":
            self._compute(batch, costs.backward_s[layer])
        elif moment == "write":
            self._compute(batch, costs.update_s[layer] if self._by_layer else sum(costs.update_s))
        elif moment == "done":
            self._factors.pop(batch, None)
        return NOTHING

    def stop(self) -> None:
        """Stop virtual time."""
        self._time.stop()

    @contextmanager
    def _reading(self, batch: int, layer: int) -> Iterator[None]:
        """Read when the layer's operation starts: it is due when the block ends."""
        time, cost = self._time, self._costs.forward_s[layer]
        time.settle()
        process = time.process
        start, takes = self._machine_of(process).start(process.now_s, cost * self._factors[batch])
        time.until(start)
        self._read[batch].add(layer)
        yield
        process.due_s = takes

    def _compute(self, batch: int, cost_s: float) -> None:
        self._time.settle()
        process = self._time.process
        start, takes = self._machine_of(process).start(process.now_s, cost_s * self._factors[batch])
        process.now_s = start
        process.due_s = takes
        self._time.settle()

    def _machine_of(self, process: Process) -> Machine:
        if process.place < 0:
            process.place = self._workers % len(self._machines)
            self._workers += 1
        return self._machines[process.place]
