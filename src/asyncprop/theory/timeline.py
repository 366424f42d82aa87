"""Timeline: when each pass of F forward and K backward threads runs, counted event by event; no formula is used.

It is the slow obvious twin of `speedup` and `staleness`. Give it Fractions and its times are exact.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Time = float | Fraction
Update = Literal["layer", "block"]


@dataclass(frozen=True, slots=True)
class PassTimes:
    """When the two passes of batch `index` ran."""

    index: int
    forward_start: Time
    forward_end: Time
    backward_start: Time
    backward_end: Time


def simulate_passes(
    costs: Sequence[tuple[Time, Time]], F: int = 1, K: int = 2, L: int | None = None
) -> list[PassTimes]:
    """Run one batch after the other through F forward threads, a queue, and K backward threads.

    Args:
        costs: times of the forward and of the backward pass of each batch.
        F, K: forward and backward threads.
        L: passes in flight at most; None for no limit.

    Returns:
        The times of each batch, in the order of `costs`.
    """
    waiting: deque[int] = deque(range(len(costs)))
    losses: deque[int] = deque()
    events: list[tuple[Time, int, str]] = []
    times: list[list[Time]] = [[] for _ in costs]
    now: Time = Fraction(0)
    forward, backward, lanes = F, K, L if L is not None else len(costs)
    while True:
        while waiting and forward and lanes:
            batch = waiting.popleft()
            forward, lanes = forward - 1, lanes - 1
            times[batch] += [now, now + costs[batch][0]]
            heapq.heappush(events, (times[batch][1], batch, "forward"))
        while losses and backward:
            batch = losses.popleft()
            backward -= 1
            times[batch] += [now, now + costs[batch][1]]
            heapq.heappush(events, (times[batch][3], batch, "backward"))
        if not events:
            return [PassTimes(batch, *four) for batch, four in enumerate(times)]
        now, batch, kind = heapq.heappop(events)
        if kind == "forward":
            forward += 1
            losses.append(batch)
        else:
            backward, lanes = backward + 1, lanes + 1


def count_staleness(passes: Sequence[PassTimes], M: int, update: Update) -> list[list[int]]:
    """Count, for each pass and each layer from the input, the other passes' updates between its read and its write.

    Each of M layers takes an equal part of a pass. A layer is read when the forward pass comes to it, and written when
    the backward pass is through with it (`"layer"`) or ends (`"block"`). A write at the very moment of a read is seen
    by it; of writes at one moment, those of earlier batches come first.
    """
    counts: list[list[int]] = [[] for _ in passes]
    for layer in range(M):
        reads = [one.forward_start + (one.forward_end - one.forward_start) * layer / M for one in passes]
        writes = [(_written(one, layer, M, update), one.index) for one in passes]
        order = sorted(writes)
        for place, (read, write) in enumerate(zip(reads, writes, strict=True)):
            seen = bisect_right(order, (read, len(passes)))
            counts[place].append(bisect_left(order, write) - seen)
    return counts


def _written(one: PassTimes, layer: int, M: int, update: Update) -> Time:
    if update == "block":
        return one.backward_end
    return one.backward_start + (one.backward_end - one.backward_start) * (M - layer) / M
