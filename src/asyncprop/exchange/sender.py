"""Sender: the one thread that asks: with what is due, the neighbour whose turn it is."""

from __future__ import annotations

import contextlib

import torch

from asyncprop.exchange.due import Due
from asyncprop.exchange.link import LinkBroken
from asyncprop.exchange.neighbour import Neighbour
from asyncprop.exchange.peers import Peers
from asyncprop.exchange.shared import Shared
from asyncprop.exchange.wire import Header, Kind

MESSAGE = 0
"""The slot of a link in which the send thread sends."""


class Sender:
    """Sends chunks that have been updated; the newest values only, and to neighbours that have received the last ones.

    Args:
        shared: with the exchange's other threads.
        peers: who is next.
        period, probability, seed: as for `LayerGossip`.
    """

    def __init__(self, shared: Shared, peers: Peers, *, period: int, probability: float, seed: int) -> None:
        self._shared, self._peers = shared, peers
        self._due = Due(shared.updates, period=period, probability=probability, seed=f"{seed} {shared.rank}")

    def run(self) -> None:
        """Send whatever is due, until the exchange is closed."""
        shared = self._shared
        while not shared.is_closed:
            shared.due.wait()
            shared.due.clear()
            shared.unsent_bytes = 0
            self.send_due()

    def send_due(self) -> None:
        """Send what is due now; what nobody can be sent now stays due."""
        wire, chunks = self._shared.wire, self._due.chunks()
        while chunks and (neighbour := self._choose()):
            count = wire.fill(chunks)
            self._send(neighbour, chunks[:count])
            chunks = chunks[count:]

    def _choose(self) -> Neighbour | None:
        shared = self._shared
        with shared.changed:
            if shared.is_meeting or shared.is_closed:
                return None
            linked = [rank for rank, neighbour in shared.neighbours.items() if neighbour.link]
            ready = [rank for rank in linked if shared.neighbours[rank].is_ready]
            chosen = self._peers.choose(shared.rank, linked, ready)
            return None if chosen is None else shared.neighbours[chosen]

    @torch.no_grad()
    def _send(self, neighbour: Neighbour, chunks: list[int]) -> None:
        """Send these chunks as they are now.

        Guarantees: they are out until they are answered or forgotten. The race that is wanted: workers write θ while
        it is copied, so a layer may travel half updated.
        """
        shared, wire = self._shared, self._shared.wire
        with shared.changed:
            link = neighbour.link
            if shared.is_meeting or link is None or not neighbour.is_ready:
                return
            besides = shared.questions_out
            number = neighbour.ask(chunks, shared.weight)
            header = Header(Kind.CHUNKS, shared.rank, number, shared.members.round, shared.weight, besides)
            message = wire.write(neighbour.sent, header, chunks)
            for chunk in chunks:
                shared.tally.superseded += max(0, self._due.sent(chunk) - 1)
            device = shared.replica.device
            with device.use(shared.stream):
                values = wire.values(message, chunks)
                parameters = [part.of(shared.parameters) for part, _ in values]
                torch._foreach_copy_([value for _, value in values], parameters, non_blocking=True)
                device.finish(shared.stream)
            shared.tally.sent(message.numel())
            shared.changed.notify_all()
        with contextlib.suppress(LinkBroken):  # the receiving thread sees it, too
            link.send(message, MESSAGE)
