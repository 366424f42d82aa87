"""Update: when a gradient lands. LayerUpdate steps each layer the instant its gradient is ready; BlockUpdate steps
all of them when the backward pass ends (paper, Sec. 3.2 and 3.4).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from asyncprop.engine.compensation import Compensation
from asyncprop.engine.exchange import Exchange
from asyncprop.engine.lane import Lane
from asyncprop.engine.layers import Layer
from asyncprop.engine.optimizer import OptimizerView, States
from asyncprop.engine.partition import Partition
from asyncprop.engine.turn import NOTHING, Given, Turn
from asyncprop.engine.versions import Versions
from asyncprop.recorder import Recorder

Write = Literal["lock-free", "locked"]
State = Literal["shared", "private"]


class NonFiniteError(ArithmeticError):
    """A loss or a gradient norm is not a finite number."""


class Stopping(Exception):  # noqa: N818 (not an error: the engine is being stopped)
    """Raised inside a pass to end it early, because another thread has failed."""


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """Step each layer the instant the backward pass has its whole gradient (Async LU, paper Alg. 1).

    Args:
        layers: what is stepped together: `"module"`, `"parameter"`, or module-name prefixes (see `find_layers`).
        write: `"lock-free"` lets passes write a layer at the same time, so an update can be lost in part;
            `"locked"` takes one lock per layer: no lost update, at the price of waiting.
        max_norm: clip the gradient that is stepped together (here: of a layer) to this 2-norm; None for no clipping.
        accumulate: how many losses `loss_fn` returns for a batch. Their gradients are summed into one step, which
            happens in the last loss's backward pass.
        state: whose the optimizer's state is. `"shared"`: all lanes read and write the one state of the user's
            optimizer. `"private"`: each lane has its own momentum, as published code of LAPSGD has it; the first
            lane's is the user's, the others' are in `Engine.state_dict()`.
        compensate: corrects gradients for what changed since their layer was read; None for no correction.
    """

    layers: str | Sequence[str] = "module"
    write: Write = "lock-free"
    max_norm: float | None = None
    accumulate: int = 1
    state: State = "shared"
    compensate: Compensation | None = None
    by_layer = True

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Step all layers together when the backward pass ends (Async BU, Hogwild!).

    Args are those of `LayerUpdate`; `layers` only says by what staleness is told, `max_norm` is of the whole
    gradient, and `"locked"` takes one lock for all.
    """

    layers: str | Sequence[str] = "module"
    write: Write = "lock-free"
    max_norm: float | None = None
    accumulate: int = 1
    state: State = "shared"
    compensate: Compensation | None = None
    by_layer = False

    def __post_init__(self) -> None:
        _check(self)


Update = LayerUpdate | BlockUpdate


def _check(update: Update) -> None:
    if update.write not in ("lock-free", "locked"):
        raise ValueError(f"write must be 'lock-free' or 'locked' (got {update.write!r})")
    if update.state not in ("shared", "private"):
        raise ValueError(f"state must be 'shared' or 'private' (got {update.state!r})")
    if update.max_norm is not None and not 0 < update.max_norm < math.inf:
        raise ValueError(f"max_norm must be a positive number (got {update.max_norm}): leave it out for no clipping")
    if update.accumulate < 1:
        raise ValueError(f"accumulate must be >= 1 (got {update.accumulate}): it is the number of losses per batch")


