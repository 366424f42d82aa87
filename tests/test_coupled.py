"""Coupled workers on a scripted schedule, against slow sequential twins: Hogwild!, private state, corrections."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncprop as ap
from asyncprop.engine import Correction
from asyncprop.testing import TINY, Sequencer, cross_entropy, plain_loop, same_state, twins

PAIRS = 4
TASK = TINY["mlp"]


def in_pairs(layers: int) -> list[tuple[int, Any, int]]:
    """Both passes of a pair read all layers before the first, then the second, writes: every second is one stale."""
    script: list[tuple[int, Any, int]] = []
    for first in range(0, 2 * PAIRS, 2):
        script += [(batch, "read", layer) for batch in (first, first + 1) for layer in range(layers)]
        script += [(batch, "write", 0) for batch in (first, first + 1)]
    return script


class BothReady(Sequencer):
    """Lets no pass of a pair write before the gradients of both are ready: a backward pass uses the newest weights."""

    def __init__(self, script: Any) -> None:
        super().__init__(script)
        self._ready = [threading.Event() for _ in range(2 * PAIRS)]

    def at(self, batch: int, event: Any, layer: int) -> Any:
        if event == "write":
            self._ready[batch].set()
            assert self._ready[batch ^ 1].wait(30)
        return super().at(batch, event, layer)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)


def scripted(update: ap.BlockUpdate) -> tuple[nn.Module, list[ap.Step]]:
    model = TASK.seeded_model()
    turn = BothReady(in_pairs(2))
    with ap.Engine(
        model, sgd(model.parameters()), cross_entropy, workers=ap.Coupled(2), update=update, turn=turn
    ) as engine:
        steps = sorted(engine.run(TASK.batches(2 * PAIRS)), key=lambda step: step.index)
    assert turn.finished
    return model, steps


def gradients(model: nn.Module, batch: Any) -> list[Tensor]:
    return list(torch.autograd.grad(cross_entropy(model, batch), list(model.parameters())))


def twin(lanes: list[int], *, private: bool, compensation: Correction | None = None) -> nn.Module:
    """Compute each pair's gradients at the same parameters, then apply one after the other."""
    model = TASK.seeded_model()
    parameters = list(model.parameters())
    optimizers = [sgd(parameters) for _ in range(2)] if private else [sgd(parameters)] * 2
    mean_squares = [torch.zeros_like(p) for p in parameters]
    batches = TASK.batches(2 * PAIRS)
    for first in range(0, 2 * PAIRS, 2):
        read = copy.deepcopy(parameters)
        pair = [gradients(model, batches[first]), gradients(model, batches[first + 1])]
        for batch, found in zip((first, first + 1), pair, strict=True):
            for p, old, g, ms in zip(parameters, read, found, mean_squares, strict=True):
                if isinstance(compensation, ap.Attenuation):
                    g = g / (1 + batch % 2) ** compensation.power  # the second of a pair is stale by the first
                elif compensation and compensation.adaptive:
                    ms.copy_(compensation.decay * ms + (1 - compensation.decay) * g * g)
                    g = g + 2 / torch.sqrt(ms + 1e-7) * g * g * (p.detach() - old.detach())
                elif compensation:
                    g = g + compensation.coefficient * g * g * (p.detach() - old.detach())
                p.grad = g
            optimizers[lanes[batch]].step()
    return model


@pytest.mark.parametrize("state", ["shared", "private"])
def test_hogwild_equals_its_twin(state: Any) -> None:
    model, steps = scripted(ap.BlockUpdate(state=state))
    assert [step.staleness for step in steps] == [(0, 0), (1, 1)] * PAIRS
    assert same_state(model.state_dict(), twin([s.lane for s in steps], private=state == "private").state_dict())


@pytest.mark.parametrize("compensation", [ap.Compensation(0.3), ap.Compensation(adaptive=True), ap.Attenuation(0.5)])
def test_a_correction_equals_its_twin(compensation: Correction) -> None:
    model, steps = scripted(ap.BlockUpdate(compensate=compensation))
    expected = twin([s.lane for s in steps], private=False, compensation=compensation)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    without = twin([s.lane for s in steps], private=False)
    assert not all(torch.allclose(a, b) for a, b in zip(model.parameters(), without.parameters(), strict=True))


