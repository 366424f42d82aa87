"""Neighbour: another member as this rank knows it: the link to it, and what of that was sent is not yet known merged.

One message at most is out to a neighbour: the next may go when it has said `MERGED`. A neighbour that hangs therefore
holds one message's weight and no more, and one that is slow to merge gets newer values instead of a queue of old ones.
After a link was cut, each side says which message of the other's it merged last; what was out and is later than that
is taken back. So weight is neither lost nor doubled, however often links break. (What is taken back counts for the
sender's present values: the ones that were on their way are older than these.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncprop.exchange.link import Link
from asyncprop.exchange.weights import Weights
from asyncprop.exchange.wire import HEADER_BYTES, Entry


@dataclass(frozen=True, slots=True)
class Out:
    """A message that is out: its number, what was given away with it, and when."""

    sequence: int
    entries: list[Entry]
    sent_at: float


class Neighbour:
    """The state of one neighbour; the exchange's lock guards all of it but the buffers.

    Args:
        rank: its number.
        make_buffer: makes a buffer of so many bytes that tensors are copied to and from fast.
        message_bytes: of the longest message.

    Attributes:
        link: to it; None while there is none.
        out: the message that is not known merged.
        sequence: number of the last message to it.
        merged: number of its last message that was merged here.
        refused: whether it has sent garbage: nothing more is taken from it.
        sent, received: a message's bytes; the send thread's, and the receiving thread's. Empty until `start`.
        short: a message without layers; the receiving thread's.
    """

    def __init__(self, rank: int, make_buffer: Callable[[int], Tensor], message_bytes: int) -> None:
        self.rank = rank
        self.link: Link | None = None
        self.out: Out | None = None
        self.sequence = self.merged = 0
        self.refused = False
        self.thread: threading.Thread | None = None
        self._make_buffer, self._message_bytes = make_buffer, message_bytes
        self.sent = self.received = torch.empty(0, dtype=torch.uint8)
        self.short = torch.empty(HEADER_BYTES, dtype=torch.uint8)

    def start(self) -> None:
        """Make the buffers that its threads need."""
        self.sent, self.received = self._make_buffer(self._message_bytes), self._make_buffer(self._message_bytes)

    def stop(self) -> None:
        """Note that its thread ends, and give the buffers back: ranks that have died must not cost memory."""
        self.thread = None
        self.sent = self.received = torch.empty(0, dtype=torch.uint8)

    @property
    def is_ready(self) -> bool:
        """Whether a message may be sent to it."""
        return self.link is not None and self.out is None

    def give(self, weights: Weights, layers: list[int]) -> list[Entry]:
        """Take the layers' weights for the next message out of `weights`; from now on it is out."""
        assert self.is_ready
        self.sequence += 1
        entries = [(layer, weights.give(layer)) for layer in layers]
        self.out = Out(self.sequence, entries, time.perf_counter())
        return entries

    def was_merged(self, sequence: int) -> float | None:
        """Note that it has merged a message; return the seconds that took, if it is the one that is out."""
        if self.out is None or self.out.sequence != sequence:
            return None
        seconds = time.perf_counter() - self.out.sent_at
        self.out = None
        return seconds

    def resolve(self, weights: Weights, merged: int) -> bool:
        """Take back what is out, if it is later than the last message that the neighbour merged; tell whether it was.

        Args:
            weights: where it goes back to.
            merged: the last message of this rank that the neighbour merged; it merges no older one after saying so.
        """
        out, self.out = self.out, None
        if out is None or out.sequence <= merged:
            return False
        weights.take_back(out.entries)
        return True
