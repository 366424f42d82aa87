"""Update: clipping, locks, and options that cannot be."""

import pytest
import torch
from torch import nn

import asyncprop as ap
from asyncprop.engine import Turn
from asyncprop.testing import TINY, cross_entropy, same_state, twins

TINY_MLP = TINY["mlp"]


@pytest.mark.parametrize("kind", [ap.LayerUpdate, ap.BlockUpdate])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": "free"}, "write must be"),
        ({"max_norm": 0.0}, "max_norm must be"),
        ({"max_norm": float("inf")}, "max_norm must be"),
        ({"accumulate": 0}, "accumulate must be >= 1"),
    ],
)
def test_wrong_options(kind, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def clipped_loop(model: nn.Module, batches, norm: float, groups) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        for group in groups(model):
            nn.utils.clip_grad_norm_(group, norm)
        optimizer.step()


@pytest.mark.parametrize(
    ("update", "groups"),
    [
        (ap.LayerUpdate(max_norm=0.05), lambda model: [list(model[0].parameters()), list(model[2].parameters())]),
        (ap.BlockUpdate(max_norm=0.05), lambda model: [list(model.parameters())]),
    ],
)
def test_max_norm_clips_what_is_stepped_together(update, groups) -> None:
    ours, theirs = twins(TINY_MLP.seeded_model())
    batches = TINY_MLP.batches(5)
    with ap.Engine(
        ours, torch.optim.SGD(ours.parameters(), lr=1.0), cross_entropy, update=update, turn="lockstep"
    ) as engine:
        list(engine.run(batches))
    clipped_loop(theirs, batches, 0.05, groups)
    assert same_state(ours.state_dict(), theirs.state_dict())


def test_a_gradient_norm_that_is_not_finite_is_an_error() -> None:
    model = nn.Linear(2, 1)
    loss = lambda m, batch: (m(batch) * 0).sum().sqrt()  # noqa: E731 (its gradient is not finite, its value is)
    with (
        pytest.raises(ap.NonFiniteError, match="gradient norm of layer"),
        ap.Engine(
            model, torch.optim.SGD(model.parameters(), lr=1.0), loss, update=ap.LayerUpdate(max_norm=1.0)
        ) as engine,
    ):
        list(engine.run([torch.ones(3, 2)]))


@pytest.mark.parametrize("update", [ap.LayerUpdate(write="locked"), ap.BlockUpdate(write="locked")])
def test_locked_writes_lose_no_update(update) -> None:
    # The gradient of a sum over one sample is 1 whatever is read: every update is -1, and none may be lost.
    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(50_000, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum()

    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with ap.Engine(model, optimizer, lambda m, x: m(x), workers=ap.Coupled(4), update=update) as engine:
        list(engine.run([torch.ones(1, dtype=torch.float64)] * 100))
    assert torch.equal(model.weight.data, torch.full_like(model.weight.data, -100.0))


class Scaled(nn.Module):
    """Two vectors whose gradients come in another order in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.full((5,), 0.7)), nn.Parameter(torch.full((5,), 1.3))

    def forward(self, x):
        first, second = (self.left, self.right) if float(x.detach().sum()) > 0 else (self.right, self.left)
        return torch.tanh(x * first) * second


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_is_stepped_with_all_its_gradients_in_whatever_order_they_come(accumulate: int) -> None:
    ours, theirs = twins(nn.Sequential(nn.Linear(5, 5), Scaled(), nn.Linear(5, 3)))
    batches = [(x * (-1) ** index, y) for index, (x, y) in enumerate(TINY_MLP.batches(12))]

    def losses(model, batch):
        both = [cross_entropy(model, batch), model(batch[0]).square().mean()]
        return both if accumulate == 2 else sum(both)

    update = ap.LayerUpdate(accumulate=accumulate, layers="parameter" if accumulate == 2 else "module")
    sgd = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    with ap.Engine(ours, sgd, losses, workers=ap.Coupled(1), update=update, turn=Turn()) as engine:  # a Turn: at once
        steps = list(engine.run(batches))
    assert all(age == 0 for step in steps for age in step.staleness)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        both = losses(theirs, batch)
        for loss in both if accumulate == 2 else [both]:
            loss.backward()
        optimizer.step()
    assert same_state(ours.state_dict(), theirs.state_dict())
