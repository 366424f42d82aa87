"""Gossip in virtual time: replicas in one process draw near each other, by the rules of `exchange.LayerGossip`."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from asyncprop.exchange.due import Due
from asyncprop.exchange.gossip import PERIOD
from asyncprop.exchange.pair import FAIR_SHARE, Side, answer_share, moved_per_answer
from asyncprop.exchange.peers import Peers, Topology
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.groups import Group
from asyncprop.simulate.virtual_time import VirtualTime


class Gossip(Group):
    """Sends each layer that has been updated to another replica, which draws near it and answers. The mean stays.

    Which layers are due, to whom they go and how far both move is what `exchange` has. What differs: each replica
    sends one layer after the other, without messages of several, and sends on as soon as the answer has arrived.

    Args:
        time, costs, ranks: as for all groups.
        topology, period, probability, seed: as for `LayerGossip`.

    Attributes:
        merges: layers that have arrived.
    """

    def __init__(
        self,
        time: VirtualTime,
        costs: LayerCosts,
        ranks: int,
        *,
        topology: Topology = "uniform",
        period: int = PERIOD,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(time, costs, ranks)
        layers = len(costs.forward_s)
        self.merges = 0
        self._updates = [[0] * layers for _ in range(ranks)]
        self._due = [
            Due(updates, period=period, probability=probability, seed=f"{seed} {rank}")
            for rank, updates in enumerate(self._updates)
        ]
        self._peers = [Peers(topology, seed + rank) for rank in range(ranks)]
        self._calls = [time.condition() for _ in range(ranks)]
        self._asking = [0] * ranks  # questions that each has out: at most one
        self._is_meeting = False

    def landed(self, rank: int, layer: int) -> None:
        """Count an update, and let the sender go if something is due."""
        self._updates[rank][layer] += 1
        if self._due[rank].chunks():
            self._call(rank)

    def close(self) -> None:
        """End its threads."""
        self.closed = True
        for rank in range(self.ranks):
            self._call(rank)
        super().close()

    @torch.no_grad()
    def settle(self) -> None:
        """Let all replicas have the mean of each layer, and of all buffers.

        What is on its way arrives; nothing else leaves.
        """
        self._is_meeting = True
        with self.changed:
            self.changed.wait_for(lambda: not any(self._asking))
        for layer in range(len(self.costs.forward_s)):
            for same in zip(*(self._tensors_of(rank, layer) for rank in range(self.ranks)), strict=True):
                value = torch.stack(same).mean(0)
                for tensor in same:
                    tensor.copy_(value)
        for updates in self._updates:
            updates[:] = [0] * len(updates)
        super().settle()
        self._is_meeting = False

    def _make_threads(self) -> list[threading.Thread]:
        return [self.time.thread(self._send, (rank,), f"asyncprop-send-{rank}") for rank in range(self.ranks)]

    def _call(self, rank: int) -> None:
        with self._calls[rank]:
            self._calls[rank].notify_all()

    def _next(self, rank: int) -> int | None:
        due = [] if self._is_meeting else self._due[rank].chunks()
        return due[0] if due else None

    def _send(self, rank: int) -> None:
        others = [other for other in range(self.ranks) if other != rank]
        while True:
            with self._calls[rank]:
                self._calls[rank].wait_for(lambda: self.closed or self._next(rank) is not None)
            layer = self._next(rank)
            if self.closed or layer is None:
                return
            peer = self._peers[rank].choose(rank, others, others)
            assert peer is not None
            self._asking[rank] = 1
            self._due[rank].sent(layer)
            values = [tensor.clone() for tensor in self._tensors_of(rank, layer)]
            self.sleep(self.costs.transfer_s[layer])
            self._draw_near(peer, layer, values)
            self.sleep(self.costs.transfer_s[layer])
            for tensor, answer in zip(self._tensors_of(rank, layer), values, strict=True):
                tensor.add_(answer)
            with self.changed:
                self._asking[rank] = 0
                self.changed.notify_all()

    @torch.no_grad()
    def _draw_near(self, rank: int, layer: int, values: list[Tensor]) -> None:
        """Move a rank's layer towards the values, which become the answer."""
        asker, asked = Side(FAIR_SHARE), Side(FAIR_SHARE, besides=self._asking[rank])
        for tensor, value in zip(self._tensors_of(rank, layer), values, strict=True):
            value.sub_(tensor).mul_(-answer_share(asker, asked))
            tensor.add_(value, alpha=moved_per_answer(asker, asked))
        self.merges += 1

    def _tensors_of(self, rank: int, layer: int) -> list[Tensor]:
        replica = self.replicas[rank]
        return [replica.model.get_parameter(name).data for name in replica.layers[layer].parameters]
