"""Waiting: a model whose passes wait instead of computing: so few cores serve as a device for every thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asyncprop.engine import BlockUpdate, Decoupled, Engine
from asyncprop.engine.turn import Moment, Turn
from asyncprop.engine.update import Update
from asyncprop.trace import Step

SIZE = 16


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, forward_s: float, backward_s: float) -> Tensor:
        context.backward_s = backward_s
        time.sleep(forward_s)  # a device that computes this long, without a core
        return x + weight

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(context.backward_s)  # as above
        return gradients[0], gradients[0].sum(0), None, None


class WaitingLayer(nn.Module):
    """Adds a weight to x, and takes a given time for it in each direction."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self._times = (forward_s, backward_s)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, SIZE) to the same."""
        result: Tensor = _Wait.apply(x, self.weight, *self._times)  # type: ignore[no-untyped-call]  # torch does not type it
        return result


def waiting_model(layers: int, forward_s: float, beta: float) -> nn.Sequential:
    """Return layers that share a forward pass of `forward_s` and a backward pass of beta times that equally."""
    return nn.Sequential(*(WaitingLayer(forward_s / layers, beta * forward_s / layers) for _ in range(layers)))


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    """Return a loss that is always finite."""
    loss: Tensor = model(batch).square().mean()
    return loss


class BlockDelays(Turn):
    """A Turn that orders nothing, and notes how long each layer's gradient has waited when block updates step it.

    Attributes:
        delays_s: a list for each pass, with the seconds of each layer in the order of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._pass = threading.local()
        self._layers = len(list(model.parameters()))
        self.delays_s: list[list[float]] = []
        for layer, parameter in enumerate(model.parameters()):
            parameter.register_hook(self._noting(layer))  # type: ignore[no-untyped-call]  # torch does not type it

    @contextmanager
    def at(self, batch: int, moment: Moment, layer: int) -> Iterator[None]:
        """Note what the layers of the pass on this thread have waited, when it writes them."""
        if moment == "write":
            now = time.perf_counter()
            self.delays_s.append([now - self._pass.ready[layer] for layer in range(self._layers)])
        yield

    def stop(self) -> None:
        """Nobody waits."""

    def _noting(self, layer: int) -> Any:
        def note(gradient: Tensor) -> None:
            if not hasattr(self._pass, "ready"):
                self._pass.ready = {}
            self._pass.ready[layer] = time.perf_counter()

        return note


def run_waiting(
    model: nn.Module, workers: Decoupled, batches: int, update: Update | None = None, turn: BlockDelays | None = None
) -> tuple[list[Step], float]:
    """Train, and return the Steps, and the seconds from the first pass to the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [torch.ones(2, SIZE)] * batches
    with Engine(
        model, optimizer, mean_square, workers=workers, update=update or "layer", turn=turn or "free"
    ) as engine:
        start = time.perf_counter()
        steps = list(engine.run(data))
        return steps, time.perf_counter() - start


def measured_block_delays(
    layers: int, forward_s: float, beta: float, batches: int
) -> tuple[list[float], Sequence[Step]]:
    """Train by block updates, and return the mean seconds by which each layer's update comes late, and the Steps."""
    model = waiting_model(layers, forward_s, beta)
    turn = BlockDelays(model)
    steps, _ = run_waiting(model, Decoupled(1, 2, lanes=3, intraop_threads=1), batches, BlockUpdate(), turn)
    return torch.tensor(turn.delays_s, dtype=torch.float64).mean(0).tolist(), steps
