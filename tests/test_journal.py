"""Journal: the lines of a run, and its checkpoints, when the first rank dies at any moment of writing them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncprop.checkpoint import load_checkpoint, rank_state, save_checkpoint
from asyncprop.config import TrainConfig
from asyncprop.exchange import World
from asyncprop.exchange.told import InOrder, Told
from asyncprop.methods import train
from asyncprop.methods.journal import Journal
from asyncprop.methods.session import Session
from asyncprop.runs import Run, create_run, open_run, take_over
from processes import rows

CONFIG = TrainConfig(task="digits", method="layup", epochs=2, train_samples=320, test_samples=100)
IN_THE_SAVE = 3
"""Values that are gathered before the first rank writes: the name of the run, peaks of memory, states of ranks."""


class Second(World):
    """A world of two as its second rank sees it; nothing is sent. The first dies when so many values were gathered."""

    def __init__(self, gathers: int = IN_THE_SAVE) -> None:
        super().__init__()
        self.rank, self.size, self.left = 1, 2, gathers
        self.members: Any = SimpleNamespace(among=(0, 1), joins=False, offers={})

    def gather(self, value: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            self.members.among = (1,)
        values = dict.fromkeys(self.members.among, value)
        told = InOrder(Told(self.members.among, {}, lambda member: values[member]))
        return list(told) if self.is_first else told


def rows_of(start: int, end: int) -> list[dict[str, Any]]:
    return [{"step": number, "rank": number % 2} for number in range(start, end)]


def at(steps: int, epochs: int = 0) -> Session:
    """Return the session of the second rank, which has come so far."""
    session = Session(CONFIG, None, Second())
    session.position.steps = steps
    session.position.epoch = epochs
    session.position.history = [{"epoch": epoch} for epoch in range(1, epochs + 1)]
    return session


def journal_of(session: Session, path: Path, steps: list[dict[str, Any]], epochs: list[int]) -> Journal:
    """Return the second rank's journal, which knows these rows since the last checkpoint."""
    journal = Journal(session.world, None, lambda: take_over(path, CONFIG))
    journal.add_steps(steps)
    for epoch in epochs:
        journal.add_epoch({"epoch": epoch})
    return journal


def checkpoint(run: Run, steps: int, epochs: int = 0) -> None:
    """Write a checkpoint of so many steps, as the first rank does."""
    session = at(steps, epochs)
    session.position.lines = list(run.lines)
    run.flush()
    save_checkpoint(run.checkpoint, session.model, [rank_state(session.optimizer, {})], session.position)


def resumed(path: Path) -> tuple[int, int]:
    """Open a folder as a resumed run does; return the steps and epochs that count."""
    session = Session(CONFIG, path / "checkpoint")
    with open_run(path) as run:
        assert (run.steps, run.epochs) == (session.position.steps, len(session.position.history))
        return run.steps, run.epochs


@pytest.mark.parametrize("written", [0, 2, 4])
def test_the_first_dies_as_it_writes_lines_and_none_is_lost_or_doubled(tmp_path: Path, written: int) -> None:
    path = tmp_path / "run"
    with create_run(path, CONFIG) as run:
        for row in rows_of(0, 4):
            run.add_step(row)
        run.add_epoch({"epoch": 1})
        checkpoint(run, 4, epochs=1)
        for row in rows_of(4, 4 + written):
            run.add_step(row)
        run.flush()
    session = at(8, epochs=2)
    journal = journal_of(session, path, rows_of(4, 8), [2])
    session.save(journal)
    assert rows(path) == rows_of(0, 8)
    assert [row["epoch"] for row in rows(path, "epochs")] == [1, 2]
    assert resumed(path) == (8, 2)
    assert journal.run
    assert journal.write() is journal.run  # and nothing is noted that would be written again
    assert rows(path) == rows_of(0, 8)
    journal.run.close()


