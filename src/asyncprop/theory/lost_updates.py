"""Lost updates: how many of the increments that passes wrote without locks are missing from the parameters.

Two passes that write the same float at once both read the old value; then one increment is lost. To count them, every
gradient is replaced by ones, after it has been computed: each update then takes exactly one QUANTUM off each float, and
what is missing in the end was lost. Passes compute what they always compute, and take as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

QUANTUM = 2.0**-20
"""One update's increment. Multiples of it below 8 are exact in float32, so nothing is rounded."""


@dataclass(frozen=True, slots=True)
class LostUpdates:
    """Of one layer, or of several: `lost` and `written` count increments of single floats; `worst` is the largest
    share that one float lost.
    """

    written: int
    lost: int
    worst: float

    @property
    def rate(self) -> float:
        """Share of the increments that were lost; 0.0 if there was none."""
        return self.lost / self.written if self.written else 0.0


class UpdateCounter:
    """Makes every update of `model` countable; make it before the engine, and the model is of no other use after.

    Train with `torch.optim.SGD(model.parameters(), lr=QUANTUM)`, without momentum, weight decay or clipping. Weights
    move by one QUANTUM (a millionth) an update, so that losses stay finite.

    Args:
        model: float32 parameters, each below 7 in absolute value. They are rounded to multiples of QUANTUM, and get
            hooks that replace their gradients by ones; the lanes of an engine take these over.

    Raises:
        ValueError: for other parameters, whose sums would be rounded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32 or bool((parameter.detach().abs() >= 7).any()):
                raise ValueError(f"{name} must be float32 and below 7 in absolute value to be counted exactly")
        with torch.no_grad():
            for parameter in self._parameters.values():
                parameter.copy_((parameter / QUANTUM).round() * QUANTUM)
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._hooks = [p.register_hook(torch.ones_like) for p in self._parameters.values()]  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def count(self, updates: Mapping[str, int]) -> dict[str, LostUpdates]:
        """Return what was lost of each parameter, given how many updates landed on it. Call it when drained."""
        return {name: self._lost(name, expected) for name, expected in updates.items()}

    def _lost(self, name: str, expected: int) -> LostUpdates:
        moved = (self._before[name].double() - self._parameters[name].detach().double()) / QUANTUM
        missing: Tensor = expected - moved
        return LostUpdates(
            written=expected * missing.numel(),
            lost=round(float(missing.sum())),
            worst=float(missing.max()) / max(1, expected),
        )


def total(parts: Sequence[LostUpdates]) -> LostUpdates:
    """Return the sum over several parameters."""
    return LostUpdates(
        sum(part.written for part in parts),
        sum(part.lost for part in parts),
        max((part.worst for part in parts), default=0.0),
    )
