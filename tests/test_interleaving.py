"""Forced interleavings: the staleness of each layer is as derived by hand, and every batch is used exactly once."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import asyncprop as ap
from asyncprop.testing import TINY, Sequencer, cross_entropy

# Two layers (0 is nearest the input), two batches in flight. R and W stand for reading and writing a layer.
R, W = "read", "write"

SCRIPTS = {
    # Batch 1 starts when batch 0 is done: nothing is stale.
    "in turn": (
        "layer",
        [(0, R, 0), (0, R, 1), (0, W, 1), (0, W, 0), (1, R, 0), (1, R, 1), (1, W, 1), (1, W, 0)],
        {0: (0, 0), 1: (0, 0)},
    ),
    # Both read both layers before either writes: the second to write is one update late at both.
    "both read first": (
        "layer",
        [(0, R, 0), (0, R, 1), (1, R, 0), (1, R, 1), (0, W, 1), (0, W, 0), (1, W, 1), (1, W, 0)],
        {0: (0, 0), 1: (1, 1)},
    ),
    # Figure 1 of the paper: batch 1 reads layer 0 before batch 0 writes it, and layer 1 after batch 0 wrote that.
    "layer 1 is written in time": (
        "layer",
        [(0, R, 0), (0, R, 1), (1, R, 0), (0, W, 1), (1, R, 1), (0, W, 0), (1, W, 1), (1, W, 0)],
        {0: (0, 0), 1: (1, 0)},
    ),
    # The later batch overtakes: the earlier one is the stale one.
    "overtaken": (
        "layer",
        [(0, R, 0), (0, R, 1), (1, R, 0), (1, R, 1), (1, W, 1), (1, W, 0), (0, W, 1), (0, W, 0)],
        {0: (1, 1), 1: (0, 0)},
    ),
    # Each overtakes the other at one layer: a stale update in each.
    "crossed": (
        "layer",
        [(0, R, 0), (0, R, 1), (1, R, 0), (1, R, 1), (0, W, 1), (1, W, 1), (1, W, 0), (0, W, 0)],
        {0: (1, 0), 1: (0, 1)},
    ),
    # A block writes all layers at its end (the script names it by its first layer), so layer 1, which layer-wise
    # updates would have written in time, is stale too: Sec. 3.4 of the paper.
    "block": (
        "block",
        [(0, R, 0), (0, R, 1), (1, R, 0), (1, R, 1), (0, W, 0), (1, W, 0)],
        {0: (0, 0), 1: (1, 1)},
    ),
}


@pytest.mark.parametrize("workers", [ap.Decoupled(forward=2, backward=2, lanes=2), ap.Coupled(workers=2)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_staleness_is_as_derived_by_hand(name: str, workers) -> None:
    update, script, expected = SCRIPTS[name]
    tiny = TINY["mlp"]
    model, sequencer = tiny.seeded_model(), Sequencer(script)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ap.Engine(model, optimizer, cross_entropy, workers=workers, update=update, turn=sequencer) as engine:
        staleness = {step.index: step.staleness for step in engine.run(tiny.batches(2))}
        statistics = engine.statistics()
    assert sequencer.finished
    assert staleness == expected
    assert statistics.versions == (2, 2)
    assert statistics.staleness == tuple(sum(ages) / 2 for ages in zip(*expected.values(), strict=True))


def test_a_forced_interleaving_gives_the_values_computed_by_hand() -> None:
    """Both passes read w = 1; loss = w * x, so the gradients are the inputs, and the updates add up."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    script = Sequencer([(0, R, 0), (1, R, 0), (0, W, 0), (1, W, 0)])
    batches = [torch.tensor([[2.0]]), torch.tensor([[3.0]])]
    loss_fn = lambda model, batch: model(batch).sum()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ap.Engine(model, optimizer, loss_fn, workers=ap.Coupled(2), turn=script) as engine:
        losses = {step.index: step.loss for step in engine.run(batches)}
    assert losses == {0: 2.0, 1: 3.0}
    assert model.weight.item() == pytest.approx(1 - 0.1 * 2 - 0.1 * 3)


def interleavings(lanes: int, batches: int):
    """Random orders of the reads and writes of `batches` passes through two layers, at most `lanes` in flight."""

    @st.composite
    def draw_script(draw):
        steps = {b: [(b, R, 0), (b, R, 1), (b, W, 1), (b, W, 0)] for b in range(batches)}
        waiting, active, script = list(range(batches)), [], []
        while waiting or active:
            while waiting and len(active) < lanes:
                active.append(waiting.pop(0))
            batch = draw(st.sampled_from(active))
            script.append(steps[batch].pop(0))
            if not steps[batch]:
                active.remove(batch)
        return script

    return draw_script()


def staleness_by_counting(script) -> dict[int, tuple[int, int]]:
    """The slow obvious twin: replay the script, counting writes between each batch's read and write of a layer."""
    ages: dict[int, list[int]] = {}
    for batch, layer in itertools.product({b for b, _, _ in script}, (0, 1)):
        between = script[script.index((batch, R, layer)) : script.index((batch, W, layer))]
        ages.setdefault(batch, []).append(sum(event == W and of == layer for _, event, of in between))
    return {batch: tuple(age) for batch, age in ages.items()}


@settings(max_examples=40, deadline=None)
@given(script=interleavings(lanes=3, batches=6))
def test_each_batch_is_used_once_under_any_schedule(script) -> None:
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 1, bias=False))
    seen: list[int] = []
    batches = [torch.eye(6)[index : index + 1] for index in range(6)]

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(int(batch.argmax()))
        return model(batch).sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sequencer = Sequencer(script)
    with ap.Engine(model, optimizer, loss_fn, workers=ap.Coupled(3), turn=sequencer) as engine:
        steps = list(engine.run(batches))
        statistics = engine.statistics()
    assert sequencer.finished
    assert sorted(seen) == list(range(6))
    assert sorted(step.index for step in steps) == list(range(6))
    assert statistics.versions == (6, 6)
    # A batch's index in the script is the order of taking, so the ages are comparable one by one.
    assert {step.index: step.staleness for step in steps} == staleness_by_counting(script)


def test_an_impossible_script_fails_by_name() -> None:
    tiny = TINY["mlp"]
    model = tiny.seeded_model()
    sequencer = Sequencer([(0, W, 0), (0, R, 0)], patience_s=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(TimeoutError, match=r"\(0, 'read', 0\) waited for \(0, 'write', 0\)"),
        ap.Engine(model, optimizer, cross_entropy, turn=sequencer) as engine,
    ):
        list(engine.run(tiny.batches(2)))


def test_a_script_names_each_event_once() -> None:
    with pytest.raises(ValueError, match="script must name each event once"):
        Sequencer([(0, R, 0), (0, R, 0)])


def test_no_batch_is_taken_before_a_lane_is_free_for_it() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken: list[int] = []
    seen: list[int] = []

    class Looks(Sequencer):
        """Notes how many batches have been taken when the first of two passes in flight writes."""

        def at(self, batch, event, layer):
            if event == "write" and batch == 0:
                seen.append(len(taken))
            return super().at(batch, event, layer)

    def loader():
        for number, batch in enumerate(TINY["mlp"].batches(8)):
            taken.append(number)
            yield batch

    turn = Looks([(0, "write", 0), (1, "write", 1)])  # the second pass writes nothing before the first is done
    with ap.Engine(model, optimizer, cross_entropy, workers=ap.Decoupled(3, 2, lanes=2), turn=turn) as engine:
        list(engine.run(loader()))
    assert turn.finished
    assert max(seen) <= 2