class Unit:
    """What all lanes share of the layers that are stepped together: the lock, which parameters have state, and
    the running means of squared gradients, by name, that compensation may need.
    """

    def __init__(
        self, layers: Sequence[Layer], update: Update, mean_squares: dict[str, torch.Tensor], *, at_once: bool
    ) -> None:
        self.layers = tuple(layers)
        self.update = update
        self.at_once = at_once
        self.lock = threading.Lock()
        self.stateless = {name for layer in layers for name in layer.parameters}
        self.mean_squares = mean_squares
        self._noted = ""

    def must_lock(self, names_with_gradient: Sequence[str]) -> bool:
        """Tell whether this step must be alone: asked for, or some parameter's state is yet to be made."""
        if self.update.write == "locked":
            return True
        return bool(self.stateless) and any(name in self.stateless for name in names_with_gradient)

    def mean_square(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return the running mean of squared gradients of a parameter, which all lanes share (see Compensation)."""
        if name not in self.mean_squares:
            with self.lock:
                self.mean_squares.setdefault(name, torch.zeros_like(like))
        return self.mean_squares[name]

    def note_if_new(self, given: Given) -> str:
        """Return the hyper-parameters of a step as text, or nothing if they are those of the step before."""
        note = json.dumps([{k: v for k, v in group.items() if _is_plain(v)} for group in given])
        if note == self._noted:
            return ""
        self._noted = note
        return note


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def units_of(
    layers: Sequence[Layer], update: Update, mean_squares: dict[str, torch.Tensor], *, in_turn: bool
) -> list[Unit]:
    """Return one unit per layer for LayerUpdate, one for all layers for BlockUpdate.

    Where passes run in turn, nobody can tell a layer that is stepped at once from one that is stepped when the pass
    ends (but by a norm that is clipped layer by layer), and one call of the optimizer costs less than one per layer.
    """
    if update.by_layer and not (in_turn and update.max_norm is None):
        return [Unit([layer], update, mean_squares, at_once=True) for layer in layers]
    return [Unit(layers, update, mean_squares, at_once=False)]


class LaneUnit:
    """A unit in one lane: its leaves, the optimizer's view of them, and how many gradients have yet to come."""

    def __init__(
        self, lane: Lane, unit: Unit, model: nn.Module, optimizer: Optimizer, states: States, *, whole: bool
    ) -> None:
        self.unit = unit
        self.names = [name for layer in unit.layers for name in layer.parameters]
        self.leaves = [lane.leaves[name] for name in self.names]
        parameters = dict(model.named_parameters())
        pairs = [(parameters[name], lane.leaves[name]) for name in self.names]
        self.view = OptimizerView(optimizer, pairs, states, whole=whole)
        self.missing = 0


class Stepper:
    """Steps one lane's layers as the pass in it produces their gradients, and notes how stale each step was.

    Attributes:
        staleness: of each layer's update in the current pass; -1 for a layer that was not updated.
        targets: the leaves that the current pass has gradients for; None for all.
        block: the leaves of the lane's own block, once that is known; for passes that a Partition makes partial.
    """

    def __init__(
        self,
        lane: Lane,
        units: Sequence[Unit],
        model: nn.Module,
        optimizer: Optimizer,
        states: States,
        *,
        partition: Partition | None,
        versions: Versions | None,
        exchange: Exchange | None,
        turn: Turn | None,
        recorder: Recorder | None,
        stopping: threading.Event,
    ) -> None:
        self.lane = lane
        whole = not units[0].update.by_layer or len(lane.layers) == 1
        self.units = [LaneUnit(lane, unit, model, optimizer, states, whole=whole) for unit in units]
        self.staleness: list[int] = []
        self.targets: list[nn.Parameter] | None = None
        self.block: list[nn.Parameter] = []
        self._partition = partition
        self._partial_turns = 0
        self._exchange = exchange
        self._batch = 0
        self._stepping = False
        self._versions = versions
        self._turn, self._recorder = turn, recorder
        self._stopping = stopping
        self._handles = self._announce() if turn or recorder else []
        self._handles += [
            leaf.register_post_accumulate_grad_hook(self._arrival_in(unit))  # type: ignore[no-untyped-call]
            for unit in self.units
            for leaf in unit.leaves
            if unit.unit.at_once
        ]

    def begin(self, batch: int) -> None:
        """Start the backward pass of a batch: its gradients are gathered, and nothing is stepped yet."""
        self._batch = batch
        self._stepping = False
        self.targets = None
        if self._partition and batch >= self._partition.warm_up_batches:
            if self._partition.is_partial(batch, self._partial_turns):
                self.targets = self.block
                self._pass_by(batch)
            self._partial_turns += 1
        self.staleness = [-1] * len(self.lane.layers) if self._versions else []

    def _pass_by(self, batch: int) -> None:
        """Tell the turn which layers a partial pass only goes through, from the last to the block's last."""
        for layer in reversed(self.lane.layers if self._turn else ()):
            if any(self.lane.leaves[name] is leaf for name in layer.parameters for leaf in self.block):
                return
            with self._turn.at(batch, "through", layer.index) if self._turn else NOTHING:
                pass

    def begin_last_loss(self) -> None:
        """Step each layer from now on as soon as all its gradients have come."""
        self._stepping = True
        for unit in self.units:
            unit.missing = len(unit.leaves)

    def finish(self) -> None:
        """Step what has a gradient and has not been stepped: all layers of a block, and layers used in part."""
        for unit in reversed(self.units):
            self._step(unit)

    def close(self) -> None:
        """Take the hooks off, so that nothing refers to the lane any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.units.clear()

    def _announce(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Let each layer's whole gradient be told to the turn and the recorder, before it is stepped."""
        return [
            self.lane.leaves[name].register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            for layer in self.lane.layers
            for arrived in [self._ready_after(layer)]
            for name in layer.parameters
        ]

    def _ready_after(self, layer: Layer):  # type: ignore[no-untyped-def]  # torch types the hook's argument itself
        missing, of = 0, -1

        def arrived(leaf: torch.Tensor) -> None:
            nonlocal missing, of
            if not self._stepping:
                return
            if of != self._batch:  # what a pass without all gradients has left is forgotten
                missing, of = len(layer.parameters), self._batch
            missing -= 1
            if missing:
                return
            with self._turn.at(self._batch, "ready", layer.index) if self._turn else NOTHING:
                if self._recorder:
                    now = self._recorder.now()
                    self._recorder.add("ready", now, now, self.lane.index, self._batch, layer.index)

        return arrived

    def _arrival_in(self, unit: LaneUnit):  # type: ignore[no-untyped-def]  # torch types the hook's argument itself
        def arrived(leaf: torch.Tensor) -> None:
            if self._stopping.is_set():
                raise Stopping
            unit.missing -= 1
            if self._stepping and unit.missing == 0:
                self._step(unit)

        return arrived

    def _step(self, unit: LaneUnit) -> None:
        with_gradient = [name for name, leaf in zip(unit.names, unit.leaves, strict=True) if leaf.grad is not None]
        if not with_gradient:
            return
        layer = unit.unit.layers[0].index
        with self._turn.at(self._batch, "write", layer) if self._turn else NOTHING:
            start = self._recorder.now() if self._recorder else 0.0
            if unit.unit.update.compensate:
                self._compensate(unit, unit.unit.update.compensate)
            if unit.unit.update.max_norm is not None:
                self._clip(unit)
            given = self._write(unit, with_gradient, self._turn.given(self._batch, layer) if self._turn else None)
            if self._recorder:
                note = unit.unit.note_if_new(given)
                self._recorder.add("write", start, self._recorder.now(), self.lane.index, self._batch, layer, note)
        for leaf in unit.leaves:
            leaf.grad = None

    @torch.no_grad()
    def _compensate(self, unit: LaneUnit, compensation: Compensation) -> None:
        for name, leaf in zip(unit.names, unit.leaves, strict=True):
            if leaf.grad is not None:
                mean_square = unit.unit.mean_square(name, leaf) if compensation.adaptive else None
                compensation.correct(leaf.grad, leaf, self.lane.values_read[name], mean_square)

    def _clip(self, unit: LaneUnit) -> None:
        norm = nn.utils.clip_grad_norm_(unit.leaves, unit.unit.update.max_norm or math.inf)
        if not math.isfinite(norm):
            names = ", ".join(layer.name for layer in unit.unit.layers)
            raise NonFiniteError(f"the gradient norm of layer {names} is {float(norm)} in batch {self._batch}")

    def _write(self, unit: LaneUnit, names: Sequence[str], others: Given | None) -> Given:
        """Write the parameters; the one place where passes meet in shared memory.

        Guarantees: a parameter's optimizer state is made by one thread alone; with `write="locked"` so is every
        update. Assumes: the leaf's storage is the user's parameter's. The race that is wanted, when lock-free: two
        passes may read and write the same floats at once; then some of one update's increments are lost, or land on
        a momentum that the other is half through. And forward passes read while this writes (paper, Sec. 3.2).
        """
        if unit.unit.must_lock(names):
            with unit.unit.lock:
                given = unit.view.step(others)
                unit.unit.stateless.difference_update(names)
        else:
            given = unit.view.step(others)
        written = set(names)
        for layer in unit.unit.layers:
            if not written.isdisjoint(layer.parameters):
                self._note(layer.index)
        return given

    def _note(self, layer: int) -> None:
        if self._versions:
            age = self._versions.of(layer) - self.lane.read[layer]
            self.staleness[layer] = age
            self._versions.landed(self.lane.index, layer, age)
        if self._exchange:
            self._exchange.landed(layer)
