"""Stepper: steps a lane's layers as the backward pass in it produces their gradients."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from asyncprop.engine.compensation import Attenuation, Compensation
from asyncprop.engine.exchange import Exchange
from asyncprop.engine.lane import Lane
from asyncprop.engine.layers import Layer
from asyncprop.engine.optimizer import States
from asyncprop.engine.partition import Partition
from asyncprop.engine.turn import NOTHING, Given, Turn
from asyncprop.engine.unit import LaneUnit, Unit
from asyncprop.engine.update import NonFiniteError, Stopping
from asyncprop.engine.versions import Versions
from asyncprop.recorder import Recorder


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
        # Without a turn, a layer's gradient is noted as ready when the layer is stepped: each hook costs microseconds.
        later = not all(unit.at_once for unit in units)
        self._handles = self._announce() if turn or (recorder and later) else []
        for unit in self.units:
            if unit.unit.at_once:
                unit.listen(self._arrival_in(unit))

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
            if unit.unit.update.accumulate > 1:
                unit.set_aside()

    def finish(self) -> None:
        """Step what has a gradient and has not been stepped: all layers of a block, and layers used in part."""
        for unit in reversed(self.units):
            self._step(unit)

    def close(self) -> None:
        """Take the hooks off, so that nothing refers to the lane any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for unit in self.units:
            unit.close()
        self.units.clear()

    def _announce(self) -> list[RemovableHandle]:
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
                self._record_ready(layer.index)

        return arrived

    def _record_ready(self, layer: int) -> None:
        if self._recorder:
            now = self._recorder.now()
            self._recorder.add("ready", now, now, self.lane.index, self._batch, layer)

    def _arrival_in(self, unit: LaneUnit) -> Callable[[torch.Tensor], None]:
        def arrived(leaf: torch.Tensor) -> None:
            if self._stopping.is_set():
                raise Stopping
            if self._stepping and unit.is_complete:
                unit.listen_to(leaf)
                self._step(unit)

        return arrived

    def _step(self, unit: LaneUnit) -> None:
        unit.put_back()
        with_gradient = [name for name, leaf in zip(unit.names, unit.leaves, strict=True) if leaf.grad is not None]
        if not with_gradient:
            return
        layer = unit.unit.layers[0].index
        if self._recorder and not self._handles and len(with_gradient) == len(unit.names):
            self._record_ready(layer)
        with self._turn.at(self._batch, "write", layer) if self._turn else NOTHING:
            start = self._recorder.now() if self._recorder else 0.0
            match unit.unit.update.compensate:
                case Compensation() as compensation:
                    self._compensate(unit, compensation)
                case Attenuation() as attenuation:
                    self._attenuate(unit, attenuation)
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
        lane = self.lane
        for name, leaf in zip(unit.names, unit.leaves, strict=True):
            if leaf.grad is not None:
                mean_square = None
                if compensation.adaptive:
                    mean_square = unit.unit.mean_square(name, leaf, lane.device, lane.stream)
                compensation.correct(leaf.grad, leaf, lane.values_read[name], mean_square)

    @torch.no_grad()
    def _attenuate(self, unit: LaneUnit, attenuation: Attenuation) -> None:
        for layer in unit.unit.layers:
            factor = attenuation.factor(self._age(layer.index))
            for name in layer.parameters:
                gradient = self.lane.leaves[name].grad
                if gradient is not None and factor != 1:
                    gradient.mul_(factor)

    def _clip(self, unit: LaneUnit) -> None:
        norm = nn.utils.clip_grad_norm_(unit.leaves, unit.unit.update.max_norm or math.inf)
        if not math.isfinite(norm):
            names = ", ".join(layer.name for layer in unit.unit.layers)
            raise NonFiniteError(f"the gradient norm of layer {names} is {float(norm)} in batch {self._batch}")

    def _write(self, unit: LaneUnit, names: Sequence[str], others: Given | None) -> Given:
        """Write the parameters; the one place where passes meet in shared memory.

        Guarantees: a parameter's optimizer state is made by one pass alone; with `write="locked"` so is every
        update. Assumes: the leaf's storage is the user's parameter's. The race that is wanted, when lock-free: two
        passes may read and write the same floats at once; then some of one update's increments are lost, or land on
        a momentum that the other is half through. And forward passes read while this writes (paper, Sec. 3.2).
        """
        alone = unit.unit.must_lock(names)
        with unit.unit.alone(self.lane.device, self.lane.stream, names) if alone else NOTHING:
            given = unit.view.step(others)
        written = set(names)
        for layer in unit.unit.layers:
            if not written.isdisjoint(layer.parameters):
                self._note(layer.index)
        return given

    def _note(self, layer: int) -> None:
        if self._versions:
            age = self._age(layer)
            self.staleness[layer] = age
            self._versions.landed(self.lane.index, layer, age)
        if self._exchange:
            self._exchange.landed(layer)

    def _age(self, layer: int) -> int:
        """Return how many updates have landed on a layer since the pass read it."""
        assert self._versions
        return self._versions.of(layer) - self.lane.read[layer]
