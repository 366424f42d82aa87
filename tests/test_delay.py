"""Delay: reproducible seconds, the right worker, and waits that end with the engine."""

import threading
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch.distributed import HashStore

import asyncprop as ap
from asyncprop.clock import Clock
from asyncprop.config import SimulateConfig, TrainConfig
from asyncprop.delay import Delay, Delays, parse_delays
from asyncprop.exchange import Members
from asyncprop.methods import trainer
from asyncprop.methods.trainer import Extent, open_trainer
from asyncprop.simulate.session import SimulatedSession
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
        ("rank=-1", "rank must be >= 0 .got -1."),
        ("worker=-2", "worker must be >= 0 .got -2."),
        ("distribution=normal", "distribution must be"),
        ("", "delay must be like"),
        ("rank=0", r"delay must give seconds or factor, by which it slows \(got rank=0\)"),
        ("seconds=1;rank=1,every=2", r"delay must give seconds or factor, .* \(got rank=1,every=2\)"),
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


def test_an_empty_delay_is_refused_where_it_is_used() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="delay must be like"):
        open_trainer(TrainConfig(task="digits", delay=""), "sgd", model, optimizer, cross_entropy, extent=Extent(4, 1))


def test_a_factor_of_one_rank_alone_needs_no_name() -> None:
    model = TINY["mlp"].seeded_model()
    options = TrainConfig(task="digits", method="ddp", delay="factor=3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert open_trainer(options, "ddp", model, optimizer, cross_entropy, extent=Extent(4, 1))


@pytest.mark.parametrize("method", ["ddp", "lapsgd"])
def test_a_delay_of_a_rank_that_there_is_not_is_refused(method: str) -> None:
    model = TINY["mlp"].seeded_model()
    options = TrainConfig(task="digits", method=method, delay="rank=1,seconds=1;rank=2,seconds=1")
    with pytest.raises(ValueError, match=r"delay: rank must be < 2, the number of ranks, .* \(got 2\)"):
        open_trainer(
            options, method, model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, extent=Extent(4, 1, 2)
        )


def test_a_rank_that_may_join_can_be_slowed() -> None:
    members = Members(HashStore(), 2, 0)
    model = TINY["mlp"].seeded_model()
    options = TrainConfig(task="digits", method="layup", delay="rank=2,seconds=1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert open_trainer(options, "layup", model, optimizer, cross_entropy, extent=Extent(4, 1, 2), members=members)


@pytest.mark.parametrize(
    ("workers", "turn", "count"),
    [(ap.Coupled(2), "free", 2), (ap.Decoupled(1, 2), "free", 3), (ap.Decoupled(1, 2), "lockstep", 1)],
)
def test_a_delay_of_a_worker_that_there_is_not_is_refused(workers, turn, count: int) -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = {"workers": workers, "turn": turn}
    assert ap.Engine(model, optimizer, cross_entropy, **made, delays=[Delay(worker=count - 1, seconds=1)])
    message = rf"delay: worker must be < {count}, the number of workers, .* \(got {count}\)"
    with pytest.raises(ValueError, match=message):
        ap.Engine(model, optimizer, cross_entropy, **made, delays=[Delay(worker=count, seconds=1)])


@pytest.mark.parametrize(
    ("method", "delay", "message"),
    [
        ("sgd", "rank=1,seconds=1", "rank must be < 1"),
        ("sgd", "worker=1,seconds=1", "worker must be < 1"),
        ("ddp", "rank=3,seconds=1", "rank must be < 3"),
        ("ddp", "worker=1,seconds=1", "worker must be < 1"),
        ("layup", "rank=3,seconds=1", "rank must be < 3"),
        ("async-lu", "rank=1,seconds=1", "rank must be < 1"),
        ("async-lu", "worker=3,seconds=1", "worker must be < 3"),
    ],
)
def test_a_simulation_refuses_them_too(method: str, delay: str, message: str) -> None:
    """Three devices: a replica on each, or, for async-lu, three threads of one."""
    with pytest.raises(ValueError, match=f"delay: {message}"):
        SimulatedSession(SimulateConfig(task="digits", method=method, delay=delay))


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
