"""Agreement: the members settle on one weighted mean of their models, whoever dies meanwhile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, ReduceOp, Store  # type: ignore[attr-defined]

from asyncprop.engine.layers import Layer
from asyncprop.exchange.members import Members
from asyncprop.exchange.tally import pieces_of
from asyncprop.exchange.weights import share

SLOWEST_BYTES_PER_S = 1e6
"""A slower link than this is taken for one that hangs."""

log = logging.getLogger("asyncprop")


class Agreement:
    """Makes means over whoever is there. What it returns is on the CPU, and equal to the bit on all members.

    Args:
        members: who they are; all call `mean` in the same turn.
        store: to make process groups in.

    Attributes:
        totals: of the weights of all that made the last mean, by layer.
    """

    def __init__(self, members: Members, store: Store) -> None:
        self._members = members
        self._store = store.clone()  # type: ignore[attr-defined]  # connecting waits in it: it must be nobody else's
        self._group: Any = None
        self._among: tuple[int, ...] = ()
        self.totals: list[float] = []

    def forget(self) -> None:
        """Make a new process group next time: this rank has missed what the others did with the old one."""
        self._group, self._among = None, ()

    def mean(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        weights: Callable[[], list[float]],
    ) -> dict[str, Tensor]:
        """Return the weighted mean of every parameter, and of buffers the plain mean, or the largest of counts.

        Nothing is written: if a member dies at it, the others begin again without that member, from the same values.

        Args:
            layers: what has a weight of its own.
            parameters: by name; those of no layer are left out.
            buffers: by name. Those of members without any weight do not count.
            weights: this rank's, by layer; it has none at all if a parameter is not finite.
        """
        is_finite = self._is_finite(layers, parameters)
        while True:
            given = self._members.gather(weights() if is_finite else [0.0] * len(layers))
            among = self._members.among
            try:
                means = self._all_reduce(layers, parameters, buffers, [given[member] for member in among])
            except RuntimeError:  # a member has died, or hangs: gloo raises on all that are left, sooner or later
                means = None
            votes = self._members.gather(means is not None)
            if means is not None and all(votes.values()) and self._members.among == among:
                self.totals = [sum(given[member][layer] for member in among) for layer in range(len(layers))]
                return means
            self.forget()

    def _is_finite(self, layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> bool:
        """Tell whether this rank's parameters are finite numbers: one NaN would spread to every rank."""
        wrong = [name for layer in layers for name in layer.parameters if not _all_finite(parameters[name])]
        if wrong:
            said = "rank %d: %s has values that are not finite: this rank's model counts for nothing"
            log.warning(said, self._members.rank, wrong[0])
        return not wrong

    def _all_reduce(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        weights: list[list[float]],
    ) -> dict[str, Tensor]:
        group = self._group_of_all(sum(parameter.numel() for parameter in parameters.values()))
        me = self._among.index(self._members.rank)
        mine = {
            name: (parameters[name], share(weights, layer.index, me)) for layer in layers for name in layer.parameters
        }
        counting = [any(weight > 0 for weight in theirs) for theirs in weights]
        counts = counting[me] or not any(counting)
        each = float(counts) / (sum(counting) or len(counting))
        mine |= {name: (buffer, each) for name, buffer in buffers.items() if buffer.is_floating_point()}
        return _sums(group, mine) | _largest(group, buffers, counts=counts)

    def _group_of_all(self, numbers: int) -> Any:
        """Return a process group of those that are here now, the last one if they are the same; None for one alone.

        A member that dies in a collective is noticed at once, by its connections. Only one that hangs is waited for: as
        long as its silence is borne, and as the slowest link may take for so many numbers.
        """
        among = self._members.among
        if among != self._among:
            self._among, self._group = among, None
            if len(among) > 1:
                key = f"meeting/{self._members.turn}"
                timeout = timedelta(seconds=self._members.timeout_s + 8 * numbers / SLOWEST_BYTES_PER_S)
                rank = among.index(self._members.rank)
                self._group = ProcessGroupGloo(PrefixStore(key, self._store), rank, len(among), timeout)
        return self._group


def _sums(group: Any, mine: Mapping[str, tuple[Tensor, float]]) -> dict[str, Tensor]:
    """Return the sums over all members of their tensors, each times its weight."""
    sums: dict[str, Tensor] = {}
    for names in _by_type(mine):
        sizes = [mine[name][0].numel() for name in names]
        flat = torch.empty(sum(sizes), dtype=_wide(mine[names[0]][0]))
        parts: Sequence[Tensor] = flat.split(sizes)  # type: ignore[no-untyped-call]
        for name, part in zip(names, parts, strict=True):  # one by one: the memory of one copy, and no more
            tensor, weight = mine[name]
            sums[name] = part.view(tensor.shape)
            if weight:
                sums[name].copy_(tensor).mul_(weight)
            else:
                part.zero_()  # what does not count may be infinite, and 0 times that is no number
        _sum(group, flat)
    return sums


def _largest(group: Any, buffers: Mapping[str, Tensor], *, counts: bool) -> dict[str, Tensor]:
    """Return the largest of all members' counts; those of one that does not count are less than any other's."""
    largest: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        if not buffer.is_floating_point():
            kind = torch.uint8 if buffer.dtype == torch.bool else buffer.dtype
            largest[name] = buffer.to("cpu", kind, copy=True)
            if not counts:
                largest[name].fill_(torch.iinfo(kind).min)
            _sum(group, largest[name], ReduceOp.MAX)
    return largest


def _sum(group: Any, tensor: Tensor, operation: ReduceOp.RedOpType = ReduceOp.SUM) -> None:
    if group is not None:
        group.allreduce([tensor], operation).wait()


def _wide(tensor: Tensor) -> torch.dtype:
    """The type to add in: 16-bit floats would lose what distinguishes the ranks."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _by_type(named: Mapping[str, tuple[Tensor, float]]) -> list[list[str]]:
    """Return the names of tensors of one type together, so that each kind travels in one message."""
    types = dict.fromkeys(_wide(tensor) for tensor, _ in named.values())
    return [[name for name, (tensor, _) in named.items() if _wide(tensor) == kind] for kind in types]


def _all_finite(tensor: Tensor) -> bool:
    sums = [piece.abs().sum(dtype=torch.float64) for piece in pieces_of(tensor)]
    return math.isfinite(torch.stack(sums).sum().item())
