"""Channel: a bounded queue between threads, of which the free lanes are one; closing it ends those who wait."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from asyncprop.clock import SYSTEM, Clock

T = TypeVar("T")


class Closed(Exception):  # noqa: N818 (not an error: the end of a channel)
    """The channel was closed: there is nothing more to get, and nobody to put for."""


class Channel(Generic[T]):
    """First in, first out; `put` waits while `capacity` items wait, `get` waits while none does."""

    def __init__(self, capacity: int, clock: Clock = SYSTEM) -> None:
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = clock.condition()

    def put(self, item: T) -> int:
        """Append `item`, wait for room if need be, and return how many items now wait; raise Closed once closed."""
        with self._changed:
            while not self._closed and len(self._items) >= self.capacity:
                self._changed.wait()
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()
            return len(self._items)

    def get(self) -> T:
        """Take the oldest item, wait for one if need be; raise Closed once the channel is closed and empty."""
        with self._changed:
            while not self._items:
                if self._closed:
                    raise Closed
                self._changed.wait()
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def swap(self, item: T, wanted: T) -> None:
        """Put `item` in the place of `wanted`, which must be there."""
        with self._changed:
            self._items[self._items.index(wanted)] = item

    def close(self, *, discard: bool = False) -> None:
        """Refuse further items; those that wait can still be had unless `discard`."""
        with self._changed:
            self._closed = True
            if discard:
                self._items.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._items)
