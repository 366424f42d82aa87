"""Versions: how many updates each layer has had, and how stale each update was."""

from __future__ import annotations


class Versions:
    """Counts of landed updates by lane and layer.

    Guarantees: no count is lost, though nothing is locked: each lane carries one pass at a time, and only that pass
    writes the lane's row. Assumes: reading another lane's integer is atomic (it is, in CPython). The race that
    remains: a sum over lanes may or may not see an update that lands at that very instant; either answer is true.
    """

    def __init__(self, lanes: int, layers: int) -> None:
        self._landed = [[0] * layers for _ in range(lanes)]
        self._ages = [[0] * layers for _ in range(lanes)]

    def of(self, layer: int) -> int:
        """Return the version of a layer: the updates that have landed on it."""
        version = 0
        for row in self._landed:
            version += row[layer]
        return version

    def all(self) -> list[int]:
        """Return the version of every layer."""
        return [sum(column) for column in zip(*self._landed, strict=True)]

    def landed(self, lane: int, layer: int, age: int) -> None:
        """Count an update by the pass in `lane` that was `age` updates stale."""
        self._landed[lane][layer] += 1
        self._ages[lane][layer] += age

    def mean_staleness(self) -> list[float]:
        """Return the mean staleness of each layer's updates; 0.0 for a layer that had none."""
        ages = [sum(column) for column in zip(*self._ages, strict=True)]
        return [age / version if version else 0.0 for age, version in zip(ages, self.all(), strict=True)]
