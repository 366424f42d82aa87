"""LayerGossip: each layer travels to another rank as soon as it has been updated, and nobody waits for anybody.

    a worker ─ landed(layer) ─▶ updates[layer] += 1        marks it, and goes on
                                     │ a bucket is full, or a batch is finished
    the send thread                  └▶ choose a neighbour ─ halve the weights ─ copy the layers ─▶ Link.send
    a receiving thread per neighbour    Link.receive ─ check ─ x += w'/(w + w')·(x' - x), w += w' ─▶ MERGED

Only the exchange's own threads take its lock; workers never do. Arithmetic: `weights`. Messages: `wire`, `link`. What is
out: `neighbour`. Who is alive: `members`. The meeting at which all become equal: `settle`, `agreement`.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store

from asyncprop.engine import Exchange
from asyncprop.engine.exchange import Replica
from asyncprop.exchange.agreement import Agreement
from asyncprop.exchange.link import Caller, Link, LinkBroken
from asyncprop.exchange.members import Members
from asyncprop.exchange.neighbour import Neighbour
from asyncprop.exchange.peers import Peers, Topology
from asyncprop.exchange.tally import GossipTally
from asyncprop.exchange.transfer import pack_state, unpack_state
from asyncprop.exchange.weights import Weights
from asyncprop.exchange.wire import Entry, Garbage, Header, Kind, Wire, WireType, check_finite, check_identity

BUCKET_BYTES = 1 << 20
"""Of a message, unless given: see results/exchange_*."""

MESSAGE, ANSWER = 0, 1
"""What a link keeps apart: the send thread's messages, and the receiving thread's."""

GRACE_S = 2.0
"""How long `close` waits for each thread; one that is connecting to a dead rank ends with its time-out."""

log = logging.getLogger("asyncprop")
_opened = itertools.count()


class LayerGossip(Exchange):
    """Send each layer to another rank the moment it is updated, and merge what comes, by sum weights.

    Needs an initialised torch.distributed of several ranks, or `members`; with one rank it does nothing. Ranks may die,
    hang, and join. Optimizer state stays with each rank. Which parameters are trained must not change while it is open.

    Args:
        topology: to whom: `"uniform"`, `"ring"` or `"exponential"` (see `Peers`).
        period: a layer is sent at every so many of its updates. Raise it if the network is the bottleneck; replicas
            then differ more.
        probability: with which a layer whose turn it is is sent. Another way to send less.
        bucket_bytes: layers are sent together until a message has so many bytes, or the batch is finished. Small
            messages cost time of the workers (Python's lock); large ones leave later.
        wire: `"exact"`, or `"bf16"` to send half of the bytes, rounded.
        timeout_s: a rank that was not heard of for so long is dropped, and the others meet without it.
        seed: of what is drawn at random.
        members: who else is there; None makes them from torch.distributed's default group.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        topology: Topology = "uniform",
        period: int = 1,
        probability: float = 1.0,
        bucket_bytes: int = BUCKET_BYTES,
        wire: WireType = "exact",
        timeout_s: float = 10.0,
        seed: int = 0,
        members: Members | None = None,
    ) -> None:
        if period < 1:
            raise ValueError(f"period must be >= 1 (got {period})")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be > 0 and <= 1 (got {probability})")
        Peers(topology, seed)  # refuses an unknown one before anything is opened
        Wire({}, (), wire, bucket_bytes)
        self.tally = GossipTally()
        self._topology, self._wire_type, self._bucket_bytes = topology, wire, bucket_bytes
        self._period, self._probability, self._seed = period, probability, seed
        self._timeout_s = timeout_s
        self._given_members = members
        self._members: Members | None = None
        self._changed = threading.Condition()
        self._due = threading.Event()
        self._is_meeting = self._closed = False
        self._neighbours: dict[int, Neighbour] = {}
        self._threads: list[threading.Thread] = []

    # ---- the engine's side

    def open(self, replica: Replica) -> None:
        """Check that all have the same model, take over the first rank's (a rank that joins: a live one's), and begin.

        Raises:
            ValueError: if the ranks' models or protocols differ; it names both sides.
        """
        if (found := self._find_members()) is None:
            return
        self._members, self._store = found
        self._replica, self._layers = replica, replica.layers
        self._stream = replica.device.new_stream()
        self._parameters = dict(replica.model.named_parameters())
        self._wire = Wire(self._parameters, replica.layers, self._wire_type, self._bucket_bytes)
        self._weights = Weights(len(replica.layers))
        self._updates = [0] * len(replica.layers)
        self._unsent_bytes = 0
        self._agreement = Agreement(self._members, self._store)
        me = self._members.rank
        self._peers = Peers(self._topology, self._seed + me)
        self._random = random.Random(f"{self._seed} {me}")
        self._greet()
        if self._members.given is not None:
            self.rejoin(self._members.given["replica"])
        else:
            self._weights.reset([float(me == min(self._members.among))] * len(self._layers))
            self._is_meeting = True
            self._members.meet(None)
            self._agree()
        self._members.offers["replica"] = self._offer
        self._start("send", self._send_all)
        self._members.changed.append(self._member_changed)
        for member in self._members.alive - {me}:
            self._member_changed(member, True)

    def landed(self, layer: int) -> None:
        """Mark the layer.

        Guarantees: nobody waits. Assumes: the send thread alone sets counts back. The race that is harmless: two
        workers that mark the same layer at once may count one update, and the bytes of one.
        """
        if self._members is None:
            return
        self._updates[layer] += 1
        self._unsent_bytes += self._wire.bytes_of(layer)
        if self._unsent_bytes >= self._bucket_bytes:
            self._due.set()

    def finished(self) -> None:
        """Let what is marked go."""
        self._due.set()

    def settle(self) -> None:
        """Meet all live ranks, and take over the weighted mean: afterwards all models are equal to the bit.

        Raises:
            LeftOut: if the others have met without this rank, as it was silent for `timeout_s`.
        """
        if self._members is None:
            return
        with self._changed:
            self._is_meeting = True  # from here on nothing is merged: what is said now stays true
            merged = {rank: neighbour.merged for rank, neighbour in self._neighbours.items()}
        told = self._members.meet(merged)
        with self._changed:
            for rank, neighbour in self._neighbours.items():
                last = told[rank].get(self._members.rank, 0) if rank in told else 0
                self.tally.returned += neighbour.resolve(self._weights, last)
        self._agree()

    def close(self) -> None:
        """End all threads and links, without the others."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            links = [neighbour.link for neighbour in self._neighbours.values() if neighbour.link]
        self._due.set()
        for link in links:
            link.cut()
        if self._members is not None:
            self._members.offers.pop("replica", None)
            if self._member_changed in self._members.changed:
                self._members.changed.remove(self._member_changed)
            if self._given_members is None:
                self._members.close()
        for thread in self._threads:
            thread.join(GRACE_S)

    def statistics(self) -> dict[str, float]:
        """Return what was sent, merged and superseded so far, and how far apart the ranks are: see `GossipTally`."""
        return self.tally.read() if self._members else {}

    def rejoin(self, given: dict[str, Any]) -> None:
        """Take over model, optimizer state and half of the weight of the rank that `Members.ask` asked.

        Nothing may be in flight.
        """
        assert self._members
        check_identity(self._wire.identity, self._members.rank, given["identity"], given["rank"])
        state = unpack_state(given["state"])
        with self._changed:
            self._replica.model.load_state_dict(state["model"])
            self._replica.optimizer.load_state_dict(state["optimizer"])
            self._weights.reset(given["weights"])
            self._agreement.forget()
            for neighbour in self._neighbours.values():
                neighbour.out = None  # of a time before the others met: it is void
            self._go_on()

    # ---- meeting

    def _agree(self) -> None:
        """Write the mean of all.

        Guarantees: all members' tensors are equal to the bit. Assumes: no pass is in flight, and nothing is merged.
        """
        replica = self._replica
        parameters = {name: parameter.detach() for name, parameter in self._parameters.items()}
        buffers = dict(replica.model.named_buffers())
        with torch.no_grad(), replica.device.use(self._stream):
            means = self._agreement.mean(self._layers, parameters, buffers, self._weights.all)
            self.tally.note_distance(parameters, means)
            for name, mean in means.items():
                (parameters[name] if name in parameters else buffers[name]).data.copy_(mean)
            replica.device.finish(self._stream)
        with self._changed:
            self._weights.reset()
            self._go_on()

    def _go_on(self) -> None:
        self._updates[:] = [0] * len(self._updates)
        self._is_meeting = False
        self._changed.notify_all()

    def _offer(self) -> dict[str, Any] | None:
        """Return what a rank that joins starts with; None while this one has nothing to give."""
        assert self._members
        try:
            state = pack_state(self._replica.model, self._replica.optimizer)
        except RuntimeError:
            return None  # a worker has just made a parameter's state: the next look will do
        with self._changed:
            if self._is_meeting or self._closed:
                return None
            weights = [self._weights.give(layer) for layer in range(len(self._layers))]
        return {"rank": self._members.rank, "identity": self._wire.identity, "weights": weights, "state": state}

    # ---- sending

    def _send_all(self) -> None:
        while self._wait_until_due():
            with self._changed:
                layers = [layer for layer in range(len(self._layers) - 1, -1, -1) if self._is_due(layer)]
            while layers and (neighbour := self._choose()):
                count = next((n for n in range(1, len(layers)) if self._wire.is_full(layers[:n])), len(layers))
                self._send(neighbour, layers[:count])
                layers = layers[count:]

    def _wait_until_due(self) -> bool:
        self._due.wait()
        self._due.clear()
        self._unsent_bytes = 0
        return not self._closed

    def _is_due(self, layer: int) -> bool:
        if self._updates[layer] < self._period or not self._weights.may_give(layer, self._updates[layer]):
            return False
        if self._probability < 1 and self._random.random() >= self._probability:
            self._updates[layer] = 0
            return False
        return True

    def _choose(self) -> Neighbour | None:
        assert self._members
        with self._changed:
            if self._is_meeting or self._closed:
                return None
            ready = [rank for rank, neighbour in self._neighbours.items() if neighbour.is_ready]
            chosen = self._peers.choose(self._members.rank, self._members.alive, ready)
            return None if chosen is None else self._neighbours[chosen]

    @torch.no_grad()
    def _send(self, neighbour: Neighbour, layers: list[int]) -> None:
        """Send these layers as they are now.

        Guarantees: the weight that leaves is out until it is merged or taken back. The race that is wanted: workers
        write θ while it is copied, so a layer may travel half updated.
        """
        assert self._members
        with self._changed:
            link = neighbour.link
            if self._is_meeting or link is None or not neighbour.is_ready:
                return
            entries = neighbour.give(self._weights, layers)
            header = Header(Kind.LAYERS, self._members.rank, neighbour.sequence, self._members.round, len(entries))
            message = self._wire.write(neighbour.sent, header, entries)
            for layer in layers:
                self.tally.superseded += self._updates[layer] - 1
                self._updates[layer] = 0
            with self._replica.device.use(self._stream):
                for name, value in itertools.chain.from_iterable(self._wire.values(message, layers)):
                    value.copy_(self._parameters[name].data, non_blocking=True)
                self._replica.device.finish(self._stream)
            self.tally.sent(message.numel())
        try:
            link.send(message, MESSAGE)
        except LinkBroken:
            pass  # the receiving thread sees it, too, and what is out is settled when the next link opens

    # ---- receiving

    def _member_changed(self, member: int, is_alive: bool) -> None:
        assert self._members
        if self._members.failure is not None:
            self._replica.fail(self._members.failure)
            return
        if not is_alive:
            if member in self._members.lost:
                log.warning("rank %d: rank %d was not heard of for %g s: going on without it",
                            self._members.rank, member, self._members.timeout_s)  # fmt: skip
            neighbour = self._neighbours.get(member)
            if neighbour and (link := neighbour.link):
                link.cut()
            return
        with self._changed:
            neighbour = self._neighbours.get(member)
            if neighbour is None:
                neighbour = Neighbour(member, self._replica.device.buffer, self._wire.message_bytes)
                self._neighbours = {**self._neighbours, member: neighbour}
            if neighbour.thread is None and not self._closed:
                neighbour.thread = self._start(f"receive-{member}", lambda: self._serve(neighbour))

    def _serve(self, neighbour: Neighbour) -> None:
        """Keep a link to the neighbour, and merge what comes, until one of the two is gone."""
        assert self._members
        caller = Caller(self._members.board.clone(), self._store, self._members.rank, neighbour.rank)
        while self._keeps(neighbour):
            try:
                if link := caller.connect(neighbour.received, lambda: self._keeps(neighbour, wait_s=0.01)):
                    self._serve_link(neighbour, link)
            except LinkBroken:
                pass
            except Garbage as error:
                neighbour.refused = True
                self.tally.refused += 1
                log.warning("rank %d: rank %d is cut off: it sent %s; nothing of it is merged",
                            self._members.rank, neighbour.rank, error)  # fmt: skip

    def _keeps(self, neighbour: Neighbour, *, wait_s: float = 0.0) -> bool:
        """Tell, after a moment, whether there is still reason to have a link; if not, the thread is to end."""
        assert self._members
        with self._changed:
            if wait_s:
                self._changed.wait_for(lambda: self._closed, wait_s)
            if self._closed or neighbour.refused or neighbour.rank not in self._members.alive:
                neighbour.thread = None
                return False
            return True

    def _serve_link(self, neighbour: Neighbour, link: Link) -> None:
        assert self._members
        try:
            link.send(self._short(neighbour, Kind.HELLO, neighbour.merged), ANSWER)
            hello, _ = self._wire.read(link.receive(), neighbour.rank)
            if hello.kind != Kind.HELLO:
                raise Garbage(f"a message of kind {hello.kind} instead of a greeting")
            with self._changed:
                if self._is_meeting:
                    pass  # the meeting itself settles what is out
                else:
                    self.tally.returned += neighbour.resolve(self._weights, hello.sequence)
                if self._closed:
                    return
                neighbour.link = link
            self._due.set()
            while True:
                self._take(neighbour, link, *self._wire.read(link.receive(), neighbour.rank))
        finally:
            with self._changed:
                neighbour.link = None
            link.cut()

    def _short(self, neighbour: Neighbour, kind: Kind, sequence: int) -> Tensor:
        assert self._members
        header = Header(kind, self._members.rank, sequence, self._members.round)
        return self._wire.write(neighbour.short, header)

    def _take(self, neighbour: Neighbour, link: Link, header: Header, entries: list[Entry]) -> None:
        if header.kind == Kind.MERGED:
            with self._changed:
                self.tally.delivered(neighbour.was_merged(header.sequence))
            self._due.set()
        elif header.kind == Kind.LAYERS:
            values = self._wire.values(neighbour.received, [layer for layer, _ in entries])
            check_finite(values)
            self._merge(neighbour, header, entries, values)
            link.send(self._short(neighbour, Kind.MERGED, header.sequence), ANSWER)

    @torch.no_grad()
    def _merge(
        self, neighbour: Neighbour, header: Header, entries: list[Entry], values: list[list[tuple[str, Tensor]]]
    ) -> None:
        """Merge a message's layers, unless the ranks have met since it was sent.

        Guarantees: weight and value of a layer change together, as far as other merges and sends can see. The race
        that is wanted: workers read and write θ meanwhile, so an increment of theirs may be lost, as between workers.
        """
        assert self._members
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (not self._is_meeting and header.round <= self._members.round)  # type: ignore[union-attr]
            )
            if self._closed:
                raise LinkBroken("closed")
            if header.round != self._members.round or header.sequence <= neighbour.merged:
                self.tally.late += 1
                return
            with self._replica.device.use(self._stream):
                for (layer, weight), parts in zip(entries, values, strict=True):
                    share = self._weights.take(layer, weight)
                    for name, value in parts:
                        parameter = self._parameters[name].data
                        parameter.lerp_(value.to(parameter.device, parameter.dtype, non_blocking=True), share)
                self._replica.device.finish(self._stream)
            neighbour.merged = header.sequence
            self.tally.merged(header.length_bytes)

    # ---- threads

    def _start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                with self._replica.device.thread(1):
                    work()
            except BaseException as error:
                if not self._closed:
                    self._replica.fail(error)

        thread = threading.Thread(target=run, name=f"asyncprop-gossip-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _find_members(self) -> tuple[Members, Store] | None:
        """Return who is there and the store to meet in; None where there is nobody else."""
        if self._given_members is not None:
            return self._given_members, self._given_members.store
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return None
        default = distributed.distributed_c10d._get_default_store()
        store = PrefixStore(f"asyncprop/gossip-{next(_opened)}", default)  # type: ignore[attr-defined]
        members = Members(store, distributed.get_world_size(), distributed.get_rank(), timeout_s=self._timeout_s)
        members.open()
        return members, store

    def _greet(self) -> None:
        """Check that everybody has the same model, and speaks the same protocol."""
        assert self._members
        board, me = self._members.board, self._members.rank
        board.put(f"identity/{me}", self._wire.identity)
        for member in self._members.among:
            if member != me:
                theirs = board.get(f"identity/{member}", self._members.check)
                check_identity(self._wire.identity, me, theirs, member)
