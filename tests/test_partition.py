"""Partition: exact disjoint blocks, cut by measured times; passes that end at their block's first layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import asyncprop as ap
from asyncprop.devices import CpuDevice
from asyncprop.engine.layers import Layer, find_layers
from asyncprop.engine.partition import BackwardTimes, check_blocks, cut, measure_backward
from asyncprop.testing import TINY, cross_entropy, twins


def layers_of(count: int) -> tuple[Layer, ...]:
    return tuple(Layer(index, f"l{index}", (f"l{index}.weight",), (f"l{index}",)) for index in range(count))


def times_of(way: list[float], own: list[float]) -> BackwardTimes:
    """What exact clocks would measure: the way down to each layer's output, and its own gradient."""
    count = len(way)
    down = [sum(way[k:]) for k in range(count)]
    return BackwardTimes(
        tuple(down[k] + own[k] for k in range(count)), tuple(down[k] + sum(own[k:]) for k in range(count))
    )


seconds = st.floats(0.01, 10)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=7), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_the_dearest_block_is_as_cheap_as_can_be(costs: list[tuple[float, float]], count: int) -> None:
    from itertools import combinations

    way, own = [a for a, _ in costs], [b for _, b in costs]
    layers = layers_of(len(costs))
    if count > len(layers):
        with pytest.raises(ValueError, match="at most"):
            cut(times_of(way, own), layers, count)
        return

    def dearest(ends: tuple[int, ...]) -> float:  # the slow obvious twin
        starts = (0, *ends[:-1])
        return max(sum(way[a:]) + sum(own[a:b]) for a, b in zip(starts, ends, strict=True))

    blocks = cut(times_of(way, own), layers, count)
    check_blocks(blocks, layers, count)
    ends = tuple(sum(len(block) for block in blocks[: k + 1]) for k in range(count))
    best = min(dearest((*inner, len(layers))) for inner in combinations(range(1, len(layers)), count - 1))
    assert dearest(ends) == pytest.approx(best)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((("l0", "l1"),), "as many as there are lanes"),
        ((("l0",), ("l2",)), "exactly once"),
        ((("l0", "l1"), ("l1", "l2")), "exactly once"),
        ((("l0", "l1"), ("l2", "other")), "other"),
    ],
)
def test_blocks_that_are_no_cover(blocks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_blocks(blocks, layers_of(3), 2)


def test_when_passes_are_partial() -> None:
    always, alternating = ap.Partition(warm_up_batches=3), ap.Partition(warm_up_batches=3, alternate=True)
    assert [always.is_partial(batch, max(0, batch - 3)) for batch in range(6)] == [False] * 3 + [True] * 3
    assert [alternating.is_partial(batch, max(0, batch - 3)) for batch in range(7)] == [False] * 4 + [True, False, True]
    with pytest.raises(ValueError, match="warm_up_batches must be >= 0"):
        ap.Partition(warm_up_batches=-1)


class Noted(torch.autograd.Function):
    """Passes its input on, and notes that a backward pass came by."""

    @staticmethod
    def forward(ctx, x, name, seen):
        ctx.name, ctx.seen = name, seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(ctx.name)
        return gradient, None, None


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1, self.l2 = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = Noted.apply(self.l0(x), "l0", SEEN)
        x = Noted.apply(self.l1(x), "l1", SEEN)
        return Noted.apply(self.l2(x), "l2", SEEN)


SEEN: list[str] = []


@pytest.mark.parametrize("update", ["layer", "block"])
def test_a_partial_pass_ends_at_its_block_and_writes_nothing_else(update: str) -> None:
    model = Deep()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    partition = ap.Partition(blocks=(("l2",), ("l0", "l1")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = TINY["mlp"].batches(1)
    SEEN.clear()
    with ap.Engine(
        model, optimizer, cross_entropy, workers=ap.Decoupled(1, 1, lanes=2), update=update, partition=partition
    ) as engine:
        (step,) = engine.run(batches)
    written = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert step.lane == 0
    assert written == {"l2"}
    assert SEEN == ["l2"]
    assert step.staleness == (-1, -1, 0)


@pytest.mark.parametrize("alternate", [False, True])
def test_one_worker_equals_training_without_a_partition(alternate: bool) -> None:
    results = []
    for partition in (None, ap.Partition(warm_up_batches=2, alternate=alternate)):
        model = TINY["resnet"].seeded_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with ap.Engine(
            model, optimizer, cross_entropy, workers=ap.Coupled(1), update="block", partition=partition
        ) as engine:
            results.append([step.loss for step in engine.run(TINY["resnet"].batches(8))])
    assert results[0] == results[1]


def test_blocks_are_measured_on_the_first_batch_and_change_nothing() -> None:
    first, second = twins(TINY["resnet"].seeded_model())
    batches = TINY["resnet"].batches(1)
    losses = []
    for model, partition in ((first, ap.Partition(warm_up_batches=99)), (second, None)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with ap.Engine(
            model, optimizer, cross_entropy, workers=ap.Coupled(2), update="block", partition=partition
        ) as engine:
            losses += [step.loss for step in engine.run(batches)]
            if partition:
                blocks = engine.state_dict()["blocks"]
                names = list(engine.statistics().layers)
    assert losses[0] == losses[1]
    assert [name for block in blocks for name in block] == names
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_blocks_of_another_number_of_lanes_are_refused() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def engine_with(lanes: int) -> ap.Engine:
        partition = ap.Partition(warm_up_batches=99)
        return ap.Engine(model, optimizer, cross_entropy, workers=ap.Coupled(lanes), partition=partition)

    with engine_with(2) as engine:
        list(engine.run(TINY["mlp"].batches(1)))
        state = engine.state_dict()
    again = engine_with(2)
    again.load_state_dict(state)
    assert again.state_dict() == state
    with pytest.raises(ValueError, match=r"as many lanes \(got 2, not 3\)"):
        engine_with(3).load_state_dict(state)


def test_a_layer_near_the_loss_is_reached_before_one_near_the_input() -> None:
    # 40 equal layers: the way down to the first is 40 times that to the last.
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(40)])
    layers = find_layers(model, [name for name, _ in model.named_parameters()])
    batch = torch.randn(64, 64)
    times = measure_backward(model, lambda m, x: [m(x).square().mean()], batch, layers, CpuDevice())
    assert len(times.alone) == len(times.down_to) == 40
    assert sum(times.alone[:5]) > sum(times.alone[-5:])
    assert times.down_to[0] > times.alone[-1]
