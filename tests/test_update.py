"""Update: clipping, locks, and options that cannot be."""

from typing import Any

import pytest
import torch
from torch import nn

import asyncprop as ap
from asyncprop.engine import Turn
from asyncprop.engine.layers import find_layers
from asyncprop.engine.unit import Unit
from asyncprop.testing import TINY, FakeDevice, cross_entropy, same_state, twins

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


NAMES = ("0.weight", "0.bias")


def unit_of(update: ap.LayerUpdate, mean_squares: dict[str, torch.Tensor] | None = None) -> Unit:
    """The first layer of the MLP."""
    layers = find_layers(TINY_MLP.seeded_model(), NAMES)
    return Unit(layers, update, {} if mean_squares is None else mean_squares, at_once=True)


def calls(device: FakeDevice) -> list[tuple[str, int]]:
    return [(call, stream) for _, call, stream in device.events if call != "thread"]


def test_state_is_there_for_all_streams_before_anybody_steps_without_the_lock() -> None:
    class Checked(FakeDevice):
        def finish(self, stream: int) -> None:
            assert unit.lock.locked()
            assert unit.must_lock(NAMES)
            super().finish(stream)

    device, unit = Checked(), unit_of(ap.LayerUpdate())
    with unit.alone(device, 0, NAMES[:1]):
        pass
    assert not unit.must_lock(NAMES[:1])
    assert unit.must_lock(NAMES)
    for stream in (1, 2):  # the last has waited for the lock while the one before it made what was missing
        with unit.alone(device, stream, NAMES):
            pass
    assert not unit.must_lock(NAMES)
    assert calls(device) == [("finish", 0), ("finish", 1)]


def test_locked_steps_follow_each_other_on_the_device_too() -> None:
    class Noting(FakeDevice):
        def wait(self, stream: int, mark: tuple[int, int]) -> None:
            waited_for.append(mark)
            super().wait(stream, mark)

    waited_for: list[Any] = []
    device, unit = Noting(), unit_of(ap.LayerUpdate(write="locked"))
    with device.thread(1):
        for stream in (0, 1, 0):
            with device.use(stream), unit.alone(device, stream, NAMES):
                pass
    assert calls(device) == [("mark", 0), ("finish", 0), ("wait", 1), ("mark", 1), ("wait", 0), ("mark", 0)]
    assert waited_for == [(0, 1), (1, 2)]  # streams, and the ticks of the steps before
    assert unit.must_lock(NAMES)


@pytest.mark.parametrize(("write", "waits"), [("locked", 2 * (9 - 1)), ("lock-free", 0)])
def test_every_locked_step_waits_for_the_one_before(write: Any, waits: int) -> None:
    model, device = TINY_MLP.seeded_model(), FakeDevice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    update = ap.LayerUpdate(write=write)
    with ap.Engine(model, optimizer, cross_entropy, workers=ap.Coupled(2), update=update, device=device) as engine:
        list(engine.run(TINY_MLP.batches(9)))
    assert sum(call == "wait" for call, _ in calls(device)) == waits


def test_a_running_mean_is_there_for_all_streams_before_anybody_sees_it() -> None:
    class Checked(FakeDevice):
        def finish(self, stream: int) -> None:
            assert not mean_squares
            super().finish(stream)

    mean_squares: dict[str, torch.Tensor] = {}
    device, unit = Checked(), unit_of(ap.LayerUpdate(), mean_squares)
    made = [unit.mean_square(NAMES[0], torch.ones(2), device, stream) for stream in (0, 1)]
    assert made[0] is made[1] is mean_squares[NAMES[0]]
    assert calls(device) == [("finish", 0)]


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
