"""Shares: which batches of an epoch a rank takes. Each batch is one rank's, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.distributed import Store  # type: ignore[attr-defined]

from asyncprop.exchange.world import Counter, World

FAR = 1 << 40
"""Added to a counter to say that no more is to be taken."""

NO_ROUND, CLOSED = "", " closed"
"""The word of `Rounds` at the start, as torch's store has it; and what it ends with, once no more are opened."""


class Share(Protocol):
    """Numbers of batches, from 0 in the epoch, for this rank.

    `ended` is where the next share starts, once this rank has ended it; None if another has, or it went to the end.
    `taken_to` is one more than the last number that this rank took, if it saw that the share was ended before its time;
    else None.
    """

    ended: int | None
    taken_to: int | None

    def __iter__(self) -> Iterator[int]:
        """Take numbers until there are no more, or `stop` was called."""

    def stop(self) -> None:
        """End the share, for all ranks, after what has been taken."""

    @property
    def others(self) -> int:
        """Batches that other ranks have taken, as far as is known here."""


def end_of_share(told: list[tuple[int | None, int | None]], count: int) -> int:
    """Return where the next share starts.

    Args:
        told: `ended` and `taken_to` of every rank that is alive. If the one that ended the share has died, the next
            starts after the last batch that a live rank took, unless one had come to the end.
        count: the number of batches in the epoch.
    """
    ends = [ended for ended, _ in told if ended is not None]
    taken = [count if taken_to is None else taken_to for _, taken_to in told]
    return ends[0] if ends else max(taken, default=count)


class Claims:
    """The next batch goes to whichever rank asks first, so that a slow rank holds up nobody.

    Args:
        counter: new, and shared by all ranks.
        start, count: the first number, and the number of batches in the epoch.
    """

    def __init__(self, counter: Counter, start: int, count: int) -> None:
        self.ended: int | None = None
        self.taken_to: int | None = None
        self._counter, self._start, self._count = counter, start, count
        self._taken, self._last = 0, start - 1

    def __iter__(self) -> Iterator[int]:
        while (number := self._start + self._counter.add(1) - 1) < self._count:
            self._taken, self._last = self._taken + 1, number
            yield number
        if number >= FAR:
            self.taken_to = self._last + 1

    def stop(self) -> None:
        """Let nobody claim any more."""
        claimed = self._start + self._counter.add(FAR) - FAR
        if claimed < FAR:  # nobody was faster
            self.ended = min(claimed, self._count)

    @property
    def others(self) -> int:
        """Batches that others had claimed when this rank last claimed one."""
        return self._last - self._start + 1 - self._taken


class Rounds:
    """Every rank takes one batch a round, as training in step needs it. What is left over at the end is left out.

    How far apart ranks may be is the method's affair: with local steps, one can be rounds ahead of another. So the
    store has one word for all: how many rounds are open, as in "7"; or, when there will be no more, "7 closed". Whoever
    comes to a round asks that it be opened, by one compare-and-set.

    Guarantees: all ranks take the same rounds, whoever calls `stop`, and whenever. A rank that comes to a round has
    taken all before it, so these are open. If no more are, and the word is not closed, the round is opened; else the
    word tells whether it is among those that are. Nobody changes a closed word, so no rank finds a round open that
    another has found closed; and a word is closed with its own number, so no rank has begun a later round by then.

    Args:
        store: new, and shared by all ranks.
        start, count: the first number, and the number of batches in the epoch.
        world: this rank, and how many there are.
    """

    def __init__(self, store: Store, start: int, count: int, world: World) -> None:
        self.ended: int | None = None
        self.taken_to: int | None = None
        self._store: Any = store
        self._start, self._count, self._world = start, count, world
        self._begun = 0

    def __iter__(self) -> Iterator[int]:
        for turn in range((self._count - self._start) // self._world.size):
            opened = self._opened(turn)
            if turn >= opened:
                self.ended = self._start + opened * self._world.size
                return
            self._begun = turn + 1
            yield self._start + turn * self._world.size + self._world.rank

    def stop(self) -> None:
        """Let no more rounds be opened: those that any rank has begun are the last, for all."""
        word = NO_ROUND
        while not word.endswith(CLOSED):
            word = self._settle(word, f"{word or 0}{CLOSED}")

    @property
    def others(self) -> int:
        """Batches that the others have taken: as many as this one, each."""
        return self._begun * (self._world.size - 1)

    def _opened(self, turn: int) -> int:
        """Ask that a round be opened; return how many are."""
        word = self._settle(str(turn) if turn else NO_ROUND, str(turn + 1))
        return int(word.removesuffix(CLOSED))

    def _settle(self, expected: str, wanted: str) -> str:
        """Let the word be `wanted`, if it is `expected`; return what it is."""
        return str(self._store.compare_set("rounds", expected, wanted).decode())