def test_the_first_dies_when_all_is_written_but_has_not_said_so(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with create_run(path, CONFIG) as run:
        for row in rows_of(0, 8):
            run.add_step(row)
        run.add_epoch({"epoch": 1})
        checkpoint(run, 8, epochs=1)
    session = at(8, epochs=1)
    journal = journal_of(session, path, rows_of(4, 8), [1])
    session.save(journal)
    assert rows(path) == rows_of(0, 8)
    assert resumed(path) == (8, 1)
    assert journal.run
    journal.run.close()


def test_the_first_dies_in_the_very_first_save(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create_run(path, CONFIG).close()
    session = at(0)
    journal = journal_of(session, path, [], [])
    session.save(journal)
    assert resumed(path) == (0, 0)
    assert journal.run
    journal.run.close()


def test_the_first_dies_before_it_has_written_the_result(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create_run(path, CONFIG).close()
    session = Session(CONFIG, None, Second(gathers=1))  # one is of its name
    journal = Journal(session.world, None, lambda: take_over(path, CONFIG))
    train._finish(session, journal, {"best_metric": 0.5})
    assert json.loads((path / "result.json").read_text())["best_metric"] == 0.5
    assert journal.run
    journal.run.close()


def test_a_folder_that_was_made_on_another_machine_has_the_rest_and_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "run"
    session = at(108, epochs=3)
    journal = journal_of(session, path, rows_of(104, 108), [])  # so it holds no epoch yet
    session.save(journal)
    assert resumed(path) == (108, 3)
    assert journal.run
    journal.run.add_step({"step": 108})  # after the checkpoint: it is cut off
    journal.run.close()
    with open_run(path) as run:
        assert rows(path) == rows_of(104, 108)
        for row in rows_of(108, 110):
            run.add_step(row)
        run.add_epoch({"epoch": 4})
        checkpoint(run, 110, epochs=4)
    assert resumed(path) == (110, 4)
    assert [row["step"] for row in rows(path)] == list(range(104, 110))
    shutil.copy(path / "epochs.jsonl", path / "steps.jsonl")
    with pytest.raises(ValueError, match=r"must have 6 whole lines \(it has 1\): the run is damaged"):
        open_run(path)


def test_of_a_run_without_counts_of_lines_there_is_one_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with create_run(path, CONFIG) as run:
        for row in rows_of(0, 4):
            run.add_step(row)
        checkpoint(run, 3)
    file = path / "checkpoint" / "position.json"
    position = json.loads(file.read_text())
    del position["lines"]  # as earlier versions wrote it
    file.write_text(json.dumps(position))
    assert resumed(path) == (3, 0)
    assert load_checkpoint(path / "checkpoint", at(0).model, at(0).optimizer)[0].lines is None
    assert rows(path) == rows_of(0, 3)


@pytest.mark.parametrize("met_as_another", [True, False])
def test_a_first_rank_that_was_left_out_reads_the_folder_anew_when_it_is_the_first_again(
    tmp_path: Path, met_as_another: bool
) -> None:
    """It may have met the others as one that is not the first, or be the first again as soon as it has joined."""
    path, world = tmp_path / "run", Second()
    world.rank = 0
    first = create_run(path, CONFIG)
    journal = Journal(world, first, lambda: take_over(path, CONFIG))
    journal.add_steps(rows_of(0, 2))
    assert journal.write() is first
    journal.leave()
    if met_as_another:
        world.rank = 2
        assert journal.write() is None
        world.rank = 0
    with take_over(path, CONFIG) as other:  # meanwhile
        for row in rows_of(0, 6):
            other.add_step(row)
        checkpoint(other, 6)
    journal.add_steps(rows_of(6, 8))
    second = journal.write()
    assert second
    assert second is not first
    assert (second.steps, second.lines) == (8, [8, 0])
    assert rows(path) == rows_of(0, 8)
    second.close()


def test_a_first_rank_that_meets_one_before_it_is_the_first_no_more(tmp_path: Path) -> None:
    path, world = tmp_path / "run", Second()
    world.members.among = (1, 2)
    journal = Journal(world, None, lambda: take_over(path, CONFIG))
    journal.add_steps(rows_of(0, 2))
    assert journal.write()
    world.members.among = (0, 1, 2)
    assert journal.write() is None
    assert journal.run is None
