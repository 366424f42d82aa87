"""Attendance: who takes part in meetings, as one rank knows it. Who was left out of one has to join to count again.

Who took part in a meeting stays in the store for good, so that whoever comes late can learn it.
"""

from __future__ import annotations

from collections.abc import Collection

from asyncprop.exchange.board import Board
from asyncprop.exchange.handover import WITHDRAWN, Handover


class Attendance:
    """The meetings' members. Not thread-safe: the training thread's own.

    Args:
        board: where the ranks agree.
        size: number of ranks of the start, all of which take part from the first meeting on.
    """

    def __init__(self, board: Board, size: int) -> None:
        self._board, self._size = board, size
        self._since = dict.fromkeys(range(size), 1)  # the first meeting that a member takes part in
        self._left_out: dict[int, int] = {}  # the last meeting that one was left out of
        self._unsure: dict[int, Handover] = {}  # by which one joins, while that may still come to nothing

    def takes_part(self, member: int) -> bool:
        """Tell whether a member is waited for at the next meeting, if it is alive."""
        if not self._counts(member) and self._board.has(f"since/{member}"):
            self._since[member], key = self._board.get(f"since/{member}")
            self._unsure[member] = Handover(self._board, key)
        if member in self._unsure and (fate := self._unsure[member].fate):
            del self._unsure[member]
            if fate == WITHDRAWN:  # it asks another rank, which may be waiting at the meeting
                self._since[member] = 0
        return self._counts(member)

    def read(self, round: int, turn: int) -> tuple[int, ...]:
        """Return who took part in a meeting on which the ranks have agreed, and note who did not."""
        members = tuple(map(int, self._board.settle(set_key(round, turn), "").split(",")))
        self._note(round, members)
        return members

    def catch_up(self, round: int, turn: int) -> None:
        """Learn who took part in what came after this turn, while this rank was away."""
        while True:
            if self._board.has(set_key(round, turn + 1)):
                turn += 1
            elif self._board.has(set_key(round + 1, 0)):
                round, turn = round + 1, 0
            else:
                return
            self.read(round, turn)

    def join(self, rank: int, round: int, among: Collection[int]) -> None:
        """Note that this rank takes part after a meeting, in which these took part and nobody else."""
        self._note(round, among)
        self._left_out.pop(rank, None)
        self._since[rank] = round + 1

    def _counts(self, member: int) -> bool:
        return self._since.get(member, 0) > self._left_out.get(member, 0)

    def _note(self, round: int, members: Collection[int]) -> None:
        known = range(self._size + self._board.add("joined", 0))
        self._left_out |= {member: round for member in known if member not in members}


def set_key(round: int, turn: int) -> str:
    """Where it is settled who takes part in a turn of a meeting."""
    return f"round/{round}.{turn}/set"
