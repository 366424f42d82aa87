"""Shared: what an exchange's threads share, under one lock that workers never take."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from asyncprop.engine.exchange import Replica
from asyncprop.exchange.link import CONNECT_S
from asyncprop.exchange.members import Members
from asyncprop.exchange.neighbour import Buffers, Given, Neighbour
from asyncprop.exchange.pair import FAIR_SHARE
from asyncprop.exchange.tally import GossipTally
from asyncprop.exchange.wire import Values, Wire

GRACE_S = CONNECT_S + 2.0
"""Seconds that `join` waits for each thread: one that is connecting to a dead rank ends with its time-out."""


class Shared:
    """The replica, its weight in the mean of all, and the others.

    Attributes:
        changed: the lock of all below, and where threads wait for its changes.
        due: set when there may be something to send.
        weight: of this rank.
        offered: of its weight, what a rank that joins may be given; it is not in `weight`.
        is_meeting: from this rank's coming to a meeting until it has the result: nothing is sent, merged or given.
        is_closed: everything is to end.
        neighbours: by rank; replaced, never changed, so that it can be read without the lock.
        updates: of each chunk since it was last sent (see `LayerGossip.landed`).
    """

    def __init__(self, replica: Replica, members: Members, store: Store, wire: Wire, tally: GossipTally) -> None:
        self.replica, self.members, self.store, self.wire, self.tally = replica, members, store, wire, tally
        self.parameters = dict(replica.model.named_parameters())
        self.stream = replica.device.stream("exchange")
        self.weight, self.offered = FAIR_SHARE, 0.0
        self.updates = [0] * wire.count
        self.unsent_bytes = 0
        self.buffers = Buffers(replica.device.buffer, wire.message_bytes)
        self.neighbours: dict[int, Neighbour] = {}
        self.changed = threading.Condition()
        self.due = threading.Event()
        self.is_meeting = self.is_closed = False
        self._threads: list[threading.Thread] = []

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self.members.rank

    @property
    def questions_out(self) -> int:
        """How many neighbours are to answer yet; those that have gone are not counted."""
        return sum(neighbour.out is not None and neighbour.link is not None for neighbour in self.neighbours.values())

    @torch.no_grad()
    def add(self, values: Values, factor: float) -> None:
        """Add an answer's values, times `factor`, to the parameters. Whoever calls holds the lock."""
        device = self.replica.device
        with device.use(self.stream):
            parameters, added = self.beside(values)
            torch._foreach_add_(parameters, added, alpha=factor)
            device.finish(self.stream)

    def beside(self, values: Values) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters, and the values where these are and of their type: the same tensors if they are.

        For calls that take many tensors: each call of its own would take Python's lock from the workers.
        """
        parameters = [part.of(self.parameters) for part, _ in values]
        pairs = zip(values, parameters, strict=True)
        return parameters, [value.to(own.device, own.dtype, non_blocking=True) for (_, value), own in pairs]

    def undo(self, given: Given) -> None:
        """Take back what an answer has moved the parameters by. Whoever calls holds the lock."""
        self.tally.undone += 1
        self.add(self.wire.values(given.message, given.chunks), given.weight / self.weight)

    def begin_meeting(self) -> None:
        """Send, merge and give nothing any more: what is offered counts at this meeting as this rank's own."""
        with self.changed:
            self.is_meeting = True
            self.take_back()

    def take_back(self) -> None:
        """Offer nothing any more. Whoever calls holds the lock.

        What this rank has become since it offered is what its whole weight counts for: so much moves the mean.
        """
        self.weight, self.offered = self.weight + self.offered, 0.0

    def end_meeting(self, weight: float = FAIR_SHARE) -> None:
        """Go on, with this weight. What was updated before needs no sending."""
        with self.changed:
            self.weight = weight
            self.updates[:] = [0] * len(self.updates)
            self.is_meeting = False
            self.changed.notify_all()

    def start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Start a thread of the exchange; its failure ends the training."""

        def run() -> None:
            try:
                with self.replica.device.thread(1):
                    work()
            except BaseException as error:
                if not self.is_closed:
                    self.replica.fail(error)

        thread = threading.Thread(target=run, name=f"asyncprop-gossip-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def close(self) -> None:
        """Let all threads end: cut what they wait at."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            links = [neighbour.link for neighbour in self.neighbours.values() if neighbour.link]
        self.due.set()
        for link in links:
            link.cut()

    def join(self) -> None:
        """Wait for all threads."""
        for thread in self._threads:
            thread.join(GRACE_S)
