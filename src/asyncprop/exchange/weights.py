"""Weights: the arithmetic of sum-weight gossip, per layer. A rank gives half of its weight away with each send.

Every rank holds (x, w) of every layer, at first w = 1. To send: w /= 2, and (x, w) travels. To merge (x', w'):
x += w' / (w + w') · (x' - x); w += w'. The sum of all weights, those on their way among them, never changes, nor does
the weighted mean of all x; only gradients move it (Kempe, Dobra and Gehrke 2003, "push-sum").

A rank that sends more often than it receives would give its weight, and with it its say in the mean, to slower ones. So
a layer is sent while its weight is a fair share, 1, or more; with less, only once in `PATIENCE` updates. As the mean
weight is 1, somebody may always send.
"""

from __future__ import annotations

from collections.abc import Sequence

PATIENCE = 16
"""Updates after which a layer is sent though its weight is less than a fair share: weight may have died elsewhere."""

FAIR_SHARE = 1.0
LEAST = 2.0**-64
"""A layer with less weight is not sent: half of it would hardly be a number that can be divided by."""


class Weights:
    """The weight of each of this rank's layers. Whoever calls holds the exchange's lock."""

    def __init__(self, layers: int, each: float = FAIR_SHARE) -> None:
        self._weights = [each] * layers

    def __getitem__(self, layer: int) -> float:
        return self._weights[layer]

    def all(self) -> list[float]:
        """Return every layer's weight."""
        return list(self._weights)

    def may_give(self, layer: int, updates: int) -> bool:
        """Tell whether a layer that has been updated so often since it was last sent is to be sent now."""
        weight = self._weights[layer]
        return weight >= FAIR_SHARE or (updates >= PATIENCE and weight >= LEAST)

    def give(self, layer: int) -> float:
        """Halve a layer's weight, and return the half that travels."""
        self._weights[layer] /= 2
        return self._weights[layer]

    def take(self, layer: int, weight: float) -> float:
        """Add what came, and return the share of the way that x goes towards the x' that came with it."""
        self._weights[layer] += weight
        return weight / self._weights[layer]

    def take_back(self, given: Sequence[tuple[int, float]]) -> None:
        """Add what was given and never merged."""
        for layer, weight in given:
            self._weights[layer] += weight

    def reset(self, weights: Sequence[float] | None = None) -> None:
        """Set all weights; to a fair share each by default."""
        self._weights = list(weights) if weights is not None else [FAIR_SHARE] * len(self._weights)


def share(weights: Sequence[Sequence[float]], layer: int, rank: int) -> float:
    """Return a rank's share of the weighted mean of a layer; the first rank's is all if nobody has any weight.

    Args:
        weights: of each rank, by layer.
        layer: which.
        rank: index into `weights`.
    """
    total = sum(theirs[layer] for theirs in weights)
    if total <= 0:
        return float(rank == 0)
    return weights[rank][layer] / total
