"""Journal: the lines of a run that all ranks know, so that any of them can write them if the first has died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncprop.exchange import World
from asyncprop.runs import Run


class Journal:
    """Keeps what is to be written until it is on the disk; the first rank alive writes.

    Args:
        world: the ranks.
        run: the open folder, on the rank that was the first at the start.
        take_over: opens the folder, on a rank that becomes the first; None where that cannot happen.

    Attributes:
        run: the open folder, where this rank is the first.
    """

    def __init__(self, world: World, run: Run | None, take_over: Callable[[], Run] | None = None) -> None:
        self.run = run
        self._world, self._take_over = world, take_over
        self._steps: list[dict[str, Any]] = []
        self._epochs: list[dict[str, Any]] = []

    def add_steps(self, rows: list[dict[str, Any]]) -> None:
        """Note the rows of finished batches, with their numbers."""
        self._steps += rows

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Note the row of a finished epoch."""
        self._epochs.append(row)

    def write(self) -> Run | None:
        """Bring all that was noted to the disk, if this rank is the first, and return the folder.

        Nothing is forgotten: this rank may be the only one that has come so far.
        """
        if not self._world.is_first:
            self._close()
            return None
        if self.run is None:
            assert self._take_over
            self.run = self._take_over()
        for row in self._steps:
            if row["step"] >= self.run.steps:  # else it is there, perhaps by the rank before this one
                self.run.add_step(row)
        for row in self._epochs:
            if row["epoch"] > self.run.epochs:
                self.run.add_epoch(row)
        self.run.flush()
        return self.run

    def forget(self) -> None:
        """Forget what was noted: it is on the disk, and in a checkpoint that counts it."""
        self._steps.clear()
        self._epochs.clear()

    def leave(self) -> None:
        """Forget everything, the folder too: the others have gone on without this rank, and another has written."""
        self.forget()
        self._close()

    def _close(self) -> None:
        """Close the folder, if this rank was the first: should it be so again, what is there then must be read anew."""
        if self.run:
            self.run.close()
            self.run = None
