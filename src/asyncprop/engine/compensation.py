"""Correction: what a gradient is changed by for what has landed on its layer since the layer was read.

Compensation guesses the gradient at the present parameters (DC-ASGD, Zheng et al. 2017); Attenuation makes it smaller
(staleness-aware SGD, Zhang et al. 2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

TINY = 1e-7


@dataclass(frozen=True, slots=True)
class Compensation:
    """Apply g + λ·g⊙g⊙(θ − θ_read) instead of g: a first-order guess of the gradient at the present parameters θ.

    It needs a copy of the parameters per lane, made layer by layer as the forward pass reads them.

    Args:
        coefficient: λ. Default: 0.04, or 2 if adaptive. 0 leaves the gradient as it is.
        adaptive: divide λ by the root of a running mean of g⊙g, which all lanes share.
        decay: of that mean.
    """

    coefficient: float | None = None
    adaptive: bool = False
    decay: float = 0.95

    def __post_init__(self) -> None:
        if self.coefficient is not None and not 0 <= self.coefficient < math.inf:
            raise ValueError(f"coefficient must be a number >= 0 (got {self.coefficient})")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be >= 0 and < 1 (got {self.decay})")

    def correct(self, gradient: Tensor, now: Tensor, read: Tensor, mean_square: Tensor | None) -> None:
        """Correct `gradient` in place; all tensors have the parameter's shape.

        Args:
            gradient: of the loss, at `read`.
            now, read: the parameter as it is, and as the forward pass read it.
            mean_square: the running mean of g⊙g, brought up to date here; needed, and used, if adaptive.
        """
        square = gradient.square()
        moved = now - read
        if self.adaptive:
            assert mean_square is not None
            mean_square.mul_(self.decay).add_(square, alpha=1 - self.decay)
            moved.div_(mean_square.add(TINY).sqrt_())
        default = 2.0 if self.adaptive else 0.04
        gradient.addcmul_(square, moved, value=default if self.coefficient is None else self.coefficient)


@dataclass(frozen=True, slots=True)
class Attenuation:
    """Divide a layer's gradient by (1 + staleness)^power: the more has landed since it was read, the less it counts.

    For SGD that is a learning rate per layer, by its measured staleness. It hardly changes what optimizers do that
    divide by the gradient's own size (Adam). Staleness is noted for it even without telemetry.

    Args:
        power: 1 divides by all gradients that meet, this one included; 0 leaves the gradient as it is.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf:
            raise ValueError(f"power must be a number >= 0 (got {self.power})")

    def factor(self, staleness: int) -> float:
        """Return what a gradient is multiplied by that is so many updates stale."""
        return float((1 + staleness) ** -self.power)


Correction = Compensation | Attenuation
