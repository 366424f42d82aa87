"""Launch: what the launcher makes of its ranks' ends, and of a request to end. The ranks are no processes here."""

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed.launcher.api as elastic
from torch.distributed.elastic.multiprocessing.api import SignalException

from asyncprop import launch

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


def ask() -> None:
    signal.raise_signal(signal.SIGTERM)


class Started:
    """Notes what is started, and lets these ranks be it, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ranks: Rank, before: dict[int, Callable[[], None]]) -> None:
        self.ranks, self.before = list(ranks), before
        self.commands: list[str] = []
        monkeypatch.setattr(launch, "POLL_S", 0.0)
        monkeypatch.setattr(launch, "_start", self.start)
        monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: SimpleNamespace(port=1))

    def start(self, arguments: list[str], environment: dict[str, str]) -> Any:
        self.before.get(len(self.commands), lambda: None)()
        self.commands.append(" ".join(arguments))
        return self.ranks[len(self.commands) - 1]


JOIN = "train --join 127.0.0.1:1 --quiet"


def run(monkeypatch: pytest.MonkeyPatch, *ranks: Rank, before: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """Launch two ranks, and what replaces them; return what came of it, and what was started."""
    started = Started(monkeypatch, *ranks, before=before or {})
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    found = launch.launch_tolerant(2, ["train", "digits"], quiet=True, **options)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_end_that_torch_s_agent_has_passed_on_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def agent(*arguments: str) -> None:
        raise SignalException("asked to end", sigval=number)

    monkeypatch.setattr(elastic, "elastic_launch", lambda config, entrypoint: agent)
    assert launch.launch(2, ["train", "digits"]) == (128 + number, "")
