"""Link: the connection of two ranks, a process group of torch's own of which nobody else is part, over gloo.

A group of all ranks would be of no use to the others once one rank has died: gloo neither mends nor admits. A group of
two ends with either, and another is made when both are there again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from asyncprop.exchange.board import Board

MESSAGES, NOTHING = 1, 2
"""Tags: of all messages, and of none that is ever sent."""

CONNECT_S = 5.0
"""Seconds that two ranks which have both called each other may take to connect."""

NEVER = timedelta(days=365)
"""A peer that is silent is not cut for it: who is alive is for the members to say."""


class LinkBroken(ConnectionError):  # noqa: N818
    """The other rank is gone, or the link was cut."""


class Link:
    """One connection; both sides make it at the same time, with the same key.

    Args:
        store: to find each other.
        key: that no other connection has or had.
        is_first: which of the two this side is.
    """

    def __init__(self, store: Store, key: str, *, is_first: bool) -> None:
        self._other = 1 if is_first else 0
        self._out: dict[int, Any] = {}
        try:
            self._group: Any = ProcessGroupGloo(
                PrefixStore(key, store), 0 if is_first else 1, 2, timedelta(seconds=CONNECT_S)
            )
            self._group._set_default_timeout(NEVER)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error

    def send(self, message: Tensor, slot: int) -> None:
        """Begin to send, after what was last sent in this slot has left; `message` must stay as it is until then."""
        self.wait_sent(slot)
        try:
            self._out[slot] = self._group.send([message], self._other, MESSAGES)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error

    def wait_sent(self, slot: int) -> None:
        """Wait until what was last sent in this slot has left: its bytes may be written again."""
        try:
            if work := self._out.pop(slot, None):
                work.wait(NEVER)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error

    def receive(self, buffer: Tensor, patience: timedelta = NEVER) -> None:
        """Wait for a message, but not longer than this.

        Args:
            buffer: bytes, on the CPU, as many as the longest message has; it lies at their start afterwards.
            patience: until `LinkBroken` is raised.
        """
        try:
            self._group.recv([buffer], self._other, MESSAGES).wait(patience)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error

    def cut(self) -> None:
        """End the link for both sides; whoever waits in `receive` or `send`, on any thread, raises.

        gloo closes a pair when a wait on it is given up, and that is the only way to have it closed.
        """
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # the time-out that is wanted; or it is closed already
            self._group.recv([nothing], self._other, NOTHING).wait(timedelta(milliseconds=1))


class Caller:
    """Makes links to one peer, one after the other.

    The lower rank calls, by a number in the store that rises with each call; the other answers the newest call. Then
    both connect, under a key that has the number in it.
    """

    def __init__(self, board: Board, store: Store, rank: int, peer: int) -> None:
        self._board = board
        self._store = store.clone()  # type: ignore[attr-defined]  # connecting waits in it: it must be nobody else's
        self._is_first = rank < peer
        self._name = f"link/{min(rank, peer)}-{max(rank, peer)}"
        self._last = 0 if self._is_first else board.add(f"{self._name}/answer", 0)

    def connect(self, wait: Callable[[], bool]) -> Link | None:
        """Return a new link.

        Args:
            wait: waits for a moment, and tells whether to go on; if not, None is returned.
        """
        if self._is_first:
            self._last = self._board.add(f"{self._name}/calls", 1)
            while self._board.add(f"{self._name}/answer", 0) < self._last:
                if not wait():
                    return None
        else:
            while (call := self._board.add(f"{self._name}/calls", 0)) <= self._last:
                if not wait():
                    return None
            answered = self._board.add(f"{self._name}/answer", 0)
            self._board.add(f"{self._name}/answer", call - answered)
            self._last = call
        return Link(self._store, f"{self._name}/{self._last}", is_first=self._is_first)
