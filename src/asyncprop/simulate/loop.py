"""Loop: the plain loop in virtual time, alone or in step with others as DistributedDataParallel keeps ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncprop.delay import Delays
from asyncprop.engine.passes import LossFn
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.recorder import Recorder
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.groups import mean
from asyncprop.simulate.virtual_time import VirtualTime


class Barrier:
    """Ranks that average their gradients in each step, and wait for each other there.

    A layer's gradients travel from when all ranks have them, one layer after the other from the last to the first,
    while the backward passes go on: what is left of that when the passes end is waited for beside the slowest rank.
    """

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int) -> None:
        self._changed = time.condition()
        self._ranks = ranks
        self._come: list[tuple[nn.Module, Callable[[], None]]] = []
        self._rounds = 0
        self.exposed_s = _exposed(costs, ranks)

    def meet(self, model: nn.Module, step: Callable[[], None]) -> None:
        """Wait until all have come. Each model's gradients are then the mean of all, and each has made its step.

        All make it at one instant, as a learning rate that changes would else be old for some, and new for others.
        """
        with self._changed:
            self._come.append((model, step))
            this = self._rounds
            if len(self._come) == self._ranks:
                _average_gradients([model for model, _ in self._come])
                for _, step in self._come:
                    step()
                self._come = []
                self._rounds += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._rounds > this)


class VirtualLoop(SequentialLoop):
    """Forward, backward, step, each taking what its layers cost.

    Args:
        model, optimizer, loss_fn, delays, trace: as for the plain loop.
        time: the clock.
        costs: of the layers.
        speed: of its device.
        barrier: where it meets the other ranks in each step; None if it is alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        time: VirtualTime,
        costs: LayerCosts,
        speed: float,
        delays: Delays,
        trace: Recorder | None,
        barrier: Barrier | None,
    ) -> None:
        def timed_loss(model: nn.Module, batch: Any) -> Any:
            loss = loss_fn(model, batch)
            self._pass(sum(costs.forward_s) / speed)
            return loss

        super().__init__(model, optimizer, timed_loss, delays=delays, trace=trace, clock=time)
        self._time, self._costs, self._speed, self._barrier = time, costs, speed, barrier
        self._never = threading.Event()

    def _step(self) -> None:
        self._pass(sum(self._costs.backward_s) / self._speed)
        if self._barrier:
            self._barrier.meet(self._model, super()._step)
            self._pass(self._barrier.exposed_s)
        else:
            super()._step()
        self._pass(sum(self._costs.update_s) / self._speed)

    def _pass(self, seconds: float) -> None:
        self._time.sleep(seconds, self._never)


def _exposed(costs: LayerCosts, ranks: int) -> float:
    ready = done = 0.0
    for backward, transfer in zip(reversed(costs.backward_s), reversed(costs.transfer_s), strict=True):
        ready += backward
        done = max(done, ready) + transfer * 2 * (ranks - 1) / ranks
    return done - ready


@torch.no_grad()
def _average_gradients(models: list[nn.Module]) -> None:
    for same in zip(*(model.parameters() for model in models), strict=True):
        gradients = [parameter.grad for parameter in same if parameter.grad is not None]
        if gradients:
            value = mean([g if g is not None else torch.zeros_like(p) for p in same for g in [p.grad]])
            for parameter in same:
                parameter.grad = value.clone()
