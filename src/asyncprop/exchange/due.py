"""Due: which layers are to be sent, by how often they were updated, and chance."""

from __future__ import annotations

import random


class Due:
    """Says what one rank is to send now. Not thread-safe: the send thread's own.

    Args:
        updates: of each layer since it was last sent; counted by others, set back here.
        period: a layer is sent at every so many of its updates.
        probability: with which a layer whose turn it is is sent.
        seed: of what is drawn at random.
    """

    def __init__(self, updates: list[int], *, period: int, probability: float, seed: str) -> None:
        self._updates = updates
        self._period, self._probability = period, probability
        self._random = random.Random(seed)
        self._drawn: set[int] = set()  # layers that are to be sent, and could not be yet

    def layers(self) -> list[int]:
        """Return the layers that are due, in the order in which they go.

        Those that have waited for the most updates go first, so that none starves where links are slower than
        updates; among those that have waited alike, the output's, as they are updated first.
        """
        updates = self._updates
        due = [layer for layer in reversed(range(len(updates))) if self._is_due(layer)]
        return sorted(due, key=lambda layer: -updates[layer])

    def sent(self, layer: int) -> int:
        """Note that a layer has been sent, and return the updates that had waited for it."""
        updates, self._updates[layer] = self._updates[layer], 0
        self._drawn.discard(layer)
        return updates

    def _is_due(self, layer: int) -> bool:
        if self._updates[layer] < self._period:
            return False
        if self._probability < 1 and layer not in self._drawn:
            if self._random.random() >= self._probability:
                self._updates[layer] = 0
                return False
            self._drawn.add(layer)
        return True
