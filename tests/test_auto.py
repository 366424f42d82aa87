"""Auto: a plan on the first batches chooses threads and lanes, and nothing else is different."""

from pathlib import Path
from typing import Any

import pytest
import torch

import asyncprop as ap
from asyncprop.config import TrainConfig
from asyncprop.engine import auto
from asyncprop.engine.workers import Decoupled
from asyncprop.methods.session import Session
from asyncprop.methods.train import train
from asyncprop.progress import Quiet
from asyncprop.runs import create_run
from asyncprop.simulate import planning
from asyncprop.testing import TINY, FakeDevice, cross_entropy, plain_loop, same_state, twins

CHOSEN = Decoupled(1, 2, lanes=3, intraop_threads=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let every plan advise CHOSEN, and tell on which batches it was made."""
    made: list[Any] = []

    def plan(model: Any, loss_fn: Any, batches: Any, *others: Any) -> Decoupled:
        made.append(batches)
        return CHOSEN

    monkeypatch.setattr(planning, "plan_decoupled", plan)
    return made


def engine_of(model: torch.nn.Module, **options: Any) -> ap.Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ap.Engine(model, optimizer, cross_entropy, **{"workers": Decoupled("auto"), **options})


def test_the_first_batches_are_planned_with_and_then_trained_on(calls: list[Any]) -> None:
    batches = TINY["mlp"].batches(9)
    with engine_of(TINY["mlp"].seeded_model()) as engine:
        assert engine.statistics().threads == ()
        assert sorted(step.index for step in engine.run(iter(batches))) == list(range(9))
        assert len(list(engine.run(batches))) == 9
        assert engine.statistics().lanes == 3
        assert len(engine.statistics().threads) == 3
    assert [len(first) for first in calls] == [auto.BATCHES]
    assert calls[0] == batches[: auto.BATCHES]


def test_submitted_batches_are_planned_with(calls: list[Any]) -> None:
    (batch,) = TINY["mlp"].batches(1)
    with engine_of(TINY["mlp"].seeded_model()) as engine:
        assert engine.submit(batch).result().index == 0
    assert calls == [[batch]]


def test_a_loader_without_batches_chooses_nothing(calls: list[Any]) -> None:
    with engine_of(TINY["mlp"].seeded_model()) as engine:
        assert list(engine.run([])) == []
        engine.drain()
        assert len(list(engine.run(TINY["mlp"].batches(2)))) == 2
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["resnet", "lstm"])
def test_measuring_leaves_no_trace_in_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real plan, of which one lane is taken, training is the plain loop bit for bit."""
    real = planning.plan_decoupled

    def plan(*given: Any) -> Decoupled:
        chosen = real(*given)
        assert chosen.lanes
        assert not chosen.auto
        return Decoupled(1, 1, lanes=1, intraop_threads=torch.get_num_threads())

    monkeypatch.setattr(planning, "plan_decoupled", plan)
    monkeypatch.setattr(auto, "PASSES", 4)
    ours, theirs = twins(TINY[name].seeded_model())
    batches = TINY[name].batches(5)
    random = torch.get_rng_state()
    with engine_of(ours) as engine:
        losses = [step.loss for step in engine.run(batches)]
    assert torch.equal(random, torch.get_rng_state())
    assert losses == plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), batches)
    assert same_state(ours.state_dict(), theirs.state_dict())


def test_what_was_chosen_is_kept_for_resuming(calls: list[Any]) -> None:
    with engine_of(TINY["mlp"].seeded_model()) as engine:
        assert engine.state_dict() == {}
        list(engine.run(TINY["mlp"].batches(2)))
        state = engine.state_dict()
    assert state == {"workers": {"forward": 1, "backward": 2, "lanes": 3, "intraop_threads": 1}}
    resumed = engine_of(TINY["mlp"].seeded_model())
    resumed.load_state_dict(state)
    with resumed:
        assert len(list(resumed.run(TINY["mlp"].batches(5)))) == 5
        assert resumed.statistics().lanes == 3
    assert len(calls) == 1


def test_lockstep_needs_no_plan(calls: list[Any]) -> None:
    with engine_of(TINY["mlp"].seeded_model(), turn="lockstep") as engine:
        assert len(list(engine.run(TINY["mlp"].batches(3)))) == 3
    assert calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turn": ap.Ordered()}, "with a turn"),
        ({"device": FakeDevice()}, "with a GPU"),
        ({"partition": ap.Partition()}, "with a partition"),
        ({"update": ap.LayerUpdate(state="private")}, "with private state"),
    ],
)
def test_what_must_know_the_lanes_beforehand_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"forward must be a number, not 'auto', {message}"):
        engine_of(TINY["mlp"].seeded_model(), **options)


@pytest.mark.parametrize(("given", "message"), [(("auto", 3), "must be left out"), (("all",), "a number or 'auto'")])
def test_what_says_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoupled(*given)


def test_a_chosen_number_of_lanes_goes_with_the_state_of_a_correction(calls: list[Any]) -> None:
    update = ap.LayerUpdate(compensate=ap.Compensation(adaptive=True))
    assert engine_of(TINY["mlp"].seeded_model(), update=update).state_dict().keys() == {"mean_squares", "blocks"}
    with engine_of(TINY["mlp"].seeded_model(), update=update) as engine:
        list(engine.run(TINY["mlp"].batches(4)))
        state = engine.state_dict()
    for workers, lanes in ((Decoupled("auto"), 3), (Decoupled(2, 2, lanes=5), 5)):
        resumed = engine_of(TINY["mlp"].seeded_model(), update=update, workers=workers)
        resumed.load_state_dict(state)
        with resumed:
            assert len(list(resumed.run(TINY["mlp"].batches(5)))) == 5
            assert resumed.statistics().lanes == lanes
    assert len(calls) == 1


@pytest.mark.parametrize("compensation", [None, "constant", "adaptive", "attenuation"])
def test_the_command_plans_once_in_the_warm_up(calls: list[Any], tmp_path: Path, compensation: Any) -> None:
    options: Any = {"task": "digits", "epochs": 1, "train_samples": 320, "test_samples": 50}
    config = TrainConfig(**options, forward_threads="auto", compensation=compensation)
    session = Session(config)
    with create_run(tmp_path / "run", config) as run:
        result = train(session, run, Quiet())
    assert result["samples"] == 320
    assert session.trainer.statistics().lanes == 3
    resumed = Session(config, tmp_path / "run" / "checkpoint")
    resumed.warm_up()
    assert resumed.trainer.statistics().lanes == 3
    assert len(calls) == 1
