"""Replay: an asynchronous run again, to the bit. Ordered makes a free run one that can be; Replay follows its trace.

A pass is a chain of segments: what it computes between two moments. A segment may read the layers whose modules are
being called, or whose gradients are under way, and write those that are being stepped. `Ordered` lets segments of
several passes run at once unless one writes what the other reads or writes. So one after the other, in the order in
which they began, they compute the same floats: that is how `Replay` runs them.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from asyncprop.engine.layers import Layer
from asyncprop.engine.turn import Given, Moment, Turn
from asyncprop.engine.update import Stopping
from asyncprop.trace import Event, Trace

PATIENCE_S = 60.0
"""How long a replay may stand still before it says what it waits for."""


@dataclass
class _Pass:
    """What one pass may read and write until its next moment.

    Attributes:
        reads: layers, with how many of their modules are being called; a layer that the backward pass uses counts 1.
        buffers: layers whose modules may write buffers now.
        shared, sole: what it holds.
    """

    reads: Counter[int] = field(default_factory=Counter)
    buffers: Counter[int] = field(default_factory=Counter)
    is_forward: bool = True
    shared: set[int] = field(default_factory=set)
    sole: set[int] = field(default_factory=set)


class Ordered(Turn):
    """Free running in which nobody reads a layer while another writes it: what `trace` records can then be replayed.

    Every update is whole, as with `write="locked"`, and so is every read: a layer is held against writes while its
    modules are called, and while the backward pass uses it. Modules that have buffers (BatchNorm) are called by one
    pass at a time, layer by layer. If the model has dropout, one forward pass at a time goes on from layer to layer, as
    all draw from one random state; dropout as a function, with no module that tells of it, is not replayed.

    It needs the model on the CPU: on a GPU a moment is when work is queued, not when it reads or writes.

    Layers that no module is called for (a tied weight used as a tensor, a compiled model) are held as long as a pass
    may use them, so that the more there are of them, the less runs at once.
    """

    watches_all = True

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stopped = False
        self._passes: dict[int, _Pass] = {}
        self._shared: Counter[int] = Counter()
        self._sole: set[int] = set()
        self._layers = 0
        self._with_buffers: set[int] = set()
        self._never_called: set[int] = set()
        self._by_layer = self._draws = False

    def open(self, model: nn.Module, layers: tuple[Layer, ...], *, by_layer: bool) -> None:
        """Learn which layers have buffers, and whether forward passes draw random numbers."""
        self._layers, self._by_layer = len(layers), by_layer
        self._never_called = {layer.index for layer in layers}
        self._with_buffers = {-1} | {
            layer.index
            for layer in layers
            for name in layer.modules
            if next(model.get_submodule(name).buffers(recurse=False), None) is not None
        }
        self._draws = any(module.training and _draws(module) for module in model.modules())

    @contextmanager
    def at(self, batch: int, moment: Moment, layer: int) -> Iterator[None]:
        """Give up what the last segment held, and wait until what the next one needs is free."""
        if moment == "through":
            yield
            return
        this = self._passes.setdefault(batch, _Pass())
        stepped = self._note(this, moment, layer)
        shared = {layer for layer, count in this.reads.items() if count > 0}
        sole = {self._layers + 1 + layer for layer, count in this.buffers.items() if count > 0}
        if self._draws and this.is_forward:
            sole.add(2 * self._layers + 1)
        if moment == "handover":
            sole.add(2 * self._layers + 2)
        self._hold(this, shared - stepped, sole | stepped)
        yield
        if stepped:
            self._hold(this, shared, sole)
        elif moment in ("handover", "done"):
            self._hold(this, set(), set())
        if moment == "done":
            del self._passes[batch]

    def left(self, batch: int, layer: int) -> None:
        """Let the layer, and its buffers, be written."""
        this = self._passes[batch]
        this.reads[layer] -= layer >= 0
        this.buffers[layer] -= layer in self._with_buffers
        if not this.reads[layer]:
            self._hold(this, this.shared - {layer}, this.sole - {self._layers + 1 + layer})

    def stop(self) -> None:
        """Raise in every thread that waits, now and later."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _note(self, this: _Pass, moment: Moment, layer: int) -> set[int]:
        """Bring up to date what a pass may read; return the layers that it is about to write."""
        if moment in ("forward", "backward"):
            this.reads.update(self._never_called)
        elif moment in ("read", "read again"):
            self._never_called.discard(layer)
            this.reads[layer] += layer >= 0
            this.buffers[layer] += layer in self._with_buffers
        elif moment in ("handover", "done"):
            this.reads.clear()
            this.buffers.clear()
            this.is_forward = False
        elif moment == "read back":
            this.reads[layer] = 1
        elif moment == "ready":
            this.reads[layer] = 0
        elif moment == "write":
            return {layer} if self._by_layer else set(range(self._layers))
        return set()

    def _hold(self, this: _Pass, shared: set[int], sole: set[int]) -> None:
        """Exchange what a pass holds for this, at once: nobody waits for a part while holding another."""
        with self._changed:
            self._shared.subtract(this.shared)
            self._sole -= this.sole
            this.shared, this.sole = set(), set()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._is_free(shared, sole))
            if self._stopped:
                raise Stopping
            this.shared, this.sole = shared, sole
            self._shared.update(shared)
            self._sole |= sole

    def _is_free(self, shared: set[int], sole: set[int]) -> bool:
        return self._sole.isdisjoint(shared | sole) and not any(self._shared[resource] for resource in sole)


