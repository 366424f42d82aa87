"""Network: a small one, trained by real engines around its optimum for long, and what theory says of that place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from asyncprop.bench.theory.quadratic import PASS_S
from asyncprop.bench.theory.turns import Watch
from asyncprop.delay import Delay
from asyncprop.engine import Coupled, Engine

Batch = tuple[Tensor, Tensor]

SAMPLES, INPUTS, HIDDEN = 2048, 4, 6
PENALTY = 0.05
"""Of the squared weights: without it, directions that the data leave open have no stationary variance."""


@dataclass(frozen=True)
class Place:
    """The optimum of the small network's loss, and the loss around it.

    Attributes:
        state: the parameters there.
        hessian: of the loss there, of shape (k, k).
        noise: covariance of the gradient of one sample, of shape (k, k); of a batch, divide by its size.
        data: all samples, of which batches are drawn with replacement.
    """

    state: dict[str, Tensor]
    hessian: Tensor
    noise: Tensor
    data: Batch

    def model(self) -> nn.Sequential:
        """Return the network at its optimum."""
        model = _network()
        model.load_state_dict(self.state)
        return model

    def batches(self, count: int, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            chosen = torch.randint(SAMPLES, (size,), generator=generator)
            yield self.data[0][chosen], self.data[1][chosen]


def penalised(model: nn.Module, batch: Batch) -> Tensor:
    """Return half the mean square of the residuals, and the penalty."""
    squares = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean() / 2 + PENALTY / 2 * squares
    return loss


def find_place() -> Place:
    """Draw the data, find the optimum by LBFGS in float64, and take Hessian and noise there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, INPUTS, generator=generator)
    teacher = torch.randn(INPUTS, HIDDEN, generator=generator)
    y = torch.tanh(x @ teacher).sum(1, keepdim=True) + torch.randn(SAMPLES, 1, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _network().double()
    whole = (x.double(), y.double())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalised(model, whole)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch does not type it
    theta = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    loss_at = flat_loss(dict(model.named_parameters()))
    each = vmap(grad(loss_at), (None, 0, 0))(theta, whole[0][:, None], whole[1][:, None])
    state = {name: value.float() for name, value in model.state_dict().items()}
    return Place(state, jacrev(grad(loss_at))(theta, *whole), torch.cov(each.T, correction=0), (x, y))


def flat_loss(like: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the network's loss as a function of all its parameters in one vector, of inputs, and of targets.

    Args:
        like: parameters by name, for their shapes.
    """
    model, shapes = _network(), {name: value.shape for name, value in like.items()}

    def loss_at(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in shapes.values()])
        state = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        residual = functional_call(model, state, (x,)) - y
        loss: Tensor = residual.square().mean() / 2 + PENALTY / 2 * theta.square().sum()
        return loss

    return loss_at


def run_network(
    place: Place, learning_rate: float, batch_size: int, workers: int, *, updates: int, skip: int, seed: int
) -> tuple[Watch, list[float]]:
    """Train from the optimum on, layer by layer, and return what was noted, and the share of each staleness.

    Several workers wait between their passes, as in `run_free`; one alone is sequential SGD.
    """
    model = place.model()
    turn = Watch(list(model.parameters()), skip=skip)
    waits = [Delay(worker=worker, seconds=PASS_S) for worker in range(workers)] if workers > 1 else []
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    crew = Coupled(workers, intraop_threads=1)
    ages: list[int] = []
    with Engine(model, optimizer, penalised, workers=crew, turn=turn, delays=waits) as engine:
        for step in engine.run(place.batches(updates, batch_size, seed)):
            ages += step.staleness
    counts = torch.bincount(torch.tensor(ages)).double()
    return turn, (counts / counts.sum()).tolist()


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
