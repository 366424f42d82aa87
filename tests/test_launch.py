"""Launch: what the launcher makes of its ranks' ends, and of a request to end. The ranks are no processes here."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed.launcher.api as elastic
from torch.distributed import HashStore, PrefixStore
from torch.distributed.elastic.multiprocessing.api import SignalException

from asyncprop import launch
from asyncprop.exchange.board import Board
from asyncprop.exchange.world import MEMBERS

Moment = int | None | Callable[[], None]


class Rank:
    """A process as the launcher sees it: what each look at it finds, an exit code, nothing, or something that happens.

    Once it is asked to end it has ended: by the signal, or, if it `notes` signals, with the exit code that says so.
    """

    def __init__(self, *moments: Moment, notes: bool = False) -> None:
        self.moments, self.notes = list(moments), notes
        self.code: int | None = None
        self.heard: list[int] = []

    def poll(self) -> int | None:
        if self.code is None and self.moments:
            moment = self.moments.pop(0)
            found = moment() if callable(moment) else moment
            self.code = found if self.code is None else self.code
        return self.code

    def send_signal(self, number: int) -> None:
        self.heard.append(number)
        self.code = 128 + number if self.notes else -number


class Stopped(Rank):
    """One that has been stopped, and hears of nothing but its end."""

    def __init__(self) -> None:
        super().__init__(*[None] * 100, self.give_up)
        self.is_killed = False

    def send_signal(self, number: int) -> None:
        self.heard.append(number)

    def kill(self) -> None:
        self.is_killed = True

    @staticmethod
    def give_up() -> None:
        raise AssertionError("it is waited for")


class Store(HashStore):
    """Where ranks would meet."""

    port = 1

    def said_of(self, rank: int) -> Any:
        """Return what was said of the end of a rank."""
        return Board(PrefixStore(MEMBERS, self)).find(f"gone/{rank}")


def ask() -> None:
    signal.raise_signal(signal.SIGTERM)


class Started:
    """Notes what is started, and lets these ranks be it, one after the other."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *ranks: Rank, before: dict[int, Callable[[], None]], store: Store
    ) -> None:
        self.ranks, self.before = list(ranks), before
        self.commands: list[str] = []
        monkeypatch.setattr(launch, "POLL_S", 0.0)
        monkeypatch.setattr(launch, "_start", self.start)
        monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: store)

    def start(self, arguments: list[str], environment: dict[str, str]) -> Any:
        self.before.get(len(self.commands), lambda: None)()
        self.commands.append(" ".join(arguments))
        return self.ranks[len(self.commands) - 1]


JOIN = "train --join 127.0.0.1:1 --quiet"


def run(
    monkeypatch: pytest.MonkeyPatch,
    *ranks: Rank,
    number: int = 2,
    before: Any = None,
    store: Store | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """Launch so many ranks, and what replaces them; return what came of it, and what was started."""
    started = Started(monkeypatch, *ranks, before=before or {}, store=store or Store())
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    found = launch.launch_tolerant(number, ["train", "digits"], quiet=True, **options)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    return found, started.commands


def test_a_rank_that_was_killed_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, commands = run(monkeypatch, Rank(-9), Rank(None, None, 1), Rank(None, 0), replacements=1)
    assert found == (0, "")
    assert commands == ["train digits", "train digits", JOIN]
    assert capsys.readouterr().err == "asyncprop: rank 0 was ended by SIGKILL: the others go on\n"


def test_a_run_that_no_rank_finishes_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Rank(-9), Rank(None, 1)) == ((1, "no rank has finished the run"), ["train digits"] * 2)
    assert run(monkeypatch, Rank(None, -9), Rank(-9))[0] == (1, "no rank has finished the run")


@pytest.mark.parametrize("notes", [(False, False), (True, False), (True, True)])
def test_ranks_that_a_request_to_end_has_ended_are_not_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], notes: tuple[bool, bool]
) -> None:
    """As they are when it comes before they are ready to note it."""
    ranks = [Rank(None, ask, notes=notes[0]), Rank(notes=notes[1])]
    found, commands = run(monkeypatch, *ranks, replacements=2)
    assert found == (128 + signal.SIGTERM, "")
    assert commands == ["train digits"] * 2
    assert [rank.heard for rank in ranks] == [[signal.SIGTERM]] * 2
    assert capsys.readouterr().err == ""


def test_a_rank_that_is_started_as_the_request_comes_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(), Rank()]
    assert run(monkeypatch, *ranks, before={1: ask}, replacements=1)[0] == (128 + signal.SIGTERM, "")
    assert [rank.heard for rank in ranks] == [[signal.SIGTERM]] * 2
    ranks = [Rank(-9), Rank(notes=True), Rank()]
    assert run(monkeypatch, *ranks, before={2: ask}, replacements=1)[0] == (128 + signal.SIGTERM, "")
    assert [rank.heard for rank in ranks] == [[], [signal.SIGTERM], [signal.SIGTERM]]


def test_a_run_that_was_finished_as_the_request_came_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Rank(0), Rank(None, ask, notes=True))[0] == (0, "")


@pytest.mark.parametrize("other", [Rank(0), Rank(None, ask, notes=True)])
def test_a_stopped_rank_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: Rank
) -> None:
    monkeypatch.setattr(launch, "PATIENCE_S", 0.0)
    stopped = Stopped()
    found, commands = run(monkeypatch, other, stopped, replacements=1)
    assert found == (other.code, "")
    assert stopped.is_killed
    assert len(commands) == 2
    assert capsys.readouterr().err == "asyncprop: rank 1 has not ended 0 s after another: killing it\n"


def test_who_takes_its_time_to_end_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Rank(0), Rank(None, None, 0))[0] == (0, "")  # or it would lack what kills
    monkeypatch.setattr(launch, "PATIENCE_S", 0.0)
    assert run(monkeypatch, Rank(1), Rank(None, None, 0))[0] == (0, "")  # it may have to train on for long


def test_a_rank_that_is_killed_after_the_end_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = (Rank(None, -9), Rank(0), Rank(None, None, 0))
    found, commands = run(monkeypatch, *ranks, number=3, replacements=1)
    assert (found, len(commands)) == ((0, ""), 3)
    assert capsys.readouterr().err == ""


def test_the_others_are_told_of_one_that_ended_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may before its first heartbeat, for which they would wait long."""
    store = Store()
    run(monkeypatch, Rank(-9), Rank(None, 3), store=store)
    assert [store.said_of(rank) for rank in range(2)] == ["was ended by SIGKILL", "has ended with exit code 3"]


def test_who_has_said_goodbye_and_who_was_started_anew_are_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    Board(PrefixStore(MEMBERS, store)).put("gone/1", None)
    run(monkeypatch, Rank(-9), Rank(None, None, None, 0), Rank(-9), store=store, replacements=1)
    assert store.said_of(1) is None
    with pytest.raises(KeyError):  # its number is the members' affair
        store.said_of(2)


def test_a_signal_without_a_name_ends_nobody_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = signal.SIGRTMIN + 1
    assert run(monkeypatch, Rank(-nameless), Rank(None, None, 0))[0] == (0, "")
    assert capsys.readouterr().err == f"asyncprop: rank 0 was ended by signal {nameless}: the others go on\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_end_that_torch_s_agent_has_passed_on_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def agent(*arguments: str) -> None:
        raise SignalException("asked to end", sigval=number)

    monkeypatch.setattr(elastic, "elastic_launch", lambda config, entrypoint: agent)
    assert launch.launch(2, ["train", "digits"]) == (128 + number, "")
