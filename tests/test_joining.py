"""Joining: a rank that takes over the training from others, as it is new, or as they went on before it had trained."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from asyncprop.checkpoint import Position
from asyncprop.config import TrainConfig
from asyncprop.exchange import Members, World
from asyncprop.exchange.attendance import set_key
from asyncprop.methods.session import Session
from asyncprop.methods.train import Interrupted, Left, _end_if_asked, train
from asyncprop.progress import Quiet
from asyncprop.runs import create_run, take_over
from asyncprop.trace import Step
from gossip_world import at_once
from processes import rows


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"task": "digits", "epochs": 2, "train_samples": 320, "test_samples": 100, **options})


def test_phases_and_delays_of_one_that_joins_are_counted_from_the_start_of_the_run() -> None:
    given = config(method="lppsgd", exchange="gossip", prepass_epochs=2, delay="seconds=2,every=3")
    begun = {"name": "run", "shares_opened": 3, "position": vars(Position(epoch=1, batch=4, steps=14))}
    world = World()
    world.rank, world.size = 2, 2
    world.members = SimpleNamespace(joins=True, offers={}, among=(0, 1), ask=lambda: {"session": begun})
    session = Session(given, None, world)
    session.join()
    trainer: Any = session.trainer
    assert trainer._lanes._partition.warm_up_batches == 3  # of the ten batches of a rank in two epochs
    (delay,) = trainer._delays._delays
    assert delay.steps_before == 7


class Local(World):
    """A world of two ranks that are threads of this process."""

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(tolerant=True)
        self.rank, self.size, self._shared = rank, 2, store

    def _open_members(self) -> None:
        self._store = PrefixStore("counters", self._shared)
        self.members = Members(PrefixStore("members", self._shared), self.size, self.rank, timeout_s=60.0)
        self.members.open()


class Joins(Quiet):
    """Counts how often this rank has joined others."""

    count = 0

    def on_join(self, session: Session) -> None:
        self.count += 1


class Holds(Quiet):
    """Holds the training up at each step until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def on_step(self, session: Session, step: Step) -> None:
        assert self.may_go_on.wait(60.0), "nobody joins"


def freeze(frozen: Members, other: Members, key: str) -> None:
    """Let a rank be stopped until the other has taken it for dead, and met without it, for as long as that takes."""
    other._gone.add(frozen.rank)
    other._mark(frozen.rank, alive=False)
    end = time.monotonic() + 60.0
    while not frozen.board.has(key):
        assert time.monotonic() < end, "the other waits for it"
    other._gone.discard(frozen.rank)


def once_before(session: Session, name: str, happens: Callable[[], None]) -> None:
    """Let something happen before a session's method is called for the first time."""
    method = getattr(session, name)

    def call(*arguments: Any) -> Any:
        setattr(session, name, method)
        happens()
        return method(*arguments)

    setattr(session, name, call)


@pytest.mark.parametrize(
    ("before", "meeting"),
    [("save", lambda members: set_key(0, members._turn + 1)), ("measure_limit", lambda members: set_key(1, 0))],
)
def test_a_rank_that_hangs_before_it_has_trained_joins_those_that_went_on(
    tmp_path: Path, before: str, meeting: Callable[[Members], str]
) -> None:
    """In the first save; and in the meeting that begins the exchange, which comes after the limit was measured."""
    given, observer, joins = config(method="layup"), Holds(), Joins()
    worlds = [Local(store, rank) for store in [HashStore()] for rank in range(2)]

    def stay() -> dict[str, Any]:
        with worlds[0] as world, create_run(tmp_path / "run", given) as run:
            return train(Session(given, None, world), run, observer)

    def hang() -> dict[str, Any]:
        with worlds[1] as world:
            session, frozen, other = Session(given, None, world), world.members, worlds[0].members
            assert frozen
            assert other
            once_before(session, before, lambda: freeze(frozen, other, meeting(frozen)))
            join = session.join
            session.join = lambda: (join(), observer.may_go_on.set())[0]
            try:
                return train(session, None, joins)
            finally:
                observer.may_go_on.set()

    first, second = at_once(stay, hang)
    assert joins.count == 1
    assert first["ranks"] == second["ranks"] == 2
    assert first["history"][-1]["test_metric"] == second["history"][-1]["test_metric"]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(20))


@pytest.mark.parametrize("guest", [0, 1])
def test_a_guest_leaves_at_a_meeting_and_nothing_is_lost_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, guest: int
) -> None:
    """Also if it has become the first, which writes the run's folder."""
    given, path = config(method="layup"), tmp_path / "run"
    worlds = [Local(store, rank) for store in [HashStore()] for rank in range(2)]
    worlds[guest].is_guest = True

    def work(rank: int) -> dict[str, Any]:
        with worlds[rank] as world, ExitStack() as stack:
            run = stack.enter_context(create_run(path, given)) if rank == 0 else None
            becomes_first = lambda: stack.enter_context(take_over(path, given))  # noqa: E731
            try:
                return train(Session(given, None, world), run, Quiet(), lambda: rank == guest, becomes_first)
            except Left:
                assert rank == guest
                assert world.members
                world.members.close()
                return {}

    with caplog.at_level(logging.WARNING, "asyncprop"):
        results = at_once(*(lambda rank=rank: work(rank) for rank in range(2)))
    result = results[1 - guest]
    assert (results[guest], result["ranks"], result["ranks_lost"]) == ({}, 1, [])
    assert result["samples"] == 640
    assert [row["step"] for row in rows(path)] == list(range(20))
    assert f"rank {1 - guest}: rank {guest} leaves: going on without it" in caplog.messages


@pytest.mark.parametrize(
    ("is_guest", "others", "end", "is_saved"),
    [
        (True, [], Interrupted, True),
        (True, [False], Left, False),
        (True, [False, "leave"], Left, False),
        (True, ["leave"], Interrupted, True),
        (True, [False, "stop"], Interrupted, True),
        (False, [False, "leave"], Interrupted, True),
    ],
)
def test_all_end_if_any_but_a_guest_is_asked_to_or_nobody_would_be_left(
    is_guest: bool, others: list[Any], end: type[Interrupted], is_saved: bool
) -> None:
    saved: list[Any] = []
    world = SimpleNamespace(rank=0, is_guest=is_guest, gather=lambda own: [own, *enumerate(others, start=1)])
    session: Any = SimpleNamespace(world=world, save=saved.append)
    journal: Any = object()
    with pytest.raises(Interrupted) as raised:
        _end_if_asked(session, journal, is_asked=True)
    assert raised.type is end
    assert saved == [journal] * is_saved
