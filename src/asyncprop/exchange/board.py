"""Board: where ranks leave each other values of any length, in torch's store."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

PIECE_BYTES = 4 << 20
"""Longest value of one key: torch's store refuses 8 MiB."""

POLL_S = 0.003
"""Seconds between two looks for a value that is not there yet."""

T = TypeVar("T")


class StoreLostError(ConnectionError):
    """The store does not answer any more: the process that holds it is gone."""


class Board:
    """One connection to the store. Threads that must not wait for each other need one each: see `clone`.

    Values are pickled, so whoever can write to the store is trusted, as everywhere in torch.distributed.
    """

    def __init__(self, store: Store) -> None:
        self._store: Any = store.clone()  # type: ignore[attr-defined]

    def clone(self) -> Board:
        """Return another connection to the same store."""
        return Board(self._store)

    def put(self, key: str, value: Any) -> None:
        """Set a key. Whoever finds it finds the whole value."""
        data = pickle.dumps(value)
        pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
        for number in range(1, len(pieces)):
            self._set(f"{key}/{number}", pieces[number])
        self._set(key, len(pieces).to_bytes(4, "little") + pieces[0])

    def get(self, key: str, give_up: Callable[[], None] = lambda: None) -> Any:
        """Return the value of a key. Wait for it, calling `give_up` now and then, which may raise."""
        while not self.has(key):
            give_up()
            time.sleep(POLL_S)
        return self.find(key)

    def find(self, key: str) -> Any:
        """Return the value of a key, which is there.

        Raises:
            KeyError: if it has been deleted, or is being deleted.
        """
        head = self._get(key)
        pieces = [head[4:], *(self._get(f"{key}/{number}") for number in range(1, int.from_bytes(head[:4], "little")))]
        return pickle.loads(b"".join(pieces))

    def has(self, *keys: str) -> bool:
        """Tell whether all these keys have a value."""
        return _ask(lambda: bool(self._store.check(list(keys))))

    def delete(self, key: str) -> None:
        """Delete a key and its value; nothing, if there is none."""
        if self.has(key):
            pieces = int.from_bytes(self._get(key)[:4], "little")
            for name in (key, *(f"{key}/{number}" for number in range(1, pieces))):
                _ask(lambda: self._store.delete_key(name))  # noqa: B023 (called at once)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return its value."""
        return _ask(lambda: int(self._store.add(key, amount)))

    def settle(self, key: str, value: str) -> str:
        """Set a key unless it is set; return what it is set to, for all alike."""
        return _ask(lambda: str(self._store.compare_set(key, "", value).decode()))

    def _set(self, key: str, data: bytes) -> None:
        _ask(lambda: self._store.set(key, data))

    def _get(self, key: str) -> bytes:
        if not self.has(key):  # torch would wait for it
            raise KeyError(key)
        return _ask(lambda: bytes(self._store.get(key)))


def _ask(call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:  # torch's DistNetworkError is one
        raise StoreLostError("torch's store does not answer: the process that holds it has ended") from error
