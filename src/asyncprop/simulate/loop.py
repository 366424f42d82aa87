"""VirtualLoop: the plain loop in virtual time, alone or in step with others."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asyncprop.delay import Delays
from asyncprop.engine.passes import LossFn
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.recorder import Recorder
from asyncprop.simulate.costs import Draws, LayerCosts
from asyncprop.simulate.in_step import InStep
from asyncprop.simulate.virtual_time import VirtualTime


class VirtualLoop(SequentialLoop):
    """Forward, backward, step, each taking what its layers cost. What else passes in a step is waited for other ranks.

    Args:
        model, optimizer, loss_fn, delays, trace: as for the plain loop.
        time: the clock.
        costs: of the layers.
        speed: of its device.
        meeting: how it meets the other ranks in each step. Loops join it in the order of ranks.
        seed: of what is drawn, if passes vary.
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
        meeting: InStep,
        seed: int = 0,
    ) -> None:
        def timed_loss(model: nn.Module, batch: Any) -> Any:
            loss = loss_fn(model, batch)
            self.compute(sum(costs.forward_s))
            return loss

        super().__init__(model, optimizer, timed_loss, delays=delays, trace=trace, clock=time)
        self._time, self._speed, self._meeting = time, speed, meeting
        self._never, self._draws = threading.Event(), Draws(costs.variation, seed)
        self._computed_s = 0.0
        meeting.loops.append(self)

    @property
    def model(self) -> nn.Module:
        """The model that it trains."""
        return self._model

    @property
    def batches(self) -> int:
        """Batches that it has finished."""
        return self._batches

    def compute(self, cost_s: float) -> None:
        """Let pass what this cost takes on the loop's device."""
        takes = cost_s * self._draws.of(self._batches) / self._speed
        self._computed_s += takes
        self._time.sleep(takes, self._never)

    def update(self) -> None:
        """Step the optimizer, by the gradients that the model has. It takes no time."""
        super()._step()

    def _step(self) -> float:
        start, computed = self._time.now(), self._computed_s
        self._meeting.step(self)
        return max(0.0, self._time.now() - start - (self._computed_s - computed))