def _draws(module: nn.Module) -> bool:
    """Tell whether a module draws random numbers in training, by what torch's modules call their rate of dropout."""
    return any(isinstance(rate := getattr(module, name, 0), float) and rate > 0 for name in ("p", "dropout"))


class Replay(Turn):
    """Runs the segments of a traced run again, one after the other in the recorded order.

    The model, the optimizer, the batches and the random state must be what they were when that run began, and the
    engine must be made alike. Losses, parameters, buffers and optimizer state are then equal to the bit on the same
    machine. Hyper-parameters of each step are taken from the trace, as it depends on time when a scheduler's change is
    seen.

    Args:
        trace: of an engine with `turn=Ordered()` and `trace=Recorder()`.

    Raises:
        ValueError: if the trace is of another kind of run, or not whole.
    """

    watches_all = True

    def __init__(self, trace: Trace) -> None:
        script = sorted((moment for event in trace.events for moment in _moments(event)), key=lambda timed: timed[0])
        self._script = [moment for _, moment in script]
        self._check()
        self._places: defaultdict[tuple[Moment, int, int], deque[int]] = defaultdict(deque)
        for place, moment in enumerate(self._script):
            self._places[moment].append(place)
        self._lanes = {event.batch: event.lane for event in trace.events if event.kind == "forward"}
        self._given = _hyperparameters(trace)
        self._next = 0
        self._running = -1  # the batch whose segment is under way
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def finished(self) -> bool:
        """Whether everything in the trace has happened again."""
        return self._next == len(self._script)

    @contextmanager
    def at(self, batch: int, moment: Moment, layer: int) -> Iterator[None]:
        """End this pass's last segment, and wait for the next one's turn."""
        if moment in ("ready", "through"):
            yield
            return
        this = (moment, batch, layer)
        with self._changed:
            self._end_segment(batch)
            if not self._places[this]:
                raise ValueError(f"trace must be of this very training (it has no further {_say(this)})")
            self._wait_for(self._places[this].popleft(), this)
            self._next += 1
            self._running = batch
        yield
        if moment in ("handover", "done"):
            with self._changed:
                self._end_segment(batch)

    def lane(self, batch: int, free: int) -> int:
        """Return the lane that carried the batch."""
        return self._lanes[batch]

    def given(self, batch: int, layer: int) -> Given | None:
        """Return the hyper-parameters that the step was made with."""
        return self._given[batch, layer]

    def stop(self) -> None:
        """Raise in every thread that waits, now and later."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _end_segment(self, batch: int) -> None:
        if self._running == batch:
            self._running = -1
            self._changed.notify_all()

    def _wait_for(self, place: int, this: tuple[Moment, int, int]) -> None:
        came = False
        while not came:
            before = self._next
            came = self._changed.wait_for(
                lambda: self._stopped or (self._next == place and self._running < 0), PATIENCE_S
            )
            if self._stopped:
                raise Stopping
            if not came and self._next == before:
                raise TimeoutError(f"{_say(this)} waited for {_say(self._script[self._next])}, which did not come")

    def _check(self) -> None:
        moments = {moment for moment, _, _ in self._script}
        if not self._script or "read back" not in moments:
            raise ValueError("trace must be of an engine with turn=Ordered() (it has no reads by backward passes)")
        ends = [{batch for moment, batch, _ in self._script if moment == end} for end in ("forward", "done")]
        if ends[0] != ends[1] or ends[0] != set(range(len(ends[0]))):
            raise ValueError("trace must be whole: recorded from the first batch to the last, without a limit")


def _moments(event: Event) -> list[tuple[float, tuple[Moment, int, int]]]:
    """Return the moments of an event, with their times."""
    batch, layer = event.batch, event.layer
    if event.kind == "forward":
        return [(event.start_s, ("forward", batch, -1)), (event.end_s, ("handover", batch, -1))]
    if event.kind == "backward":
        return [(event.start_s, ("backward", batch, -1)), (event.end_s, ("done", batch, -1))]
    if event.kind == "read":
        kinds: dict[str, Moment] = {"": "read", "again": "read again", "back": "read back"}
        return [(event.start_s, (kinds[event.detail], batch, layer))]
    return [(event.start_s, ("write", batch, layer))] if event.kind == "write" else []


def _hyperparameters(trace: Trace) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Return what each write, by batch and layer, was made with; a write that notes nothing used what the last did."""
    given: dict[tuple[int, int], list[dict[str, Any]]] = {}
    last: dict[int, list[dict[str, Any]]] = {}
    for event in trace.events:
        if event.kind == "write":
            if event.detail:
                groups = json.loads(event.detail)
                last[event.layer] = [{k: tuple(v) if isinstance(v, list) else v for k, v in g.items()} for g in groups]
            given[event.batch, event.layer] = last[event.layer]
    return given


def _say(this: tuple[Moment, int, int]) -> str:
    moment, batch, layer = this
    return f"{moment!r} of batch {batch}" + (f" at layer {layer}" if layer >= 0 else "")
