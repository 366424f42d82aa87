"""Rank: what one process does and says as the first opens the run's folder, or does not, and as its training ends."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncprop.config import TrainConfig
from asyncprop.exchange import LeftOut, World
from asyncprop.exchange.board import StoreLostError
from asyncprop.methods.train import Interrupted, Left
from asyncprop.rank import BAD_INPUT, FAILED, FULL, TOLD, Job, _check_that_some_are_left, _Folder, _train_in, join_rank
from asyncprop.runs import create_run

CONFIG = TrainConfig(task="digits", method="layup")


class Noted(dict[str, Any]):
    """A board of one process."""

    put = dict.__setitem__


def second(told: list[Any], lost: dict[int, float]) -> Any:
    """Return the world of the second of three ranks, and what is gathered in it when all are to be told."""
    members = SimpleNamespace(rank=1, among=(0, 1, 2), lost=lost, board=Noted())
    return SimpleNamespace(members=members, is_joining=False, gather=lambda own: told)


def folder_of(world: Any) -> _Folder:
    def never() -> Any:
        raise AssertionError

    return _Folder(world, Job(CONFIG, never, never), ExitStack())


def test_where_the_first_rank_refuses_the_folder_the_others_end_without_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert folder_of(second([None, None], {})).tell() == BAD_INPUT
    assert folder_of(second([None], {2: 1.0})).tell() == BAD_INPUT
    assert capsys.readouterr().err == ""


def test_where_it_died_at_it_they_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert folder_of(second([None, None], {0: 1.0})).tell() == FAILED
    assert capsys.readouterr().err == "asyncprop: rank 1: rank 0 died before it had opened the run's folder\n"


def test_whoever_has_opened_the_folder_tells_all(tmp_path: Path) -> None:
    told = {"config": CONFIG.model_dump(mode="json"), "path": str(tmp_path / "run")}
    world = second([None, told, None], {0: 1.0})
    folder = folder_of(world)
    assert folder.tell() == 0
    assert world.members.board == {TOLD: told}
    folder.open().close()
    assert (tmp_path / "run" / "config.toml").is_file()


@pytest.mark.parametrize("alive", [{2}, {2, 3}])
def test_who_joins_waits_for_nobody_where_no_rank_of_the_start_is_left(alive: set[int]) -> None:
    members: Any = SimpleNamespace(rank=2, size=2, check=lambda: None, alive=alive)
    with pytest.raises(LeftOut, match="rank 2 cannot join: no other rank is training"):
        _check_that_some_are_left(members)
    members.alive = {1, *alive}
    _check_that_some_are_left(members)


class Ended(BaseException):
    """What the end of this process is here."""


class Members:
    """Of two that train, and one that has joined them, as that one sees it."""

    rank, among, lost = 2, (0, 1, 2), {}
    board = Noted({TOLD: {"path": "run"}})

    def __init__(self) -> None:
        self.goodbyes: list[bool] = []

    def close(self, *, failed: bool = False) -> None:
        self.goodbyes.append(failed)


def ends(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, **world: Any) -> int:
    """Let the third rank's training end by an error; None lets it make no session."""

    def raises(*arguments: Any) -> Any:
        raise error or StoreLostError("the store is gone")

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("asyncprop.methods.train.train", raises)
    monkeypatch.setattr(os, "_exit", end)
    session = SimpleNamespace(position=SimpleNamespace(steps=7))
    members = Members()
    place = {"rank": 2, "size": 2, "is_first": False, "is_joining": True, "members": members, **world}
    place["gather"] = lambda own: [{"path": "run"}]
    job = Job(CONFIG, (lambda world: session) if error else raises, raises)
    try:
        return _train_in(SimpleNamespace(**place), job)
    except Ended as ended:
        assert members.goodbyes == [True]  # nobody is to wait for it
        return int(ended.args[0])


@pytest.mark.parametrize(
    ("error", "is_joining", "said"),
    [
        (None, True, "the store is gone"),
        (StoreLostError("the store is gone"), True, "rank 2: cannot join: StoreLostError: the store is gone"),
        (StoreLostError("the store is gone"), False, "rank 2: the run failed: StoreLostError: the store is gone"),
        (LeftOut("rank 2 cannot join"), True, "rank 2 cannot join"),
        (OSError(errno.ENOSPC, FULL[0]), False, f"rank 2: the run failed: OSError: [Errno {errno.ENOSPC}] {FULL[0]}"),
        (RuntimeError(f"I/O error: {FULL[0]}"), False, f"rank 2: the run failed: RuntimeError: I/O error: {FULL[0]}"),
    ],
)
def test_a_lost_store_and_a_full_disk_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    is_joining: bool,
    said: str,
) -> None:
    assert ends(monkeypatch, error, is_joining=is_joining) == FAILED
    assert capsys.readouterr().err == f"asyncprop: {said}\n"


