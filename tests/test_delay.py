"""Delay: reproducible seconds, the right worker, and waits that end with the engine."""

import threading
from dataclasses import replace
from statistics import fmean

import pytest
import torch

import asyncprop as ap
from asyncprop.clock import Clock
from asyncprop.config import TrainConfig
from asyncprop.delay import Delay, Delays, parse_delays
from asyncprop.methods import trainer
from asyncprop.methods.trainer import Extent, open_trainer
from asyncprop.testing import TINY, cross_entropy


class Waiting(Clock):
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> float:
        return 100.0 + sum(self.waits)

    def sleep(self, seconds, stopping) -> None:
        self.waits.append(round(seconds, 9))


def test_seconds_are_drawn_from_the_seed() -> None:
    drawn = Delay(seconds=0.5, distribution="exponential", seed=3)
    seconds = [drawn.seconds_of(step, rank=1) for step in range(4000)]
    assert seconds == [drawn.seconds_of(step, rank=1) for step in range(4000)]
    assert seconds[:9] != [drawn.seconds_of(step, rank=0) for step in range(9)]
    assert fmean(seconds) == pytest.approx(0.5, rel=0.1)
    assert [Delay(seconds=2, every=3).seconds_of(step, 0) for step in range(6)] == [0, 0, 2, 0, 0, 2]


def test_a_run_that_goes_on_is_delayed_as_one_that_was_never_stopped() -> None:
    for whole in (Delay(seconds=2, every=3), Delay(seconds=0.5, distribution="exponential", seed=3)):
        rest = replace(whole, steps_before=4)
        assert [rest.seconds_of(step, 1) for step in range(5)] == [whole.seconds_of(step, 1) for step in range(4, 9)]


def test_a_slow_machine_waits_for_all_its_workers() -> None:
    clock = Waiting()
    delays = Delays([Delay(rank=1, seconds=3.0)], 1, clock=clock)
    delays.after_forward(0, 0, 0.1)
    delays.after_forward(1, 1, 0.1)
    delays.before_pass()
    assert clock.waits == [3.0, 3.0]
    assert not Delays([Delay(rank=1, seconds=3.0)], 0)


def test_a_slow_worker_waits_alone() -> None:
    clock = Waiting()
    delays = Delays([Delay(worker=1, factor=4.0)], 0, clock=clock)
    delays.after_forward(0, 0, 0.1)
    assert clock.waits == []
    delays.after_forward(1, 0, 0.1)
    delays.after_backward(1, 0.2)
    delays.before_pass()
    assert clock.waits == [0.3, 0.6]


def test_as_the_command_has_them() -> None:
    assert parse_delays("rank=1, seconds=0.5; worker=0,factor=2,every=3") == (
        Delay(rank=1, seconds=0.5), Delay(worker=0, factor=2.0, every=3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slow", "delay must be like"),
        ("colour=1", "delay must be like"),
        ("seconds=x", "seconds must be a number"),
        ("seconds=-1", "seconds must be a number >= 0"),
        ("factor=0.5", "factor must be a number >= 1"),
        ("every=0", "every must be >= 1"),
        ("distribution=normal", "distribution must be"),
    ],
)
def test_what_is_no_delay(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_delays(text)


@pytest.mark.parametrize("method", ["ddp", "post-local-sgd", "decent-dp"])
@pytest.mark.parametrize("delay", ["factor=3", "worker=0,factor=3", "rank=0,factor=2;rank=1,factor=3"])
def test_a_factor_that_would_multiply_waits_for_other_ranks_is_refused(method: str, delay: str) -> None:
    model = TINY["mlp"].seeded_model()
    options = TrainConfig(task="digits", method=method, delay=delay)
    message = rf"delay: factor must slow one named rank, .* for method {method}, .* \(got factor=3\): name it"
    with pytest.raises(ValueError, match=message):
        open_trainer(
            options, method, model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, extent=Extent(4, 1, 2)
        )


@pytest.mark.parametrize("delay", [None, "rank=1,factor=3", "seconds=0.5", "rank=0,seconds=1;rank=1,seconds=2"])
def test_other_delays_of_ranks_in_step_are_not(delay: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Delays] = []
    monkeypatch.setattr(trainer, "DdpLoop", lambda *given, delays, **options: made.append(delays))
    model = TINY["mlp"].seeded_model()
    options = TrainConfig(task="digits", method="ddp", delay=delay)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    open_trainer(options, "ddp", model, optimizer, cross_entropy, extent=Extent(4, 1, 2))
    assert len(made) == 1


def test_a_factor_of_one_rank_alone_needs_no_name() -> None:
    model = TINY["mlp"].seeded_model()
    options = TrainConfig(task="digits", method="ddp", delay="factor=3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert open_trainer(options, "ddp", model, optimizer, cross_entropy, extent=Extent(4, 1))


def test_an_engine_that_fails_does_not_wait_for_its_delays() -> None:
    model = TINY["mlp"].seeded_model()
    first = threading.Event()

    def loss(lane: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if first.is_set():
            raise RuntimeError("the second pass fails")
        first.set()
        return cross_entropy(lane, batch)

    engine = ap.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss, workers=ap.Coupled(2),
        delays=[Delay(worker=0, seconds=3600.0), Delay(worker=1, seconds=3600.0)],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="second pass"), engine:
        list(engine.run(TINY["mlp"].batches(4)))
