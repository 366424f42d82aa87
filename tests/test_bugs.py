"""Regressions, each with its cause."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import asyncprop as ap
from asyncprop.engine.feed import Feed
from asyncprop.engine.lanes import Lanes
from asyncprop.engine.optimizer import OptimizerView
from asyncprop.exchange.world import World
from asyncprop.loggers import Logged
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.testing import TINY, cross_entropy
from asyncprop.trace import Step


def test_a_scheduler_that_steps_during_a_step_is_not_taken_for_the_optimizer_writing_its_groups() -> None:
    # Cause: what the optimizer left in its group was compared with the user's group after the step, not before it, so
    # a learning rate set by the caller's thread in between ended training.
    model = TINY["mlp"].seeded_model()

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            user.param_groups[0]["lr"] = 0.25  # as another thread might, just now
            super().step(closure)

    user = Slow(model.parameters(), lr=0.5)
    leaves = [(parameter, parameter) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    OptimizerView(user, leaves[:2], whole=False).step()
    assert user.param_groups[0]["lr"] == 0.25


def test_a_failure_at_the_instant_at_which_another_batch_finishes_ends_everything_all_the_same() -> None:
    # Cause: `fail` set an exception on a future that another thread had just given its result; InvalidStateError
    # left `fail`, and nobody else was woken.
    feed = Feed(lambda batch: None)
    first, second = feed.submit("a", room=3), feed.submit("b", room=3)
    work = feed.take()
    assert work.future is first
    first.set_result(Step(0, 0.0, 1))  # as `finish` does, just before it takes the batch off the list
    feed.fail(ArithmeticError("the first error"))
    assert isinstance(second.exception(), ArithmeticError)


def test_leaving_a_loop_as_a_thread_is_about_to_enter_the_loader_is_no_error() -> None:
    # Cause: between the thread's turn and its entry the loader was forgotten, and an assertion ended training.
    feed = Feed(lambda batch: None)
    feed.start(iter([1]), lead=1)
    assert feed._take_submitted() is None  # now it is the loader's turn
    feed._iterator = None  # as `leave` does
    assert feed._take_from_loader() is None
    assert feed.idle


def test_a_rank_that_becomes_the_first_has_no_logger_and_goes_on() -> None:
    # Cause: an assertion in `on_epoch` ended the rank that took the run's folder over, and then the next.
    def never(run: Any) -> Any:
        raise AssertionError

    Logged(never).on_epoch(None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("exchange", [None, ap.Averaging()])
def test_with_one_lane_layers_are_stepped_one_by_one_where_an_exchange_looks_on(exchange: Any) -> None:
    # Cause: stepping once a pass, which nobody could tell, made all layers land at once, and gossip leave in a burst.
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ap.Engine(model, optimizer, cross_entropy, workers=ap.Coupled(1), exchange=exchange) as engine:
        list(engine.run(TINY["mlp"].batches(1)))
        lanes: Lanes = engine._lanes
        assert [unit.unit.at_once for unit in lanes.steppers[0].units] == ([True, True] if exchange else [False])


def test_the_plain_loop_reports_the_layers_that_an_engine_does() -> None:
    # Cause: it counted modules, of which norms are layers no more.
    model = TINY["resnet"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ap.Engine(model, optimizer, cross_entropy) as engine:
        assert engine.statistics().layers == SequentialLoop(model, optimizer, cross_entropy).statistics().layers


def test_a_group_is_destroyed_when_nothing_holds_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cause: a DistributedDataParallel in a cycle kept the group beyond its destruction. Its threads then came to let go
    # of tensors while Python was ending, which aborted one process in ten, after all its work was done.
    class Holder:
        def __init__(self) -> None:
            self.itself = self

    monkeypatch.setenv("WORLD_SIZE", "2")
    left: list[Holder | None] = []
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append(holder()))
    gc.disable()
    try:
        holder = weakref.ref(Holder())
        World().__exit__(None, None, None)
    finally:
        gc.enable()
    assert left == [None]
