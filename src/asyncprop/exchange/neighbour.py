"""Neighbour: another member as this rank knows it: the link to it, what was asked of it, and what it was answered.

One question at most is out to a neighbour: the next may go when the last has been acknowledged, by its answer or as
too late for one. So one that is slow gets newer values instead of a queue of old ones; and when a question comes, the
answer to the one before has been received, so no two ranks can wait for each other to receive. The answerer keeps its
last answer until the next question. After a link was cut, each side says which question of the other's it merged last:
one that is later was lost and is forgotten; else its answer is sent again. At a meeting all is settled: what was not
answered is forgotten, and what was answered and not added is undone by the answerer. So the sum of all values is kept,
however often links break.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncprop.exchange.link import Link
from asyncprop.exchange.wire import HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Out:
    """A question that is out: its number, its chunks, this rank's weight when it was asked, and when that was."""

    sequence: int
    chunks: Sequence[int]
    weight: float
    sent_at: float


@dataclass(frozen=True, slots=True)
class Given:
    """An answer: to which question, with what weight that was asked, of which chunks, and the message."""

    sequence: int
    weight: float
    chunks: Sequence[int]
    message: Tensor


class Neighbour:
    """The state of one neighbour; the exchange's lock guards all of it but the buffers.

    Args:
        rank: its number.
        buffers: where the buffers of messages come from.

    Attributes:
        link: to it; None while there is none.
        out: the question that is not known to be answered.
        given: the last answer to it, until it is known to have arrived.
        sequence: number of the last question to it.
        answered: number of the last of them that needs no answer any more.
        acknowledged: number of the last of them that the neighbour has received, or never will.
        merged: number of its last question that was merged here.
        refused: whether it has sent garbage: nothing more is taken from it.
        sent: the question that is out, in bytes; the send thread's.
        received, answer: what comes, and the answer to it, in bytes; the receiving thread's. They change places.
        short: a message without chunks; the receiving thread's.
    """

    def __init__(self, rank: int, buffers: Buffers) -> None:
        self.rank = rank
        self.link: Link | None = None
        self.out: Out | None = None
        self.given: Given | None = None
        self.sequence = self.answered = self.acknowledged = self.merged = 0
        self.refused = False
        self.thread: threading.Thread | None = None
        self._buffers = buffers
        self.sent = self.received = self.answer = NO_BYTES
        self.short = torch.empty(HEADER_BYTES, dtype=torch.uint8)

    def start(self) -> None:
        """Take the buffers that its threads need."""
        self.received, self.answer = self._buffers.take(), self._buffers.take()

    def stop(self) -> None:
        """Note that its thread ends, and give the buffers up: ranks that have died must not cost memory."""
        self.thread = None
        self.sent = self.received = self.answer = NO_BYTES

    @property
    def is_ready(self) -> bool:
        """Whether it may be asked."""
        return self.link is not None and self.out is None and self.acknowledged == self.sequence

    def ask(self, chunks: Sequence[int], weight: float) -> int:
        """Note a question, which is out from now on, and return its number; `sent` is a buffer to write it in."""
        assert self.is_ready
        if not self.sent.numel():
            self.sent = self._buffers.take()
        self.sequence += 1
        self.out = Out(self.sequence, chunks, weight, time.perf_counter())
        return self.sequence

    def acknowledge(self, sequence: int) -> None:
        """Note that the neighbour has received a question: its bytes may be written again."""
        self.acknowledged = max(self.acknowledged, min(sequence, self.sequence))
        if self.acknowledged == self.sequence and self.sent.numel():
            self._buffers.give_back(self.sent)
            self.sent = NO_BYTES

    def was_answered(self) -> float:
        """Note that what was out is answered, and return the seconds that took."""
        assert self.out
        seconds = time.perf_counter() - self.out.sent_at
        self.answered, self.out = self.out.sequence, None
        return seconds

    def relink(self, merged: int) -> bool:
        """Forget what is out if it was lost with the last link; tell whether it was. Nothing is on its way any more.

        Args:
            merged: the last question of this rank's that the neighbour has merged; it merges no older one after that.
        """
        self.acknowledge(self.sequence)
        if self.out is None or self.out.sequence <= merged:
            return False
        self.answered, self.out = self.out.sequence, None
        return True

    def settle(self) -> bool:
        """Forget what is out, at a meeting; tell whether anything was. It may still be on its way."""
        was_out, self.out = self.out is not None, None
        self.answered = self.sequence
        return was_out

    def undo(self, answered: int) -> Given | None:
        """Return the last answer if it is to be undone, as the neighbour has not added it.

        Args:
            answered: the neighbour's.
        """
        given, self.given = self.given, None
        return given if given and given.sequence > answered else None

    def note_answer(self, given: Given) -> None:
        """Keep an answer that was made where the question lay; what comes next is received elsewhere."""
        self.given, self.merged = given, given.sequence
        self.received, self.answer = self.answer, self.received


class Buffers:
    """Buffers for messages, each for whoever has it out; there are as many as were ever needed at once.

    Args:
        make: makes a buffer of so many bytes that tensors are copied to and from fast.
        message_bytes: of the longest message.
    """

    def __init__(self, make: Callable[[int], Tensor], message_bytes: int) -> None:
        self._make, self._message_bytes = make, message_bytes
        self._spare: list[Tensor] = []

    def take(self) -> Tensor:
        """Return one that nobody has."""
        return self._spare.pop() if self._spare else self._make(self._message_bytes)

    def give_back(self, buffer: Tensor) -> None:
        """Let others have it."""
        self._spare.append(buffer)


NO_BYTES = torch.empty(0, dtype=torch.uint8)
