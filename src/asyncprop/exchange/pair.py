"""Pair: the arithmetic of gossip. Two ranks draw near each other, and the mean of all stays where it is.

A rank asks another with its values x of some layers. The other, at y, moves by δ = u/D·(x - y), and answers with
c = v/D·(y - x), which the first adds to whatever its values have become meanwhile. u and v are the weights of the two,
D = u·(1 + k) + v·(1 + l), and k and l are the questions that each has out besides: these will move it, too, and if all
moved it as far as one alone may, ranks would swing past each other. With k = l = 0 both meet at their weighted mean.

As u·c + v·δ = 0, the sum of all weights times values is moved by gradients alone (with the answers that are on their
way; randomized pairwise averaging, Boyd et al. 2006, without its appointments). Weights never travel. In push-sum
gossip they do (Kempe, Dobra and Gehrke 2003): the weight that is on its way stays behind while its sender learns, so
the mean learns the slower, the longer messages take (docs/design.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAIR_SHARE = 1.0
"""The weight of a rank when all have met."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: its weight in the mean of all, and how many questions it has out besides."""

    weight: float
    besides: int = 0

    @property
    def pull(self) -> float:
        """What counts in the denominator."""
        return self.weight * (1 + self.besides)


def answer_share(asker: Side, asked: Side) -> float:
    """Return v/D: how far the one that asked is to move, as a share of the way to the other."""
    return asked.weight / (asker.pull + asked.pull)


def moved_per_answer(asker: Side, asked: Side) -> float:
    """Return -u/v: how far the one that is asked moves, as a multiple of its answer."""
    return -asker.weight / asked.weight


def mean_share(weights: Sequence[float], rank: int) -> float:
    """Return a rank's share of the weighted mean; the first rank's is all if nobody has any weight.

    Args:
        weights: of each rank.
        rank: index into `weights`.
    """
    total = sum(weights)
    if total <= 0:
        return float(rank == 0)
    return weights[rank] / total
