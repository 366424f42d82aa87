"""Members: who is alive among the ranks, and what they agree on, by torch's store alone; a death holds up nobody long.

Each member announces itself, counts its heartbeats in the store, and watches the others' counts. Where ranks must agree
(`meet`, `gather`), the first that has heard of everybody alive proposes who takes part, by one compare-and-set in the
store: whatever was proposed first is what all go by. A member that was taken for dead finds itself left out, and knows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from asyncprop.exchange.attendance import Attendance, set_key
from asyncprop.exchange.board import POLL_S, Board, StoreLostError
from asyncprop.exchange.donor import Donor
from asyncprop.exchange.handover import GIVEN, WITHDRAWN, Handover, key_of
from asyncprop.exchange.told import Told

TIMEOUT_S = 10.0
"""Seconds of silence after which the others go on without a rank, unless given."""

START_TIMEOUT_S = 300.0
"""Seconds that ranks of the start may take to announce themselves: the slowest has yet to import PyTorch."""

LATE_S = 30.0
"""Seconds after which a rank says for whom it waits at the start."""

KEPT_ROUNDS = 2
"""Meetings whose values stay in the store: a slower member may still be reading them."""

log = logging.getLogger("asyncprop")


class LeftOut(RuntimeError):  # noqa: N818 (no failure of the run: the others went on without this rank)
    """The others took this rank for dead and went on: it must join anew."""


class Members:
    """One rank among the others. Between `open` and `close` threads keep its heartbeat, and answer those that join.

    Args:
        store: that all ranks share; give it a prefix.
        size: how many ranks there are at the start; a rank that joins reads it in the store.
        rank: this rank's number, from 0 to size - 1; None for one that joins later and is given the next free number.
        timeout_s: a rank that was not heard of for so long is dropped. Shorter drops the dead sooner, and also those
            that only hang: these can join anew. A rank that joins has that of the others.
        clock: seconds; for tests.
        holds_store: whether the store ends with this process: `close` then waits until the others have left, too.

    Attributes:
        rank: this rank's number, once opened.
        joins: whether this rank has yet to take over the training from another (see `ask`).
        among: those that took part in the last `meet` or `gather`; at first, the ranks of the start.
        round: number of meetings so far.
        lost: those that were dropped, as they were silent or have failed, with the time (`time.time()`) at which it
            happened. It is never changed, but another takes its place: whoever reads it has it whole.
        failure: what ended the threads.
        changed: called, by a thread, with a member's number and whether it is alive, when that changes.
        offers: what a rank that joins is given, by name; called by a thread, in this order. If one returns None,
            nothing is given now.
        part_with: called, by a thread, with what gives away all that was offered, and tells whether it is still wanted;
            it may call that or not, and returns whether it is given. By default it calls it.
        given: what this rank was given when it joined, until somebody has taken it over.
        store: as given.
    """

    def __init__(
        self,
        store: Store,
        size: int,
        rank: int | None,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        holds_store: bool = False,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0 (got {timeout_s})")
        self.store, self.size, self.timeout_s = store, size, timeout_s
        self.joins = rank is None
        self.rank = -1 if rank is None else rank
        self.among: tuple[int, ...] = tuple(range(size))
        self.round = self._turn = 0
        self.lost: dict[int, float] = {}
        self.failure: BaseException | None = None
        self.changed: list[Callable[[int, bool], None]] = []
        self.offers: dict[str, Callable[[], Any]] = {}
        self.part_with: Callable[[Callable[[], bool]], bool] = lambda give: give()
        self.given: dict[str, Any] | None = None
        self.board, self._beats = Board(store), Board(store)
        self._clock, self._holds_store = clock, holds_store
        self._heard: dict[int, tuple[int, float]] = {}
        self._has_told_of_late = False
        self._alive: set[int] = set(range(size))
        self._gone: set[int] = set()
        self._attendance = Attendance(self.board, size)
        self._said: deque[tuple[int, str]] = deque()  # meetings, and keys at which this rank spoke
        self._donor = Donor(store)
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        """Announce this rank, and start its heartbeat."""
        self.announce()
        # Answers have a thread of their own: to pack a large model takes longer than silence is borne.
        self._threads = [self._start("members", self.look), self._start("answers", self.answer)]

    def announce(self) -> None:
        """Let the others know of this rank."""
        if self.joins:
            self.size, self.timeout_s = self.board.get("start", self.check)
            self.rank = self.size + self.board.add("joined", 1) - 1
            self._alive = set()  # it has yet to hear of anybody
            self._attendance = Attendance(self.board, self.size)
        self.board.put("start", (self.size, self.timeout_s))
        self._looked = self._clock()
        self.look()

    def close(self, *, failed: bool = False, waits: bool = False) -> None:
        """Say goodbye, so that nobody waits for this rank, and end the threads.

        Args:
            failed: whether this rank ends by an error: it waits for nobody, and the others say that it failed.
            waits: wait until the others have left, though the store does not end with this process: that which holds
                it may end soon after.
        """
        if self._threads and self.failure is None:
            with contextlib.suppress(StoreLostError):  # whoever would have read it is gone, too
                how = "has failed" if failed else None
                self.board.put(f"gone/{self.rank}", how)  # before all else: nobody is to wait for this rank
                if (self._holds_store or waits) and not failed and not self.joins:
                    self._outlast()
        self._closing.set()
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()

    def _outlast(self) -> None:
        """Wait until those that met last have left, but not longer than silence is borne: they may still be reading."""
        end = time.monotonic() + self.timeout_s
        while self.failure is None and time.monotonic() < end:
            if all(self.board.has(f"gone/{member}") for member in self.alive & set(self.among) - {self.rank}):
                return
            time.sleep(POLL_S)

    @property
    def alive(self) -> frozenset[int]:
        """All that are alive, as far as is known here, this rank among them."""
        return frozenset(self._alive | {self.rank})

    @property
    def turn(self) -> str:
        """Name of the last `meet` or `gather`, the same on all that took part."""
        return f"{self.round}.{self._turn}"

    @property
    def _every_s(self) -> float:
        return min(1.0, self.timeout_s / 10)

    def check(self) -> None:
        """Raise what ended the threads, if they have ended."""
        if self.failure is not None:
            raise self.failure

    # ---- agreeing

    def meet(self, value: Any) -> Mapping[int, Any]:
        """Wait for all that are alive to meet, and return the value of each that takes part, by number.

        Values are read when they are asked for, and kept for so long only as `KEPT_ROUNDS` says.

        Raises:
            LeftOut: if the others have met without this rank; also when it asks for a value that they have deleted.
        """
        self.round, self._turn = self.round + 1, 0
        while self._said and self._said[0][0] < self.round - KEPT_ROUNDS:  # who took part stays known
            self.board.delete(self._said.popleft()[1])
        return self._agree(value, self._expected)

    def gather(self, value: Any) -> Mapping[int, Any]:
        """As `meet`, of those that took part in the last one and are still alive."""
        self._turn += 1
        among = set(self.among)
        return self._agree(value, lambda: self._alive & among)

    def _expected(self) -> set[int]:
        """Who takes part in the next meeting: not those that were left out of one and have not joined again."""
        return {member for member in self._alive if self._attendance.takes_part(member)}

    def _agree(self, value: Any, waited_for: Callable[[], Iterable[int]]) -> Mapping[int, Any]:
        name, board = f"round/{self.turn}", self.board
        is_settled = set_key(self.round, self._turn)
        board.put(f"{name}/{self.rank}", value)
        self._said.append((self.round, f"{name}/{self.rank}"))
        here: set[int] = {self.rank}
        while not board.has(is_settled):
            self.check()
            missing = set(waited_for()) - here
            here |= {member for member in missing if board.has(f"{name}/{member}")}
            if missing <= here and set(waited_for()) <= here:  # who came last may have let another join before
                board.settle(is_settled, ",".join(map(str, sorted(here))))
            else:
                time.sleep(POLL_S)
        members = self._attendance.read(self.round, self._turn)
        if self.rank not in members or not board.has(*(f"{name}/{member}" for member in members)):
            raise self._left_out()  # all was there when it was settled who takes part: what is not now is deleted
        self.among = members
        return Told(members, {self.rank: value}, lambda member: self._read(f"{name}/{member}"))

    def _read(self, key: str) -> Any:
        try:
            return self.board.find(key)
        except KeyError:
            raise self._left_out() from None

    def _left_out(self) -> LeftOut:
        """Learn what the others have agreed on without this rank, and return what says that they did."""
        self._attendance.catch_up(self.round, self._turn)
        return LeftOut(f"rank {self.rank} was not heard of for {self.timeout_s:g} s: the others went on without it")

    # ---- joining

    def ask(self, give_up: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Ask a live rank for what its `offers` are, and take part from the next meeting on.

        Args:
            give_up: called now and then while this rank waits; may raise.

        Raises:
            LeftOut: if nobody is left to ask.
        """
        while True:
            self.check()
            donors = sorted(self._expected() - {self.rank})
            if not donors:
                raise LeftOut(f"rank {self.rank} cannot join: no other rank is training")
            if (given := self._ask(donors[0], give_up)) is not None:
                break
        self.joins, self.given = False, given if self.joins else None
        self.round, self._turn = given["round"], 0
        self.among = given["among"]
        self._attendance.join(self.rank, self.round, self.among)
        return given

    def _ask(self, donor: int, give_up: Callable[[], None]) -> dict[str, Any] | None:
        number = self.board.add(f"asked/{donor}/{self.rank}", 1)
        handover = Handover(self.board, key_of(donor, self.rank, number))
        while (fate := handover.fate) != GIVEN:
            self.check()
            give_up()
            if fate == WITHDRAWN or (donor not in self._expected() and handover.withdraw()):
                return None
            time.sleep(POLL_S)
        given: dict[str, Any] = handover.take()
        return given

    def answer(self) -> None:
        """Give those who ask for it what this rank offers."""
        self._donor.answer(self)

    # ---- the threads

    def _start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Do some work again and again in a thread of its own; what ends it ends the other threads, too."""

        def run() -> None:
            try:
                while not self._closing.wait(self._every_s):
                    work()
            except BaseException as error:
                self.failure = self.failure or error
                self._closing.set()
                for changed in list(self.changed):
                    changed(self.rank, False)

        thread = threading.Thread(target=run, name=f"asyncprop-{name}", daemon=True)
        thread.start()
        return thread

    def look(self) -> None:
        """Count one heartbeat, and see whose counts have changed.

        While this rank was stopped itself it has heard of nobody: such time counts against no one.
        """
        board = self._beats
        board.add(f"beat/{self.rank}", 1)
        now = self._clock()
        stopped_s = max(0.0, now - self._looked - 2 * self._every_s)
        self._looked = now
        for member in range(self.size + board.add("joined", 0)):
            if member != self.rank and member not in self._gone:
                self._hear(board, member, now, stopped_s)
        self._tell_of_late(now)

    def _tell_of_late(self, now: float) -> None:
        """Say once who has not come: on hosts that were told different addresses all would wait in silence."""
        never_heard = {member: since for member, (beats, since) in self._heard.items() if beats == 0}
        late = [member for member, since in never_heard.items() if now - since >= LATE_S and member in self._alive]
        if late and not self._has_told_of_late:
            self._has_told_of_late = True
            said = "rank %d: waiting for ranks %s, for %g s at most: do all machines have the same MASTER_ADDR? "
            said += "(torchrun: --local-addr=ADDRESS)"
            log.warning(said, self.rank, ", ".join(map(str, late)), START_TIMEOUT_S)

    def _hear(self, board: Board, member: int, now: float, stopped_s: float) -> None:
        if board.has(f"gone/{member}"):
            self._gone.add(member)
            self._mark(member, alive=False, lost=board.find(f"gone/{member}"))
            return
        beats = board.add(f"beat/{member}", 0)
        before, when = self._heard.get(member, (0, now))
        self._heard[member] = (beats, now) if beats != before else (before, when + stopped_s)
        patience_s = self.timeout_s if beats else START_TIMEOUT_S
        is_alive = now - self._heard[member][1] < patience_s and (beats > 0 or member < self.size)
        self._mark(member, alive=is_alive, lost=f"was not heard of for {patience_s:g} s")

    def _mark(self, member: int, *, alive: bool, lost: str | None = None) -> None:
        """Note whether a member is alive; if not, `lost` says how it was lost, unless it has left in order."""
        if alive == (member in self._alive):
            return
        if alive:
            self._alive = self._alive | {member}
            self.lost = {other: when for other, when in self.lost.items() if other != member}
        else:
            if lost:  # before all else: who meets without it may look why
                self.lost = {**self.lost, member: time.time()}
                log.warning("rank %d: rank %d %s: going on without it", self.rank, member, lost)
            self._alive = self._alive - {member}
        for changed in list(self.changed):
            changed(member, alive)


def note_end(store: Store, member: int, how: str) -> None:
    """Tell the others how the process of a member has ended, unless it has said goodbye itself.

    Args:
        store: that the members share.
        member: its number.
        how: what they are to say of it, as in "has failed".
    """
    board = Board(store)
    if not board.has(f"gone/{member}"):
        board.put(f"gone/{member}", how)


def holds_store(rank: int) -> bool:
    """Tell whether torch's store ends with this rank's process: with the first, unless torch's launcher holds it."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
