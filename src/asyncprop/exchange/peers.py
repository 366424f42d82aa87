"""Peers: to whom a layer goes next, by topology."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal, get_args

Topology = Literal["uniform", "ring", "exponential"]


class Peers:
    """Chooses among the members that are alive. Not thread-safe: the send thread's own.

    Args:
        topology: `"uniform"` sends to anybody, at random; `"ring"` to the next member (the least traffic per link, the
            slowest mixing); `"exponential"` to those at a distance of 1, 2, 4, ... in turn (every member hears of all
            others within log2(n) sends, without chance).
        seed: of what is drawn at random.
    """

    def __init__(self, topology: Topology, seed: int) -> None:
        if topology not in get_args(Topology):
            raise ValueError(f"topology must be one of {', '.join(get_args(Topology))} (got {topology!r})")
        self._topology = topology
        self._random = random.Random(seed)
        self._turn = 0

    def choose(self, rank: int, alive: Collection[int], ready: Collection[int]) -> int | None:
        """Return whom to send to; None if those to whom it is the turn are not `ready` (their last message is out).

        Args:
            rank: who sends.
            alive: all members, whether ready or not.
            ready: those that can be sent to now.
        """
        if self._topology == "uniform":
            candidates = sorted(set(ready) - {rank})
            return self._random.choice(candidates) if candidates else None
        ring = sorted(set(alive) | {rank})
        if len(ring) == 1:
            return None
        distances = _distances(self._topology, len(ring))
        chosen = ring[(ring.index(rank) + distances[self._turn % len(distances)]) % len(ring)]
        if chosen not in ready:
            return None
        self._turn += 1
        return chosen


def _distances(topology: Topology, size: int) -> list[int]:
    if topology == "ring":
        return [1]
    return [1 << power for power in range((size - 1).bit_length())]
