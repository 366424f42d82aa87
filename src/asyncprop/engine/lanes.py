"""Lanes: all lanes of an engine over one model, what they share, and what each has of its own."""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asyncprop.clock import Clock
from asyncprop.devices import Device
from asyncprop.engine.channel import Channel
from asyncprop.engine.compensation import Attenuation, Compensation
from asyncprop.engine.exchange import Exchange
from asyncprop.engine.lane import Lane, shares_storage
from asyncprop.engine.layers import Layer, find_layers
from asyncprop.engine.optimizer import States, copy_state, copy_to
from asyncprop.engine.partition import Blocks, Partition, check_blocks, cut, measure_backward
from asyncprop.engine.stepper import Stepper
from asyncprop.engine.turn import Turn
from asyncprop.engine.unit import Unit, units_of
from asyncprop.engine.update import Update
from asyncprop.engine.versions import Versions
from asyncprop.recorder import Recorder


class Lanes:
    """Makes the lanes, and makes them anew when the user has moved, frozen or switched parts of the model.

    Attributes:
        count: how many there are.
        lanes, steppers: emptied and filled only while nothing is in flight.
        free: the lanes that carry no pass.
        layers, versions: of the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        update: Update,
        count: int,
        device: Device,
        *,
        partition: Partition | None,
        exchange: Exchange | None,
        telemetry: bool,
        turn: Turn | None,
        recorder: Recorder | None,
        clock: Clock,
        stopping: threading.Event,
    ) -> None:
        self.lanes: list[Lane] = []
        self.steppers: list[Stepper] = []
        self.layers: tuple[Layer, ...] = find_layers(model, trainable(model, optimizer), update.layers)
        self._model, self._optimizer, self._update, self._device = model, optimizer, update, device
        self._partition, self._exchange, self._telemetry = partition, exchange, telemetry
        self._turn, self._recorder, self._stopping = turn, recorder, stopping
        self._clock = clock
        self._units: list[Unit] = []
        self._mean_squares: dict[str, Tensor] = {}
        self.resize(count)

    def resize(self, count: int) -> None:
        """Let there be so many lanes; before the first batch."""
        self.count = count
        self.free: Channel[Lane] = Channel(count, self._clock)
        self.versions = Versions(count, len(self.layers))
        alone = self._turn is None and self._exchange is None
        self._in_turn = count == 1 and alone  # one pass after the other, and nobody beside
        self._private: list[States] = [defaultdict(dict) for _ in range(count - 1)]
        self._blocks = self._blocks_given()
        self._signature: tuple[Any, ...] | None = None

    def refresh(self) -> None:
        """Make the lanes, unless they are there and still fit the model and its optimizer."""
        signature = _signature(self._optimizer)
        wanted = trainable(self._model, self._optimizer)
        current = {name for layer in self.layers for name in layer.parameters}
        unchanged = signature == self._signature and wanted == current
        if unchanged and all(shares_storage(self._model, lane) for lane in self.lanes):
            return
        self._signature = None  # until all is made: what fails half way is made anew, if the user tries again
        if wanted != current:
            self.layers = find_layers(self._model, wanted, self._update.layers)
            self.versions = Versions(self.count, len(self.layers))
            self._blocks = self._blocks_given()
        self.close()
        if self._turn:
            self._turn.open(self._model, self.layers, by_layer=self._update.by_layer)
        self._units = units_of(self.layers, self._update, self._mean_squares, in_turn=self._in_turn)
        for index in range(self.count):
            self._add(index)
        self._signature = signature

    def close(self) -> None:
        """Take all hooks off and forget the lanes."""
        for lane, stepper in zip(self.lanes, self.steppers, strict=True):
            stepper.close()
            lane.close()
        self.steppers.clear()
        self.lanes.clear()
        while len(self.free):
            self.free.get()

    def cut_blocks(self, losses_of: Callable[[nn.Module, Any], list[Tensor]], batch: Any) -> None:
        """Cut the layers into the lanes' blocks by the times of backward passes on `batch`, if that is yet to be done.

        Called before the first pass: it runs passes of its own, in a copy of the model, and puts back the random state.
        """
        if not self._partition or self._blocks:
            return
        with torch.random.fork_rng():
            times = measure_backward(copy.deepcopy(self._model), losses_of, batch, self.layers, self._device)
        self._blocks = cut(times, self.layers, self.count)
        self._hand_out_blocks()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beyond the user's model and optimizer; empty for most engines.

        Nothing may be in flight.
        """
        is_private = self._update.state == "private"
        if not (is_private or self._partition or self._update.compensate):
            return {}
        shared = {
            "mean_squares": dict(self._mean_squares),
            "blocks": [list(block) for block in self._blocks or ()],
        }
        return {"private": self._private_states(), **shared} if is_private else shared

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; if each lane has state or a block of its own, of an engine with as many lanes."""
        if not state:
            return
        if self._partition and state["blocks"]:
            self._check_count(len(state["blocks"]))
        if self._update.state == "private":
            self._load_private(state.get("private", []))
        self._mean_squares.clear()
        parameters = dict(self._model.named_parameters())
        for name, value in state["mean_squares"].items():
            self._mean_squares[name] = copy_to(parameters[name].device, value)
        self._blocks = tuple(tuple(block) for block in state["blocks"]) or None
        self._signature = None  # views hold the states: make them anew

    def _private_states(self) -> list[dict[str, Any]]:
        named = list(self._model.named_parameters())
        return [{name: states[p] for name, p in named if p in states} for states in self._private]

    def _check_count(self, lanes: int) -> None:
        if lanes != self.count:
            raise ValueError(f"state must be of an engine with as many lanes (got {lanes}, not {self.count})")

    def _load_private(self, lanes: list[dict[str, Any]]) -> None:
        self._check_count(1 + len(lanes))
        parameters = dict(self._model.named_parameters())
        for states, saved in zip(self._private, lanes, strict=True):
            states.clear()
            for name, value in saved.items():
                states[parameters[name]] = copy_state(value, parameters[name], self._optimizer)

    def _add(self, index: int) -> None:
        lane = Lane(index, self._model, self.layers, self.versions, self._device)
        if self._telemetry or self._update.compensate or self._turn or self._recorder:
            lane.watch_reads(self._turn, self._recorder)
        if isinstance(self._update.compensate, Compensation):
            lane.keep_values()
        shared = index == 0 or self._update.state == "shared"
        stepper = Stepper(
            lane,
            self._units,
            self._model,
            self._optimizer,
            self._optimizer.state if shared else self._private[index - 1],
            partition=self._partition,
            versions=self.versions if self._telemetry or isinstance(self._update.compensate, Attenuation) else None,
            exchange=self._exchange,
            turn=self._turn,
            recorder=self._recorder,
            stopping=self._stopping,
        )
        self.lanes.append(lane)
        self.steppers.append(stepper)
        self.free.put(lane)
        self._hand_out_blocks()

    def _blocks_given(self) -> Blocks | None:
        if not self._partition:
            return None
        if self.count == 1:
            return (tuple(layer.name for layer in self.layers),)
        if self._partition.blocks:
            check_blocks(self._partition.blocks, self.layers, self.count)
        return self._partition.blocks

    def _hand_out_blocks(self) -> None:
        for stepper, block in zip(self.steppers, self._blocks or (), strict=False):
            names = [name for layer in self.layers if layer.name in block for name in layer.parameters]
            stepper.block = [stepper.lane.leaves[name] for name in names]


def trainable(model: nn.Module, optimizer: Optimizer) -> set[str]:
    """Return the names of the parameters that get gradients and are stepped."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, p in model.named_parameters() if p.requires_grad and id(p) in stepped}


def _signature(optimizer: Optimizer) -> tuple[Any, ...]:
    """What an OptimizerView depends on: changed by add_param_group and load_state_dict."""
    groups = tuple(tuple(id(parameter) for parameter in group["params"]) for group in optimizer.param_groups)
    return (id(optimizer.state), groups)
