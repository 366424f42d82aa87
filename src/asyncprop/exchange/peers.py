"""Peers: to whom a layer goes next, by topology."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal, get_args

Topology = Literal["uniform", "ring", "exponential"]


class Peers:
    """Chooses among the members that there are links to. Not thread-safe: the send thread's own.

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

    def choose(self, rank: int, linked: Collection[int], ready: Collection[int]) -> int | None:
        """Return whom to send to; None if nobody is `ready` to whom it may go.

        Args:
            rank: who sends.
            linked: the members that there are links to, whether ready or not. One that is alive and has none yet, or
                no more, is no member of the ring: who waited for it would send to nobody.
            ready: those of them that can be sent to now: their last message is not out any more.
        """
        if self._topology == "uniform":
            candidates = sorted(set(ready) - {rank})
            return self._random.choice(candidates) if candidates else None
        ring = sorted({*linked, rank})
        distances = _distances(self._topology, len(ring))
        for turn in range(self._turn, self._turn + len(distances)):
            chosen = ring[(ring.index(rank) + distances[turn % len(distances)]) % len(ring)]
            if chosen in ready and chosen != rank:
                self._turn = turn + 1
                return chosen
        return None


def _distances(topology: Topology, size: int) -> list[int]:
    """Return how far on the ring those are that are sent to, in turn; who is not ready is skipped."""
    if topology == "ring":
        return [1]
    return [1 << power for power in range((size - 1).bit_length())]
