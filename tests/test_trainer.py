"""Trainer: what a method does in phases, in a run from its start and in one that goes on."""

from typing import Any

import pytest
import torch

from asyncprop.config import Options
from asyncprop.methods import trainer
from asyncprop.methods.trainer import Extent, open_trainer
from asyncprop.testing import TINY, cross_entropy


def opened(method: str, extent: Extent, **options: Any) -> Any:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return open_trainer(Options(**options), method, model, optimizer, cross_entropy, extent=extent)


def test_phases_are_counted_from_the_start_of_the_run() -> None:
    assert [Extent(10, 4, done=done).left(1.5) for done in (0, 7, 15, 22)] == [15, 8, 0, 0]
    assert [Extent(11, 4, ranks=2, done=done).left(2) for done in (0, 10, 12)] == [11, 1, 0]


@pytest.mark.parametrize(("done", "left"), [(0, 20), (15, 5), (20, 0), (33, 0)])
@pytest.mark.parametrize("method", ["passm", "lppsgd"])
def test_what_is_left_of_a_prepass_is_trained_whole(method: str, done: int, left: int) -> None:
    engine = opened(method, Extent(10, 4, done=done), prepass_epochs=2)
    assert engine._lanes._partition.warm_up_batches == left


@pytest.mark.parametrize(("done", "left"), [(0, 10), (7, 3), (10, 0), (18, 0)])
@pytest.mark.parametrize("method", ["lapsgd", "lppsgd", "async-lu"])
def test_what_is_left_of_the_first_half_is_averaged_as_often_as_can_be(method: str, done: int, left: int) -> None:
    engine = opened(method, Extent(10, 4, ranks=2, done=done))
    assert engine.exchange._dense_batches == left


@pytest.mark.parametrize(("done", "left"), [(0, 5), (2, 3), (5, 0), (18, 0)])
def test_what_is_left_of_a_prepass_is_trained_in_step(monkeypatch: pytest.MonkeyPatch, done: int, left: int) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(trainer, "PostLocalSgdLoop", lambda *_, **options: made.update(options))
    opened("post-local-sgd", Extent(10, 4, ranks=2, done=done), prepass_epochs=1)
    assert made["warm_up_batches"] == left


@pytest.mark.parametrize("method", ["sgd", "async-lu"])
def test_delays_go_on_where_they_were(method: str) -> None:
    made = opened(method, Extent(10, 4, done=7), delay="seconds=2,every=3")
    (delay,) = made._delays._delays
    assert [delay.seconds_of(step, 0) for step in range(3)] == [0.0, 2.0, 0.0]  # the run's 8th, 9th and 10th step
