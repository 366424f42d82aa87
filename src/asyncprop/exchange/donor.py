"""Donor: what a rank does for those that join: it hands over what it offers to whoever asks for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch.distributed import Store  # type: ignore[attr-defined]

from asyncprop.exchange.board import Board
from asyncprop.exchange.handover import WITHDRAWN, Handover, key_of

if TYPE_CHECKING:
    from asyncprop.exchange.members import Members

log = logging.getLogger("asyncprop")


class Donor:
    """Answers, one rank's. Not thread-safe: one thread's own, as an answer may take long.

    Args:
        store: that all ranks share.
    """

    def __init__(self, store: Store) -> None:
        self._board = Board(store)
        self._seen: dict[int, int] = {}
        self._answered: dict[int, int] = {}

    def answer(self, members: Members) -> None:
        """Look who has asked this rank, and hand over its `offers`; to those that had asked by the last look, too.

        By then all others have heard of them, and wait for them at the next meeting.
        """
        for member in members.alive - {members.rank} if members.offers else ():
            number = self._board.add(f"asked/{members.rank}/{member}", 0)
            is_new = number > self._answered.get(member, 0)
            if is_new and number == self._seen.get(member) and self._give(members, member, number):
                self._answered[member] = number
            self._seen[member] = number

    def _give(self, members: Members, member: int, number: int) -> bool:
        """Hand over; tell whether there is no more to be done about it: it is given, or withdrawn by either."""
        handover = Handover(self._board, key_of(members.rank, member, number))
        if handover.fate == WITHDRAWN:
            return True
        if (given := _collect(members)) is None:
            return False
        # From now on the others wait for it, unless it is withdrawn.
        self._board.put(f"since/{member}", (given["round"] + 1, handover.key))
        handover.leave(given)
        if members.part_with(handover.give):
            log.warning("rank %d: rank %d joins", members.rank, member)
        else:
            handover.withdraw()
            handover.delete()
        return True


def _collect(members: Members) -> dict[str, Any] | None:
    """Return what is offered, all of it of one time between two meetings; None if that cannot be now."""
    given: dict[str, Any] = {"round": members.round, "among": members.among}
    for name, offer in list(members.offers.items()):
        if (part := offer()) is None:
            break
        given[name] = part
    else:
        if members.round == given["round"]:
            return given
    members.part_with(lambda: False)
    return None
