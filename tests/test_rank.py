"""Rank: what one process does when the first has not opened the run's folder."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncprop.config import TrainConfig
from asyncprop.exchange import LeftOut
from asyncprop.rank import BAD_INPUT, FAILED, TOLD, Job, _check_that_some_are_left, _Folder

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
