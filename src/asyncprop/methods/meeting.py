"""Meeting: where ranks tell each other what they have done since the last; afterwards all have the same position."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from asyncprop.checkpoint import Position
from asyncprop.methods.journal import Journal
from asyncprop.methods.shares import Share, end_of_share

if TYPE_CHECKING:
    from asyncprop.methods.session import Session


class Meeting:
    """One rank's part in it.

    Args:
        position: of all ranks, when they last met.

    Attributes:
        rows: of the batches that this rank has finished since.
    """

    def __init__(self, position: Position) -> None:
        self.rows: list[dict[str, Any]] = []
        self._before = copy.copy(position)

    def merge(self, session: Session, share: Share, journal: Journal) -> None:
        """Add up all ranks' positions, and note all ranks' rows in the order of their times."""
        position = session.position
        gathered = session.world.gather((position, share.ended, share.taken_to, self.rows))
        position.add_up(self._before, [theirs for theirs, *_ in gathered])
        if session.world.members:  # whoever goes on after a death, or joins late, has the same clock
            position.train_s = max(theirs.train_s for theirs, *_ in gathered)
        position.batch = end_of_share(
            [(ended, taken_to) for _, ended, taken_to, _ in gathered], session.batches_per_epoch
        )
        rows = sorted((row for *_, rows in gathered for row in rows), key=lambda row: float(row["train_s"]))
        journal.add_steps([{**row, "step": number} for number, row in enumerate(rows, start=self._before.steps)])
