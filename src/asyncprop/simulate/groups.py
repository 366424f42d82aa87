"""Groups: how replicas in one process meet in virtual time, with the arithmetic of the exchanges between processes.

A group is made once, and has a side for each replica, which is that replica's Exchange.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asyncprop.engine import Exchange
from asyncprop.engine.exchange import Replica
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.virtual_time import VirtualTime


def all_reduce_s(costs: LayerCosts, ranks: int) -> float:
    """Return what an all-reduce takes in a ring: every parameter travels 2 (ranks - 1) / ranks times."""
    return sum(costs.transfer_s) * 2 * (ranks - 1) / ranks


class Group:
    """Replicas that never meet but when they settle."""

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int) -> None:
        self.time, self.costs, self.ranks = time, costs, ranks
        self.replicas: list[Replica] = []
        self.changed = time.condition()
        self.closed = False
        self._threads: list[threading.Thread] = []
        self._never = threading.Event()

    def side(self, rank: int) -> Exchange:
        """Return the exchange of one replica; sides are opened in the order of ranks."""
        return Side(self, rank)

    def opened(self, replica: Replica) -> None:
        """Take a replica in; the last begins the exchange."""
        self.replicas.append(replica)
        if len(self.replicas) == self.ranks:
            self._threads = self._make_threads()
            for thread in self._threads:
                thread.start()

    def landed(self, rank: int, layer: int) -> None:
        """Note that a replica has stepped a layer."""

    def finished(self, rank: int) -> None:
        """Note that a replica has finished a batch."""

    def settle(self) -> None:
        """Let all replicas become equal to the bit: to the mean of their parameters and buffers. None may train."""
        with self.changed:
            self.changed.wait_for(self._is_quiet)
        self.sleep(all_reduce_s(self.costs, self.ranks))
        make_equal([replica.model for replica in self.replicas])

    def close(self) -> None:
        """End its threads."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def sleep(self, seconds: float) -> None:
        """Let time pass for the calling thread."""
        self.time.sleep(seconds, self._never)

    def _make_threads(self) -> list[threading.Thread]:
        return []

    def _is_quiet(self) -> bool:
        return True


class Side(Exchange):
    """One replica's side of a group."""

    def __init__(self, group: Group, rank: int) -> None:
        self._group, self._rank = group, rank

    def open(self, replica: Replica) -> None:
        """Join the group."""
        self._group.opened(replica)

    def landed(self, layer: int) -> None:
        """Tell the group."""
        self._group.landed(self._rank, layer)

    def finished(self) -> None:
        """Tell the group."""
        self._group.finished(self._rank)

    def settle(self) -> None:
        """Do nothing: the group settles when all replicas have ended."""

    def statistics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """End the group: no replica trains on without the others."""
        self._group.close()


class Averages(Group):
    """Averages parameters beside the workers, as `exchange.Averaging` does: θ += mean of all snaps - own snap."""

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int, period: int, dense_batches: int) -> None:
        super().__init__(time, costs, ranks)
        self.rounds = 0
        self._period, self._dense_batches = period, dense_batches
        self._batches, self._averaged_at = [0] * ranks, [0] * ranks
        self._in_round = False

    def finished(self, rank: int) -> None:
        """Count a batch."""
        with self.changed:
            self._batches[rank] += 1
            self.changed.notify_all()

    def _make_threads(self) -> list[threading.Thread]:
        return [self.time.thread(self._run, (), "asyncprop-averaging")]

    def _is_quiet(self) -> bool:
        return not self._in_round

    def _is_due(self) -> bool:
        return all(
            now - then >= (1 if now <= self._dense_batches else self._period)
            for now, then in zip(self._batches, self._averaged_at, strict=True)
        )

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self._is_due())
                if self.closed:
                    return
                self._averaged_at = list(self._batches)
                self._in_round = True
            self._round()
            with self.changed:
                self._in_round = False
                self.changed.notify_all()

    @torch.no_grad()
    def _round(self) -> None:
        own = [trained(replica.model) for replica in self.replicas]
        snaps = [[tensor.clone() for tensor in tensors] for tensors in own]
        means = [mean(same) for same in zip(*snaps, strict=True)]
        self.sleep(all_reduce_s(self.costs, self.ranks))
        for tensors, snap in zip(own, snaps, strict=True):
            for tensor, now, then in zip(tensors, means, snap, strict=True):
                tensor.add_(now - then)
        self.rounds += 1


def mean(same: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, added up in their order."""
    total = same[0].clone()
    for tensor in same[1:]:
        total += tensor
    return total.div_(len(same))


def trained(model: nn.Module) -> list[Tensor]:
    """Return the tensors of the parameters that are trained."""
    return [parameter.data for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def make_equal(models: Sequence[nn.Module]) -> None:
    """Let models become equal to the bit: to the mean of their parameters and buffers; of integers, the greatest."""
    every = ([*trained(model), *(buffer.data for buffer in model.buffers())] for model in models)
    for same in zip(*every, strict=True):
        value = mean(same) if same[0].is_floating_point() else torch.stack(same).amax(0)
        for tensor in same:
            tensor.copy_(value)
