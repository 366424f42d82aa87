"""Receiver: keeps a link to one neighbour, answers what it asks, and adds its answers. One thread per neighbour."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta

import torch
from torch import Tensor

from asyncprop.exchange.link import CONNECT_S, Caller, Link, LinkBroken
from asyncprop.exchange.neighbour import Given, Neighbour
from asyncprop.exchange.pair import Side, answer_share, moved_per_answer
from asyncprop.exchange.shared import Shared
from asyncprop.exchange.wire import Garbage, Header, Kind, Values, check_finite

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
                    if link := caller.connect(lambda: self._goes_on(wait_s=CALL_EVERY_S)):
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
            link.receive(neighbour.received, timedelta(seconds=CONNECT_S))
            hello, _ = shared.wire.read(neighbour.received, neighbour.rank)
            if hello.kind != Kind.HELLO:
                raise Garbage(f"a message of kind {hello.kind} instead of a greeting")
            if given := neighbour.given:  # before this rank asks anything by the new link; the last may have lost it
                link.send(given.message, ANSWER)
            with shared.changed:
                shared.tally.lost += neighbour.relink(hello.sequence)
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
        link.receive(neighbour.received)
        header, chunks = shared.wire.read(neighbour.received, neighbour.rank)
        values = shared.wire.values(neighbour.received, chunks)
        check_finite(values)
        if header.kind == Kind.MERGED:
            with shared.changed:
                self._add(header, chunks, values)
                shared.changed.notify_all()
            shared.due.set()
        elif header.kind == Kind.CHUNKS:
            link.wait_sent(ANSWER)  # it has been received (see `neighbour`); its bytes are written next
            link.send(self._merge(header, chunks, values), ANSWER)

    def _merge(self, question: Header, chunks: list[int], values: Values) -> Tensor:
        """Draw near the neighbour's values, and return the answer; nothing is done if the ranks have met since.

        Guarantees: the answer is what these values were moved by, as far as other merges and sends can see.
        """
        shared, neighbour, members = self._shared, self._neighbour, self._shared.members
        with shared.changed:  # a message of after a meeting that is not over here waits for its end
            shared.changed.wait_for(
                lambda: shared.is_closed or (not shared.is_meeting and question.round <= members.round)
            )
            if shared.is_closed:
                raise LinkBroken("closed")
            if question.round != members.round or question.sequence <= neighbour.merged:
                shared.tally.late += 1
                shared.changed.notify_all()
                return self._short(Kind.MERGED, question.sequence)
            self._draw_near(question, values)
            header = Header(Kind.MERGED, shared.rank, question.sequence, members.round)
            message = shared.wire.write(neighbour.received, header, chunks)
            neighbour.note_answer(Given(question.sequence, question.weight, chunks, message))
            shared.tally.merged(question.length_bytes)
            shared.changed.notify_all()
            return message

    @torch.no_grad()
    def _draw_near(self, question: Header, values: Values) -> None:
        """Move the parameters towards the values, which become the answer.

        The race that is wanted: workers read and write θ meanwhile, so an increment of theirs may be lost, as between
        workers.
        """
        shared = self._shared
        asker, asked = Side(question.weight, question.besides), Side(shared.weight, shared.questions_out)
        back, per_answer = answer_share(asker, asked), moved_per_answer(asker, asked)
        device = shared.replica.device
        with device.use(shared.stream):
            parameters, answers = shared.beside(values)
            torch._foreach_sub_(answers, parameters)
            torch._foreach_mul_(answers, -back)
            for (_, value), answer in zip(values, answers, strict=True):
                if answer is not value:
                    value.copy_(answer, non_blocking=True)
                if answer.dtype != value.dtype:
                    answer.copy_(value, non_blocking=True)  # as rounded as what travels
            torch._foreach_add_(parameters, answers, alpha=per_answer)
            device.finish(shared.stream)

    def _add(self, answer: Header, chunks: list[int], values: Values) -> None:
        """Add an answer to whatever the parameters are by now, unless it has been settled, or was added before."""
        shared, neighbour = self._shared, self._neighbour
        neighbour.acknowledge(answer.sequence)
        out = neighbour.out
        if shared.is_meeting or answer.round != shared.members.round or not out or out.sequence != answer.sequence:
            return
        if chunks:
            if chunks != list(out.chunks):
                raise Garbage("an answer that was not asked for")
            shared.add(values, out.weight / shared.weight)
        shared.tally.delivered(neighbour.was_answered())

    def _short(self, kind: Kind, sequence: int) -> Tensor:
        header = Header(kind, self._shared.rank, sequence, self._shared.members.round)
        return self._shared.wire.write(self._neighbour.short, header)