def test_a_store_that_is_lost_before_one_has_joined_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(world: World) -> World:
        raise StoreLostError("the store is gone")

    monkeypatch.setattr(World, "__enter__", lost)
    assert join_rank("here:1") == FAILED
    assert capsys.readouterr().err == "asyncprop: the store is gone\n"


@pytest.mark.parametrize(("launched", "said"), [(None, "asyncprop: rank 2: stopped after 7 batches\n"), ("2", "")])
def test_of_ranks_that_are_stopped_those_say_so_that_were_not_launched_with_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launched: str | None, said: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched:
        monkeypatch.setenv("WORLD_SIZE", launched)
    assert ends(monkeypatch, Interrupted()) == 128 + signal.SIGINT
    assert capsys.readouterr().err == said


def test_a_guest_that_was_asked_to_end_says_that_it_leaves_and_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members = Members()
    assert ends(monkeypatch, Left(), members=members) == 128 + signal.SIGINT
    assert members.goodbyes == [False]
    assert capsys.readouterr().err == "asyncprop: rank 2: left after 7 batches: the others go on\n"


@pytest.mark.parametrize(
    ("is_guest", "said"), [(True, "rank 0 has finished -> the folder that rank 0 writes\n"), (False, "")]
)
def test_a_guest_says_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_guest: bool, said: str
) -> None:
    monkeypatch.setattr("asyncprop.methods.train.train", lambda *arguments: {})
    monkeypatch.setattr("asyncprop.progress.result_line", lambda result: "rank 0 has finished")
    session: Any = SimpleNamespace()
    world: Any = SimpleNamespace(
        rank=2, size=2, is_first=False, is_joining=True, is_guest=is_guest, members=Members(),
    )  # fmt: skip
    assert _train_in(world, Job(CONFIG, lambda world: session, lambda: create_run(None, CONFIG))) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("address", ["here", ":1", "here:", "here:0", "here:99999", "here:²"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=rf"join must be HOST:PORT, .* from 1 to 65535 \(got {address}\)"):
        join_rank(address)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_first_rank_says_how_others_join(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, quiet: bool
) -> None:
    def stops(*arguments: Any) -> Any:
        raise Interrupted

    monkeypatch.setattr("asyncprop.methods.train.train", stops)
    members = SimpleNamespace(rank=0, among=(0, 1), lost={}, board=Noted())
    world: Any = SimpleNamespace(
        rank=0, size=2, is_first=True, is_joining=False, members=members, address="host:1", gather=lambda own: [own]
    )
    session: Any = SimpleNamespace(position=SimpleNamespace(steps=7))
    job = Job(CONFIG, lambda world: session, lambda: create_run(tmp_path / "run", CONFIG), quiet=quiet)
    assert _train_in(world, job) == 128 + signal.SIGINT
    joins = [line for line in capsys.readouterr().err.splitlines() if "--join" in line]
    assert joins == ([] if quiet else ["2 ranks; another joins them by: asyncprop train --join host:1"])


@pytest.mark.parametrize(("environment", "code"), [({}, -signal.SIGABRT), ({"RANK": "1"}, 0)])
def test_a_rank_s_process_ends_with_the_command_whatever_python_would_do_then(
    environment: dict[str, str], code: int
) -> None:
    program = (
        "import atexit, os, runpy, sys; atexit.register(os.abort); sys.argv = ['asyncprop', '--version']; "
        "runpy.run_module('asyncprop', run_name='__main__')"
    )
    own = {key: value for key, value in os.environ.items() if key != "RANK"}
    command, environment = [sys.executable, "-c", program], {**own, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert code or done.stdout == "0.1.0\n"  # what is printed to a pipe leaves it only now


def test_a_rank_that_is_stopped_while_it_is_imported_says_nothing() -> None:
    program = (
        "import runpy, sys\nclass Stops:\n def find_spec(self, name, *more):\n"
        "  if name == 'asyncprop.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stops())\nrunpy.run_module('asyncprop', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
