"""Averaging: one thread averages the ranks' parameters beside the workers, who never wait for it (LAPSGD).

One round: snap = copy(θ); s = sum of all ranks' snaps / ranks; θ += s - snap. What the workers write meanwhile
survives. The thread is the only one that calls collectives, so no two are ever under way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor, distributed

from asyncprop.engine import Exchange
from asyncprop.engine.exchange import Replica


class Averaging(Exchange):
    """Average the parameters of all ranks, as often as they have trained on `period` batches.

    Needs an initialised torch.distributed of several ranks; with one rank it does nothing. Optimizer state stays with
    each rank; buffers are averaged when ranks settle.

    Args:
        period: batches of this rank, its workers' together, between two rounds. A slower rank holds up rounds, never
            workers. Published for LAPSGD: 8 or 16.
        dense_batches: during its first so many batches a rank is ready for the next round after each batch: every
            average that is possible is made.

    Attributes:
        rounds: that have been made.
    """

    def __init__(self, period: int = 8, dense_batches: int = 0) -> None:
        if period < 1:
            raise ValueError(f"period must be >= 1 (got {period})")
        if dense_batches < 0:
            raise ValueError(f"dense_batches must be >= 0 (got {dense_batches})")
        self.rounds = 0
        self._period, self._dense_batches = period, dense_batches
        self._changed = threading.Condition()
        self._batches = self._averaged_at = 0
        self._settling = self._closed = False
        self._thread: threading.Thread | None = None

    def open(self, replica: Replica) -> None:
        """Take over the first rank's parameters, frozen ones too, and buffers, and start the thread.

        Raises:
            ValueError: if the ranks' models differ in the names, shapes or types of their tensors.
        """
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        self._replica = replica
        self._stream = replica.device.stream("exchange")
        _check_same_model(replica)
        self._group = distributed.new_group()
        for tensor in (*replica.model.parameters(), *replica.model.buffers()):
            distributed.broadcast(tensor.data, src=0, group=self._group)
        self._thread = threading.Thread(target=self._run, name="asyncprop-averaging", daemon=True)
        self._thread.start()

    def landed(self, layer: int) -> None:
        """Do nothing: whole models are averaged."""

    def finished(self) -> None:
        """Count a batch."""
        with self._changed:
            self._batches += 1
            if self._is_due():
                self._changed.notify_all()

    def settle(self) -> None:
        """Wait for all ranks to settle; then all have the average of their parameters and of their buffers."""
        if not self._thread:
            return
        with self._changed:
            self._settling = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._settling or self._closed)

    def statistics(self) -> dict[str, float]:
        """Return the rounds that have been made."""
        return {"rounds": self.rounds}

    def close(self) -> None:
        """End the thread; one that waits for a rank that has died is left to end with the process."""
        self._end()
        if self._thread:
            self._thread.join(GRACE_S)

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _parameters(self) -> list[Tensor]:
        return [parameter.data for parameter in self._replica.model.parameters() if parameter.requires_grad]

    def _is_due(self) -> bool:
        period = 1 if self._batches <= self._dense_batches else self._period
        return self._settling or self._batches - self._averaged_at >= period

    def _run(self) -> None:
        try:
            with self._replica.device.thread(1):
                while self._wait():
                    with self._replica.device.use(self._stream):
                        self._round()
        except BaseException as error:
            if not self._closed:
                self._replica.fail(error)
                self._end()

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_due() or self._closed)
            return not self._closed

    def _round(self) -> None:
        """Make one average with all ranks. If all of them are settling, it is the last for now.

        Guarantees: with nothing in flight anywhere, all ranks end equal to the bit. Assumes: nobody else calls
        collectives on this group. The race that is wanted: workers read and write θ while it is copied and while the
        difference is added, so single increments may be lost, as between workers.
        """
        with self._changed:
            settling = self._settling
            self._averaged_at = self._batches
        ready = torch.tensor([int(settling)])
        distributed.all_reduce(ready, group=self._group)
        everybody = int(ready) == distributed.get_world_size(self._group)
        with torch.no_grad():
            self._average(exactly=everybody)
        self.rounds += 1
        if everybody:
            with self._changed:
                self._settling = False
                self._changed.notify_all()

    def _average(self, *, exactly: bool) -> None:
        for same in _by_type(self._parameters()):
            before = torch.cat([parameter.reshape(-1) for parameter in same])
            mean = before.clone()
            self._mean(mean)
            sizes = [parameter.numel() for parameter in same]
            for parameter, now, then in zip(same, mean.split(sizes), before.split(sizes), strict=True):  # type: ignore[no-untyped-call]
                if exactly:
                    parameter.copy_(now.view_as(parameter))
                else:
                    parameter.add_((now - then).view_as(parameter))
        if exactly:
            for buffer in self._replica.model.buffers():
                self._mean(buffer.data)
        self._replica.device.finish(self._stream)

    def _mean(self, tensor: Tensor) -> None:
        """Average floats over the ranks, in place; of counts, take the largest."""
        if tensor.is_floating_point():
            distributed.all_reduce(tensor, group=self._group)
            tensor /= distributed.get_world_size(self._group)
        else:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._group)


GRACE_S = 0.8
"""How long `close` waits for the thread: one that waits for a dead rank can't be ended."""


def _check_same_model(replica: Replica) -> None:
    ours = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in replica.model.state_dict().items()]
    everyone: list[list[tuple[str, tuple[int, ...], str]]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, ours)
    for rank, theirs in enumerate(everyone):
        if theirs != ours:
            wrong = sorted(set(map(str, theirs)) ^ set(map(str, ours))) or ["the order of its tensors"]
            raise ValueError(f"model must be the same on all ranks (rank {rank} differs in {wrong[0]})")


def _by_type(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype together, so that each kind travels in one message."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        yield [tensor for tensor in tensors if tensor.dtype == dtype]
