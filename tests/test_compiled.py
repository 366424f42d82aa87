"""Modules compiled by torch.compile: each lane is compiled before passes run at once. (No C++ compiler is needed.)"""

from typing import Any

import pytest
import torch

import asyncprop as ap
from asyncprop.engine.compiled import Warmer
from asyncprop.engine.feed import Feed
from asyncprop.testing import TINY, cross_entropy, plain_loop, same_state, twins

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_in_lockstep_equals_the_plain_loop(backend: str) -> None:
    ours, theirs = twins(TINY["mlp"].seeded_model())
    batches = TINY["mlp"].batches(6)
    compiled, plain = torch.compile(ours, backend=backend), torch.compile(theirs, backend=backend)
    with ap.Engine(compiled, sgd(compiled), cross_entropy, turn="lockstep") as engine:
        losses = [step.loss for step in engine.run(batches)]
    assert losses == plain_loop(plain, sgd(plain), batches)
    assert same_state(ours.state_dict(), theirs.state_dict())


def test_every_lane_is_compiled_once_and_alone() -> None:
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    model = torch.compile(TINY["mlp"].seeded_model(), backend=backend)
    with ap.Engine(model, sgd(model), cross_entropy, workers=ap.Decoupled(1, 2, lanes=3)) as engine:
        steps = list(engine.run(TINY["mlp"].batches(12)))
        compiled = len(calls)
        list(engine.run(TINY["mlp"].batches(12)))
    assert len(steps) == 12
    assert len(calls) == compiled


def test_lanes_that_are_made_anew_are_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lane:
        def __init__(self, name: str) -> None:
            self.name = name

    compiled: list[str] = []
    monkeypatch.setattr(Warmer, "_run", lambda self, lane, batch: compiled.append(lane.name))
    lanes: Any = [Lane("first"), Lane("second")]
    nobody: Any = None
    warmer, feed = Warmer(nobody, lanes), Feed(lambda batch: None)
    small, large = torch.ones(2), torch.ones(3)
    for batch in (small, small, large, small):
        warmer.prepare(batch, feed)
    assert compiled == ["first", "second"] * 2
    lanes[:] = [Lane("third"), lanes[1]]
    assert len(warmer._warm) == 1  # what lies where the first lay is not taken for it
    warmer.prepare(small, feed)
    assert compiled == ["first", "second"] * 2 + ["third"]
