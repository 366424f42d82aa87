"""Handover: what a live rank leaves in the store for one that joins. It is given, or withdrawn, and never both.

Either of the two may be slow, or die: the one that joins then asks another rank, and nobody may wait for it on account
of what was not given. So what has become of a handover is settled by one compare-and-set, for all alike.
"""

from __future__ import annotations

from typing import Any

from asyncprop.exchange.board import Board

GIVEN, WITHDRAWN = "given", "withdrawn"


class Handover:
    """One of them.

    Args:
        board: a connection to the store.
        key: that no other handover has or had.
    """

    def __init__(self, board: Board, key: str) -> None:
        self._board, self.key = board, key

    @property
    def fate(self) -> str:
        """`GIVEN`, `WITHDRAWN`, or empty while it is neither."""
        settled = f"{self.key}/fate"
        return self._board.settle(settled, "") if self._board.has(settled) else ""

    def leave(self, value: Any) -> None:
        """Leave the value, which is not given yet."""
        self._board.put(self.key, value)

    def give(self) -> bool:
        """Give what was left; tell whether it is still wanted."""
        return self._settle(GIVEN)

    def withdraw(self) -> bool:
        """Want it, or give it, no more; tell whether that was in time."""
        return self._settle(WITHDRAWN)

    def take(self) -> Any:
        """Return what was given, and delete it."""
        value = self._board.get(self.key)
        self.delete()
        return value

    def delete(self) -> None:
        """Delete what was left."""
        self._board.delete(self.key)

    def _settle(self, fate: str) -> bool:
        return self._board.settle(f"{self.key}/fate", fate) == fate


def key_of(donor: int, asker: int, number: int) -> str:
    """Return the key of what one rank hands over to another that has asked it so often."""
    return f"offer/{donor}/{asker}/{number}"
