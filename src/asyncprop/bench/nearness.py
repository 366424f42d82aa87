"""Nearness: how long a cache line takes from one core to another.

Threads that share parameters send them from core to core; independent processes do not. On a virtual machine the host
moves cores between caches and sockets from one second to the next, so a benchmark must tell how near they were.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from types import TracebackType
from typing import Any, Self

EXCHANGES = 1000
"""There and back, in one try."""
TRIES = 5
"""The fastest try counts: in the others something else ran meanwhile."""


class Nearness:
    """Two processes on the first two cores that this one may use, which hand a cache line to and fro when asked.

    `handover_ns` is None where there is one core only, or processes cannot be kept on a core.
    """

    def __init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._players: list[Any] = []
        self._pipes: list[Connection] = []
        if len(cores) < 2:
            return
        context = multiprocessing.get_context("spawn")
        ball = RawArray("q", 16)  # two cache lines, so that the first is not shared with anything else
        for side in (0, 1):
            ours, theirs = context.Pipe()
            player = context.Process(target=_play, args=(ball, side, cores[side], theirs), daemon=True)
            player.start()
            theirs.close()
            self._players.append(player)
            self._pipes.append(ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for player in self._players:
            player.kill()
            player.join()

    def handover_ns(self) -> float | None:
        """Return the nanoseconds from a write on one core to its being seen, and answered, on the other.

        Most of it is Python's own time (about 100 ns): what is told is how it differs from moment to moment.
        """
        if not self._pipes:
            return None
        return min(self._try() for _ in range(TRIES))

    def _try(self) -> float:
        for pipe in self._pipes:
            pipe.send(EXCHANGES)
        seconds = [float(pipe.recv()) for pipe in self._pipes]
        return 1e9 * seconds[0] / (2 * EXCHANGES)


def _play(ball: Any, side: int, core: int, pipe: Connection) -> None:
    os.sched_setaffinity(0, {core})
    turn = side  # even turns are the first player's, odd ones the second's; they go on from try to try
    while True:
        try:
            exchanges = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        for _ in range(exchanges):
            while ball[0] != turn:
                pass
            ball[0] = turn + 1
            turn += 2
        pipe.send(time.perf_counter() - start)
