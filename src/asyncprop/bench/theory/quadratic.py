"""Quadratic: linear regression, trained by real engines for long, and where its parameters are found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asyncprop.bench.theory.turns import ConstantDelay, Watch
from asyncprop.delay import Delay
from asyncprop.engine import Coupled, Engine

RESIDUAL_VARIANCE = 1.0
PASS_S = 5e-4
"""What a worker waits between its forward and its backward pass when it runs freely."""


@dataclass(frozen=True)
class Regression:
    """y = x · theta* + noise of variance 1, where theta* = 0 and the `size` entries of x have variance `curvature`.

    The loss is half the mean square, so its Hessian is `curvature` × identity, and a gradient's noise has variance
    `curvature` / `batch_size` at theta*. Each batch is fresh.
    """

    curvature: float
    batch_size: int
    size: int = 16

    @property
    def hessian(self) -> Tensor:
        """Of the expected loss."""
        return self.curvature * torch.eye(self.size, dtype=torch.float64)

    @property
    def sigma_sgd(self) -> float:
        """Standard deviation of a gradient's noise at theta*."""
        return float((self.curvature * RESIDUAL_VARIANCE / self.batch_size) ** 0.5)

    def model(self) -> nn.Linear:
        """Return the model, at theta*: one parameter tensor."""
        model = nn.Linear(self.size, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batches(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield fresh batches."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            x = torch.randn(self.batch_size, self.size, generator=generator) * self.curvature**0.5
            yield x, torch.randn(self.batch_size, 1, generator=generator) * RESIDUAL_VARIANCE**0.5


def variance(watch: Watch) -> float:
    """Return the mean variance of the parameters about theta* = 0."""
    return float(watch.covariance(torch.zeros(())).diagonal().mean())


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return half the mean square of the residuals."""
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean() / 2
    return loss


def run_constant_delay(
    task: Regression, learning_rate: float, delay: int, *, updates: int, skip: int, seed: int
) -> Watch:
    """Train with every update `delay` updates old, by delay + 1 workers, and return what was noted."""
    model = task.model()
    turn = ConstantDelay([model.weight], skip=skip, delay=delay, batches=updates)
    return _train(task, model, learning_rate, turn, workers=delay + 1, updates=updates, seed=seed)


def run_free(task: Regression, learning_rate: float, workers: int, *, updates: int, skip: int, seed: int) -> Watch:
    """Train with so many workers in no order, and return what was noted.

    Between its two passes each worker waits PASS_S, as if for a device of its own. Without that, passes of microseconds
    run one after the other for as long as Python lets one thread run, and most are not stale at all.
    """
    model = task.model()
    waits = [Delay(worker=worker, seconds=PASS_S) for worker in range(workers)]
    return _train(
        task,
        model,
        learning_rate,
        Watch([model.weight], skip=skip),
        workers=workers,
        updates=updates,
        seed=seed,
        delays=waits,
    )


def _train(
    task: Regression,
    model: nn.Linear,
    learning_rate: float,
    turn: Watch,
    *,
    workers: int,
    updates: int,
    seed: int,
    delays: Sequence[Delay] = (),
) -> Watch:
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    crew = Coupled(workers, intraop_threads=1)
    with Engine(model, optimizer, turn.watching(half_square), workers=crew, turn=turn, delays=delays) as engine:
        for _ in engine.run(task.batches(updates, seed)):
            pass
    return turn
