"""Due: which chunks are to be sent, by how often they were updated, and chance. (In virtual time a layer is one.)"""

from __future__ import annotations

import random


class Due:
    """Says what one rank is to send now. Not thread-safe: the send thread's own.

    Args:
        updates: of each chunk since it was last sent; counted by others, set back here.
        period: a chunk is sent at every so many of its updates.
        probability: with which a chunk whose turn it is is sent.
        seed: of what is drawn at random.
    """

    def __init__(self, updates: list[int], *, period: int, probability: float, seed: str) -> None:
        self._updates = updates
        self._period, self._probability = period, probability
        self._random = random.Random(seed)
        self._drawn: set[int] = set()  # chunks that are to be sent, and could not be yet

    def chunks(self) -> list[int]:
        """Return the chunks that are due, in the order in which they go.

        Those that have waited for the most updates go first, so that none starves where links are slower than
        updates; among those that have waited alike, the output's, as they are updated first.
        """
        updates = self._updates
        due = [chunk for chunk in reversed(range(len(updates))) if self._is_due(chunk)]
        return sorted(due, key=lambda chunk: -updates[chunk])

    def sent(self, chunk: int) -> int:
        """Note that a chunk has been sent, and return the updates that had waited for it."""
        updates, self._updates[chunk] = self._updates[chunk], 0
        self._drawn.discard(chunk)
        return updates

    def _is_due(self, chunk: int) -> bool:
        if self._updates[chunk] < self._period:
            return False
        if self._probability < 1 and chunk not in self._drawn:
            if self._random.random() >= self._probability:
                self._updates[chunk] = 0
                return False
            self._drawn.add(chunk)
        return True
