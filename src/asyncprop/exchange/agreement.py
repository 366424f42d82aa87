"""Agreement: the members settle on one weighted mean of their models, whoever dies meanwhile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ReduceOp, Store  # type: ignore[attr-defined]

from asyncprop.engine.layers import Layer
from asyncprop.exchange.group import Group, GroupBroken
from asyncprop.exchange.members import Members
from asyncprop.exchange.pair import mean_share
from asyncprop.exchange.tally import pieces_of

AVERAGED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of buffers of which ranks take the mean."""

COUNTED = {
    torch.bool: torch.uint8,
    torch.uint8: torch.uint8,
    torch.int8: torch.int8,
    torch.int16: torch.int32,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}
"""Types of buffers of which ranks take the largest values, and the types that they travel as: gloo knows no others."""

log = logging.getLogger("asyncprop")


class Agreement:
    """Makes means over whoever is there. What it returns is on the CPU, and equal to the bit on all members.

    Args:
        members: who they are; all call `mean` in the same turn.
        store: to make process groups in.

    Attributes:
        total: of the weights of all that made the last mean.
        was_finite: whether this rank's parameters were finite before it.
    """

    def __init__(self, members: Members, store: Store) -> None:
        self._members = members
        self._group = Group(members, store)
        self.total = 0.0
        self.was_finite = True

    def forget(self) -> None:
        """Make a new process group next time: this rank has missed what the others did with the old one."""
        self._group.forget()

    def mean(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        weight: Callable[[], float],
    ) -> dict[str, Tensor]:
        """Return the weighted mean of every parameter, and of buffers the plain mean, or the largest of counts.

        Nothing is written: if a member dies at it, the others begin again without that member, from the same values.

        Args:
            layers: of the model.
            parameters: by name; those of no layer are left out.
            buffers: by name. Those of members without any weight do not count.
            weight: this rank's; it has none if a parameter is not finite.
        """
        self.was_finite = self._is_finite(layers, parameters)
        while True:
            told = self._members.gather((self._group.key, weight() if self.was_finite else 0.0))
            among = self._members.among
            keys, given = zip(*(told[member] for member in among), strict=True)
            means = self._try(keys, layers, parameters, buffers, given)
            votes = self._members.gather(means is not None)
            if means is not None and all(votes.values()) and self._members.among == among:
                self.total = sum(given)
                return means
            self.forget()

    def _is_finite(self, layers: Sequence[Layer], parameters: Mapping[str, Tensor]) -> bool:
        """Tell whether this rank's parameters are finite numbers: one NaN would spread to every rank."""
        wrong = [name for layer in layers for name in layer.parameters if not _all_finite(parameters[name])]
        if wrong:
            said = "rank %d: %s has values that are not finite: this rank's model counts for nothing"
            log.warning(said, self._members.rank, wrong[0])
        return not wrong

    def _try(
        self,
        keys: Sequence[str],
        layers: Sequence[Layer],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        weights: Sequence[float],
    ) -> dict[str, Tensor] | None:
        """Return the means; None if the group breaks. Any other failure is this rank's own, and ends its training.

        Either way this rank leaves the group at once: a death is noticed only by those that wait for the one that died,
        and others wait for this rank.
        """
        try:
            self._group.connect(keys, sum(parameter.numel() for parameter in parameters.values()))
            return self._all_reduce(layers, parameters, buffers, weights)
        except GroupBroken as error:
            log.warning("rank %d: ranks begin their meeting again: %s", self._members.rank, str(error))
        except BaseException:
            self.forget()
            raise
        self.forget()  # when nothing holds the error any more, and with it the group
        return None

    def _all_reduce(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        weights: Sequence[float],
    ) -> dict[str, Tensor]:
        me = self._members.among.index(self._members.rank)
        share = mean_share(weights, me)
        mine = {name: (parameters[name], share) for layer in layers for name in layer.parameters}
        counting = [weight > 0 for weight in weights]
        counts = counting[me] or not any(counting)
        each = float(counts) / (sum(counting) or len(counting))
        mine |= {name: (buffer, each) for name, buffer in buffers.items() if buffer.is_floating_point()}
        return _sums(self._group, mine) | _largest(self._group, buffers, counts=counts)


def check_types(buffers: Mapping[str, Tensor]) -> None:
    """Refuse buffers, and parameters that are not trained, on which ranks cannot agree.

    Raises:
        ValueError: which names one.
    """
    for name, buffer in buffers.items():
        if buffer.dtype not in (*AVERAGED, *COUNTED):
            known = ", ".join(str(kind).removeprefix("torch.") for kind in (*AVERAGED, *COUNTED))
            raise ValueError(
                "buffers and frozen parameters must be of a type on which ranks can agree "
                f"({name} is {buffer.dtype}; known are {known}): keep it as another type, or as a plain attribute"
            )


def _sums(group: Group, mine: Mapping[str, tuple[Tensor, float]]) -> dict[str, Tensor]:
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
        group.reduce(flat)
    return sums


def _largest(group: Group, buffers: Mapping[str, Tensor], *, counts: bool) -> dict[str, Tensor]:
    """Return the largest of all members' counts; those of one that does not count are less than any other's."""
    largest: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        if not buffer.is_floating_point():
            kind = COUNTED[buffer.dtype]
            largest[name] = buffer.to("cpu", kind, copy=True)
            if not counts:
                largest[name].fill_(torch.iinfo(kind).min)
            group.reduce(largest[name], ReduceOp.MAX)
    return largest


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
