"""LayerGossip: each layer travels to another rank as soon as it has been updated, and nobody waits for anybody.

    a worker ─ landed(layer) ─▶ updates[chunk] += 1        marks it, and goes on
                                     │ a bucket is full, or a batch is finished
    the send thread                  └▶ choose a neighbour ─ copy the chunks ─▶ Link.send     a question: x
    there, a receiving thread           Link.receive ─ check ─ y += (x - y)/2 ─▶ Link.send    the answer: (y - x)/2
    here, a receiving thread            Link.receive ─ check ─ x += what came

Only the exchange's own threads take its lock; workers never do. Arithmetic: `pair`. What of a layer travels as one:
`chunks`. Messages: `wire`, `link`. What is out: `neighbour`. Who is alive: `members`. The meeting at which all become
equal: `settle`, `agreement`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.optim import Optimizer

from asyncprop.engine import Exchange
from asyncprop.engine.exchange import Replica
from asyncprop.exchange.agreement import Agreement, check_types
from asyncprop.exchange.identity import check_identity, greet, identity_of
from asyncprop.exchange.members import TIMEOUT_S, Members, holds_store
from asyncprop.exchange.neighbour import Neighbour
from asyncprop.exchange.peers import Peers, Topology
from asyncprop.exchange.receiver import Receiver
from asyncprop.exchange.sender import Sender
from asyncprop.exchange.shared import Shared
from asyncprop.exchange.tally import GossipTally
from asyncprop.exchange.transfer import copy_of, pack_state, unpack_state
from asyncprop.exchange.wire import Wire, WireType

BUCKET_BYTES = 1 << 22
"""Of a message, unless given: gossip then costs 1 to 7 % of a step, with 1 MiB 8 to 10 % (results/exchange-gossip*)."""

PERIOD = 2
"""Updates of a layer from one sending to the next, unless given."""

_opened = itertools.count()


class LayerGossip(Exchange):
    """Send each layer to another rank the moment it is updated; both draw near each other, and the mean stays.

    The mean of all ranks is moved by their gradients alone, whoever is slow and however long messages take (`pair`).
    Needs an initialised torch.distributed of several ranks, or `members`; with one rank it does nothing. Ranks may die,
    hang, and join. Optimizer state stays with each rank. Which parameters are trained must not change while it is open.

    Args:
        topology: to whom: `"uniform"`, `"ring"` or `"exponential"` (see `Peers`).
        period: a layer is sent at every so many of its updates. With 2 it is averaged once in an update, as each
            message moves two ranks. Raise it if the network is the bottleneck; replicas then differ more.
        probability: with which a layer whose turn it is is sent. Another way to send less.
        bucket_bytes: layers are sent together until a message would have more bytes, or the batch is finished; larger
            layers in parts. Small messages cost time of the workers (Python's lock); large ones leave later, and take
            memory: two for each neighbour, and one for each question that is out.
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
        period: int = PERIOD,
        probability: float = 1.0,
        bucket_bytes: int = BUCKET_BYTES,
        wire: WireType = "exact",
        timeout_s: float = TIMEOUT_S,
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
        self._timeout_s, self._members = timeout_s, members
        self._met = 1  # how many ranks had a fair share of weight when they last met; at first, one has all
        self._has_settled = False
        self._shared: Shared | None = None

    # ---- the engine's side

    def open(self, replica: Replica) -> None:
        """Check that all have the same model, take over the first rank's (a rank that joins: a live one's), and begin.

        Raises:
            ValueError: if the ranks' models, options or versions differ, with both sides named; or if a buffer is of a
                type on which ranks cannot agree.
        """
        if (found := self._find_members()) is None:
            return
        members, store = found
        wire = Wire(dict(replica.model.named_parameters()), replica.layers, self._wire_type, self._bucket_bytes)
        shared = self._shared = Shared(replica, members, store, wire, self.tally)
        self._agreement = Agreement(members, store)
        self._identity = identity_of(replica.model, wire)
        try:
            check_types(dict(replica.model.named_buffers()) | self._frozen(replica))
            self._begin(shared)
        except BaseException:
            self.close()  # nobody is to wait for this rank
            raise

    def landed(self, layer: int) -> None:
        """Mark the layer.

        Guarantees: nobody waits. Assumes: the send thread alone sets counts back. The race that is harmless: two
        workers that mark the same layer at once may count one update, and the bytes of one.
        """
        if (shared := self._shared) is not None:
            self._has_settled = False
            for chunk in shared.wire.chunks[layer]:
                shared.updates[chunk] += 1
                shared.unsent_bytes += shared.wire.bytes_of(chunk)
            if shared.unsent_bytes >= self._bucket_bytes:
                shared.due.set()

    def finished(self) -> None:
        """Let what is marked go."""
        if self._shared is not None:
            self._shared.due.set()

    def settle(self) -> None:
        """Meet all live ranks, and take over the weighted mean: afterwards all models are equal to the bit.

        Raises:
            LeftOut: if the others have met without this rank, as it was silent for `timeout_s`.
        """
        if (shared := self._shared) is None:
            return
        shared.begin_meeting()  # from here on nothing is merged: what is said now stays true
        answered = {rank: neighbour.answered for rank, neighbour in shared.neighbours.items()}
        told = dict(shared.members.meet(answered))
        with shared.changed:
            for rank, neighbour in shared.neighbours.items():
                self.tally.lost += neighbour.settle()
                given = neighbour.undo(told[rank].get(shared.rank, 0) if rank in told else neighbour.merged)
                if given:  # not of a rank that was left out, or died: nobody is left to add it
                    shared.undo(given)
        self._agree(shared)
        self._has_settled = True

    def leave(self) -> None:
        """Send and merge nothing until `rejoin`: this rank was left out, and what it merged would be lost with it."""
        if self._shared:
            self._shared.begin_meeting()

    def close(self) -> None:
        """End all threads and links, without the others."""
        if (shared := self._shared) is None:
            return
        shared.close()
        shared.members.offers["replica"] = lambda: None  # no rank is to be given the rest of the offer
        if self._member_changed in shared.members.changed:
            shared.members.changed.remove(self._member_changed)
        if self._members is None:
            shared.members.close(failed=not self._has_settled)
        shared.join()
        self._agreement.forget()

    def statistics(self) -> dict[str, float]:
        """Return what was sent, merged and superseded so far, and how far apart the ranks are: see `GossipTally`."""
        return self.tally.read() if self._shared else {}

    def rejoin(self, given: dict[str, Any]) -> None:
        """Take over model, optimizer state and half of the weight of the rank that `Members.ask` asked.

        Nothing may be in flight.
        """
        shared = self._shared
        assert shared
        check_identity(self._identity, shared.rank, given["identity"], given["rank"])
        state = unpack_state(given["state"])
        shared.begin_meeting()
        shared.replica.model.load_state_dict(state["model"])
        shared.replica.optimizer.load_state_dict(state["optimizer"])
        self._agreement.forget()
        self._met = given["met"]
        with shared.changed:
            for neighbour in shared.neighbours.values():
                neighbour.settle()  # all that is out is of a time before the others met: it is void
                neighbour.given = None
        shared.end_meeting(given["weight"])

    # ---- inside

    def _begin(self, shared: Shared) -> None:
        members = shared.members
        greet(members, self._identity)
        given, members.given = members.given, None  # it is as large as the model
        if given is not None:
            self.rejoin(given["replica"])
        else:
            shared.weight = float(shared.rank == min(members.among))
            shared.begin_meeting()
            members.meet(None)
            self._agree(shared, self._frozen(shared.replica))
        members.part_with, members.offers["replica"] = self._part_with, self._offer
        peers = Peers(self._topology, self._seed + shared.rank)
        self._sender = Sender(shared, peers, period=self._period, probability=self._probability, seed=self._seed)
        shared.start("send", self._sender.run)
        members.changed.append(self._member_changed)
        for member in members.alive - {shared.rank}:
            self._member_changed(member, True)

    @staticmethod
    def _frozen(replica: Replica) -> dict[str, Tensor]:
        """Return the parameters that are not trained: they are only taken over, at the start."""
        trained = {name for layer in replica.layers for name in layer.parameters}
        named = replica.model.named_parameters()
        return {name: parameter.detach() for name, parameter in named if name not in trained}

    def _agree(self, shared: Shared, frozen: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Write the mean of all; of what is `frozen`, as of buffers.

        Guarantees: all members' tensors are equal to the bit. Assumes: no pass is in flight, and nothing is merged.
        """
        replica = shared.replica
        parameters = {name: parameter.detach() for name, parameter in shared.parameters.items()}
        buffers = {**dict(replica.model.named_buffers()), **frozen}
        with torch.no_grad(), replica.device.use(shared.stream):
            means = self._agreement.mean(replica.layers, parameters, buffers, lambda: shared.weight)
            self.tally.note_distance(parameters, means)
            self.tally.weight = self._agreement.total / self._met
            self._met = len(shared.members.among)
            for name, mean in means.items():
                (parameters[name] if name in parameters else buffers[name]).data.copy_(mean)
            if not self._agreement.was_finite:
                _forget_what_is_no_number(replica.optimizer)
            replica.device.finish(shared.stream)
        shared.end_meeting()
        for rank, neighbour in shared.neighbours.items():
            if neighbour.refused and rank in shared.members.alive:
                neighbour.refused = False  # all models are equal now: what was wrong with it may be over
                self._meet_neighbour(shared, rank)

    def _offer(self) -> dict[str, Any] | None:
        """Return what a rank that joins starts with; None while this one has nothing to give."""
        shared = self._shared
        assert shared
        with shared.changed:
            if shared.is_meeting or shared.is_closed:
                return None  # the next look will do
            model = copy_of(shared.replica.model)  # with what it weighs: no message comes between
            shared.weight = shared.offered = weight = shared.weight / 2
        try:
            state = pack_state(model, shared.replica.optimizer)
        except RuntimeError:  # a worker has just made a parameter's state: the next look will do
            return None
        return {"rank": shared.rank, "identity": self._identity, "weight": weight, "met": self._met, "state": state}

    def _part_with(self, give: Callable[[], bool]) -> bool:
        """Give the weight that is offered away, unless a meeting has taken it back, or it is not wanted any more.

        Guarantees: it counts for this rank or for the one that joins, at each meeting, and never for both.
        """
        shared = self._shared
        assert shared
        with shared.changed:
            if shared.offered and give():
                shared.offered = 0.0
                return True
            shared.take_back()
            return False

    def _member_changed(self, member: int, is_alive: bool) -> None:
        shared = self._shared
        assert shared
        if shared.members.failure is not None:
            shared.replica.fail(shared.members.failure)
        elif is_alive:
            self._meet_neighbour(shared, member)
        else:
            neighbour = shared.neighbours.get(member)
            if neighbour and (link := neighbour.link):
                link.cut()

    def _meet_neighbour(self, shared: Shared, member: int) -> None:
        with shared.changed:
            if member not in shared.neighbours:
                new = Neighbour(member, shared.buffers)
                shared.neighbours = {**shared.neighbours, member: new}
            neighbour = shared.neighbours[member]
            if neighbour.thread is None and not shared.is_closed:
                neighbour.start()
                neighbour.thread = shared.start(f"receive-{member}", Receiver(shared, neighbour).run)

    def _find_members(self) -> tuple[Members, Store] | None:
        """Return who is there and the store to meet in; None where there is nobody else."""
        if self._members is not None:
            return self._members, self._members.store
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return None
        default = distributed.distributed_c10d._get_default_store()
        store = PrefixStore(f"asyncprop/gossip-{next(_opened)}", default)
        rank = distributed.get_rank()
        members = Members(
            store, distributed.get_world_size(), rank, timeout_s=self._timeout_s, holds_store=holds_store(rank)
        )
        members.open()
        return members, store


def _forget_what_is_no_number(optimizer: Optimizer) -> None:
    """Set what is not finite in the state to 0: a momentum of NaN would spoil the mean at the first step."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
