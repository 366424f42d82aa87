"""Recorder: notes what each thread does, without locks, for a Trace."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter

from asyncprop.trace import Event, Kind, Trace

_Row = tuple[Kind, float, float, int, int, int, str]


class Recorder:
    """What an `Engine(..., trace=Recorder())` notes its events in; `trace()` gives them, at any time.

    Args:
        limit: events that are kept of each thread, the newest; None keeps all (some 200 bytes each, and for a model of
            40 layers 130 a batch).
        rank: of this process.
    """

    def __init__(self, limit: int | None = None, rank: int = 0) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1 (got {limit})")
        self.now: Callable[[], float] = perf_counter
        self._limit, self._rank = limit, rank
        self._layers: tuple[str, ...] = ()
        self._opened_s: float | None = None
        self._threads: list[tuple[int, str, deque[_Row]]] = []  # rank, name
        self._local = threading.local()

    def open(self, layers: tuple[str, ...], now: Callable[[], float]) -> None:
        """Learn the layers' names and the clock; the first call is time 0."""
        self._layers, self.now = layers, now
        if self._opened_s is None:
            self._opened_s = now()

    def of_rank(self, rank: int) -> Recorder:
        """Return the recorder of another rank in this process; its events are in this one's trace, too."""
        other = Recorder(self._limit, rank)
        other._threads = self._threads
        return other

    def add(
        self, kind: Kind, start: float, end: float, lane: int = -1, batch: int = -1, layer: int = -1, detail: str = ""
    ) -> None:
        """Note an event of the calling thread; times are readings of `now`.

        Guarantees: nothing is lost. Assumes: each thread appends to a list of its own.
        """
        try:
            rows: deque[_Row] = self._local.rows
        except AttributeError:
            rows = self._local.rows = deque(maxlen=self._limit)
            self._threads.append((self._rank, threading.current_thread().name, rows))  # appending is atomic in CPython
        rows.append((kind, start, end, lane, batch, layer, detail))

    def trace(self) -> Trace:
        """Return what has been noted so far."""
        zero = self._opened_s or 0.0
        threads = sorted(self._threads, key=lambda thread: thread[:2])
        events = [
            Event(kind, start - zero, end - zero, number, rank, lane, batch, layer, detail)
            for number, (rank, _, rows) in enumerate(threads)
            for kind, start, end, lane, batch, layer, detail in tuple(rows)
        ]
        events.sort(key=lambda event: event.start_s)
        return Trace(self._layers, tuple(name.removeprefix("asyncprop-") for _, name, _ in threads), events)
