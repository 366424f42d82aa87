"""Receiver: keeps a link to one neighbour, and merges what comes by it. One thread per neighbour."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta

import torch
from torch import Tensor

from asyncprop.exchange.link import CONNECT_S, Caller, Link, LinkBroken
from asyncprop.exchange.neighbour import Neighbour
from asyncprop.exchange.shared import Shared
from asyncprop.exchange.wire import Entry, Garbage, Header, Kind, check_finite

ANSWER = 1
"""The slot of a link in which the receiving thread sends."""

CALL_EVERY_S = 0.01
"""Seconds between two looks whether the neighbour has answered a call."""

log = logging.getLogger("asyncprop")


class Receiver:
    """The work of one receiving thread.

    Args:
        shared: with the exchange's other threads.
        neighbour: from whom.
    """

    def __init__(self, shared: Shared, neighbour: Neighbour) -> None:
        self._shared, self._neighbour = shared, neighbour

    def run(self) -> None:
        """Keep a link, and merge what comes, until one of the two ranks is gone, or the neighbour sends garbage."""
        shared, neighbour = self._shared, self._neighbour
        caller = Caller(shared.members.board.clone(), shared.store, shared.rank, neighbour.rank)
        while self._goes_on():
            with contextlib.suppress(LinkBroken):
                try:
                    if link := caller.connect(neighbour.received, lambda: self._goes_on(wait_s=CALL_EVERY_S)):
                        self._serve(link)
                except Garbage as error:
                    neighbour.refused = True
                    shared.tally.refused += 1
                    said = "rank %d: rank %d is cut off: it sent %s; nothing of it is merged"
                    log.warning(said, shared.rank, neighbour.rank, error)

    def _goes_on(self, *, wait_s: float = 0.0) -> bool:
        """Tell, after a moment, whether there is still reason to have a link; if not, the thread is to end."""
        shared, neighbour = self._shared, self._neighbour
        with shared.changed:
            if wait_s:
                shared.changed.wait_for(lambda: shared.is_closed, wait_s)
            if not shared.is_closed and not neighbour.refused and neighbour.rank in shared.members.alive:
                return True
            neighbour.stop()
            shared.changed.notify_all()
            return False

    def _serve(self, link: Link) -> None:
        shared, neighbour = self._shared, self._neighbour
        try:
            link.send(self._short(Kind.HELLO, neighbour.merged), ANSWER)
            hello, _ = shared.wire.read(link.receive(timedelta(seconds=CONNECT_S)), neighbour.rank)
            if hello.kind != Kind.HELLO:
                raise Garbage(f"a message of kind {hello.kind} instead of a greeting")
            with shared.changed:
                if not shared.is_meeting:  # a meeting itself settles what is out
                    shared.tally.returned += neighbour.resolve(shared.weights, hello.sequence)
                if shared.is_closed:
                    return
                neighbour.link = link
                shared.changed.notify_all()
            shared.due.set()
            while True:
                self._take(link)
        finally:
            with shared.changed:
                neighbour.link = None
                shared.changed.notify_all()
            link.cut()

    def _take(self, link: Link) -> None:
        shared, neighbour = self._shared, self._neighbour
        header, entries = shared.wire.read(link.receive(), neighbour.rank)
        if header.kind == Kind.MERGED:
            with shared.changed:
                shared.tally.delivered(neighbour.was_merged(header.sequence))
                shared.changed.notify_all()
            shared.due.set()
        elif header.kind == Kind.LAYERS:
            values = shared.wire.values(neighbour.received, [layer for layer, _ in entries])
            check_finite(values)
            self._merge(header, entries, values)
            link.send(self._short(Kind.MERGED, header.sequence), ANSWER)

    @torch.no_grad()
    def _merge(self, header: Header, entries: list[Entry], values: list[list[tuple[str, Tensor]]]) -> None:
        """Merge a message's layers, unless the ranks have met since it was sent.

        Guarantees: weight and value of a layer change together, as far as other merges and sends can see. The race
        that is wanted: workers read and write θ meanwhile, so an increment of theirs may be lost, as between workers.
        """
        shared, neighbour, members = self._shared, self._neighbour, self._shared.members
        with shared.changed:  # a message of after a meeting that is not over here waits for its end
            shared.changed.wait_for(
                lambda: shared.is_closed or (not shared.is_meeting and header.round <= members.round)
            )
            if shared.is_closed:
                raise LinkBroken("closed")
            if header.round != members.round or header.sequence <= neighbour.merged:
                shared.tally.late += 1
                shared.changed.notify_all()
                return
            device = shared.replica.device
            with device.use(shared.stream):
                for (layer, weight), parts in zip(entries, values, strict=True):
                    share = shared.weights.take(layer, weight)
                    for name, value in parts:
                        parameter = shared.parameters[name].data
                        parameter.lerp_(value.to(parameter.device, parameter.dtype, non_blocking=True), share)
                device.finish(shared.stream)
            neighbour.merged = header.sequence
            shared.tally.merged(header.length_bytes)
            shared.changed.notify_all()

    def _short(self, kind: Kind, sequence: int) -> Tensor:
        header = Header(kind, self._shared.rank, sequence, self._shared.members.round)
        return self._shared.wire.write(self._neighbour.short, header)
