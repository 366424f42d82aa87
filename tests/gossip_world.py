"""A world of gossiping ranks in threads of one process, over torch's in-memory store and real gloo links."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import HashStore, PrefixStore

import asyncprop as ap
from asyncprop.devices import CpuDevice
from asyncprop.engine.exchange import Replica
from asyncprop.engine.layers import find_layers
from asyncprop.exchange.members import Members
from asyncprop.testing import TINY

_SEEDING = threading.Lock()  # the random state is the process's


class Held(threading.Event):
    """What the send thread waits for: whoever sets it, it sleeps until it is released."""

    def set(self) -> None:
        pass

    def release(self) -> None:
        super().set()


class Rank:
    """One rank: its members, its model, its exchange. No engine: a test says itself what has landed."""

    def __init__(self, store: Any, size: int, rank: int | None, device: Any = None, **options: Any) -> None:
        self.members = Members(PrefixStore("members", store), size, rank, timeout_s=60.0)
        self.members.open()
        self.rank = self.members.rank
        with _SEEDING:
            self.model: nn.Module = TINY[options.pop("model", "mlp")].seeded_model(self.rank)
        if device is not None and hasattr(device, "device"):
            self.model.to(device.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.gossip = ap.LayerGossip(members=self.members, **options)
        self.failures: list[BaseException] = []
        names = [name for name, _ in self.model.named_parameters()]
        layers = find_layers(self.model, names)
        self._held: threading.Event | None = None
        self.replica = Replica(self.model, self.optimizer, layers, device or CpuDevice(), self.failures.append)

    @property
    def shared(self) -> Any:
        return self.gossip._shared

    @property
    def weight(self) -> float:
        return self.shared.weight

    def set(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    def values(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def land_all(self) -> None:
        for layer in range(len(self.replica.layers)):
            self.gossip.landed(layer)
        self.gossip.finished()

    def hold(self) -> None:
        """Let the send thread sleep from here on: the test sends."""
        self._held, self.shared.due = self.shared.due, Held()

    def send(self) -> None:
        """Send what is due now, and wait until it is answered."""
        assert self._held
        self.gossip._sender.send_due()
        self.wait(lambda: all(n.out is None for n in self.shared.neighbours.values()), "a question was not answered")

    def wait(self, happened: Callable[[], Any], what: str) -> None:
        """Wait for something that the exchange's threads do, and tell each other of by their condition."""
        with self.shared.changed:
            assert self.shared.changed.wait_for(happened, 30.0), f"rank {self.rank}: {what}"

    def die(self) -> None:
        """End without a word to anybody."""
        self.members.failure = ConnectionError("killed")
        self.close()

    def close(self) -> None:
        if self._held:
            self.shared.is_closed = True
            self._held.set()
            self.shared.due.release()
        self.gossip.close()
        self.members.close()
        assert not self.failures


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls that wait for each other, each in a thread of its own; raise the first error."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(place: int) -> None:
        torch.set_num_threads(1)
        try:
            results[place] = calls[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results


@contextmanager
def world(size: int, **options: Any) -> Iterator[list[Rank]]:
    """Open `size` ranks that have linked, and close them."""
    store = HashStore()
    ranks: list[Rank] = at_once(*(lambda rank=rank: Rank(store, size, rank, **options) for rank in range(size)))
    try:
        at_once(*(lambda rank=rank: rank.gossip.open(rank.replica) for rank in ranks))
        linked(ranks)
        for rank in ranks:
            rank.hold()
        yield ranks
    finally:
        at_once(*(rank.close for rank in ranks))


def linked(ranks: list[Rank]) -> None:
    """Wait until every rank has a link to every other."""
    for rank in ranks:
        rank.wait(
            lambda rank=rank: sum(n.link is not None for n in rank.shared.neighbours.values()) >= len(ranks) - 1,
            "no link",
        )


def spread(ranks: list[Rank]) -> None:
    """Give every rank values of its own: 0, 1, 2, ..."""
    for rank in ranks:
        rank.set(float(rank.rank))


def settle(ranks: list[Rank]) -> None:
    at_once(*(rank.gossip.settle for rank in ranks))