@pytest.mark.parametrize("update", [ap.LayerUpdate, ap.BlockUpdate])
@pytest.mark.parametrize("workers", [ap.Coupled(1), ap.Decoupled(1, 1, lanes=1)])
@pytest.mark.parametrize("task", TINY)
def test_what_is_not_stale_is_not_corrected(task: str, workers: Any, update: Any) -> None:
    losses = []
    for compensation in (None, ap.Compensation(adaptive=True), ap.Attenuation()):
        model = TINY[task].seeded_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with ap.Engine(
            model, optimizer, cross_entropy, workers=workers, update=update(compensate=compensation), telemetry=False
        ) as engine:
            losses.append([step.loss for step in engine.run(TINY[task].batches(6))])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("telemetry", [True, False])
def test_attenuation_knows_each_layer_s_staleness(telemetry: bool) -> None:
    """Both passes read all; the first writes layer 1 first, the second layer 0: each has one stale layer."""
    turns = [(0, "read", 0), (0, "read", 1), (1, "read", 0), (1, "read", 1)]
    turns += [(0, "write", 1), (1, "write", 1), (1, "write", 0), (0, "write", 0)]
    model, theirs = twins(TASK.seeded_model())
    batches = TASK.batches(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = ap.LayerUpdate(compensate=ap.Attenuation())
    with ap.Engine(
        model, optimizer, cross_entropy, workers=ap.Coupled(2), update=update, telemetry=telemetry,
        turn=BothReady(turns),
    ) as engine:  # fmt: skip
        list(engine.run(batches))
    first, second = gradients(theirs, batches[0]), gradients(theirs, batches[1])
    shares = {0: (0.5, 1.0), 1: (1.0, 0.5)}  # of the two gradients, by layer
    for number, (p, one, other) in enumerate(zip(theirs.parameters(), first, second, strict=True)):
        a, b = shares[number // 2]
        p.data -= 0.1 * (a * one + b * other)
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"coefficient": -1.0}, "coefficient must be"), ({"decay": 1.0}, "decay must be")],
)
def test_compensation_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ap.Compensation(**options)
    with pytest.raises(ValueError, match="power must be"):
        ap.Attenuation(-1.0)


def test_private_state_goes_through_a_state_dict() -> None:
    batches = TASK.batches(12)

    def engine_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> ap.Engine:
        turn = Sequencer([(batch, event, 0) for batch in range(6) for event in ("read", "write")])
        update = ap.BlockUpdate(state="private", compensate=ap.Compensation(adaptive=True))
        return ap.Engine(model, optimizer, cross_entropy, workers=ap.Coupled(2), update=update, turn=turn)

    model = TASK.seeded_model()
    optimizer = sgd(model.parameters())
    with engine_on(model, optimizer) as engine:
        list(engine.run(batches[:6]))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), engine.state_dict()))
    assert saved[2]["private"][0].keys() == dict(model.named_parameters()).keys()
    (other,) = twins(model, 1)
    other.load_state_dict(saved[0])
    other_optimizer = sgd(other.parameters())
    other_optimizer.load_state_dict(saved[1])
    with engine_on(other, other_optimizer) as engine:
        engine.load_state_dict(saved[2])
        assert same_state(engine.state_dict(), saved[2])
        kept = copy.deepcopy(saved[2])
        list(engine.run(batches[6:]))
        assert not same_state(engine.state_dict()["mean_squares"], kept["mean_squares"])
        assert same_state(saved[2], kept)
    with pytest.raises(ValueError, match="as many lanes"):
        ap.Engine(
            other, other_optimizer, cross_entropy, workers=ap.Coupled(3), update=ap.BlockUpdate(state="private")
        ).load_state_dict(saved[2])


@pytest.mark.parametrize("partition", [None, ap.Partition(alternate=True), ap.Partition()])
@pytest.mark.parametrize("task", TINY)
def test_one_worker_of_any_kind_equals_the_plain_loop(task: str, partition: ap.Partition | None) -> None:
    ours, theirs = twins(TINY[task].seeded_model())
    batches = TINY[task].batches(8)
    optimizer, other = sgd(ours.parameters()), sgd(theirs.parameters())
    workers, update = ap.Coupled(1, intraop_threads=1), ap.BlockUpdate(state="private", compensate=ap.Compensation())
    with ap.Engine(ours, optimizer, cross_entropy, workers=workers, update=update, partition=partition) as engine:
        losses = [step.loss for step in engine.run(batches)]
    assert losses == plain_loop(theirs, other, batches)
    assert same_state(ours.state_dict(), theirs.state_dict())
    assert same_state(optimizer.state_dict(), other.state_dict())
