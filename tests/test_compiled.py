"""Modules compiled by torch.compile: each lane is compiled before passes run at once. (No C++ compiler is needed.)"""

import pytest
import torch

import asyncprop as ap
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
