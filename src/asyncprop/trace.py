"""Step and Statistics: what a trainer reports of each finished batch, and of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

Staleness = tuple[int, ...]
"""Updates by other passes that landed on each layer between a pass's read and its write, one entry a layer."""


@dataclass(frozen=True, slots=True)
class Step:
    """One batch, finished: its gradient has been applied (or `skipped`).

    `index` counts the batches in the order in which the trainer took them, from 0. `staleness` has an entry for each
    layer, in `Statistics.layers` order; -1 marks a layer that this pass did not update; it is empty with telemetry off.
    Times are seconds: `forward_s` and `backward_s` of the passes themselves, `waited_s` between the two.
    `queue_depth` is the number of passes that waited for a backward thread when this one was handed over.
    """

    index: int
    loss: float
    batch_size: int
    staleness: Staleness = ()
    lane: int = 0
    forward_s: float = math.nan
    backward_s: float = math.nan
    waited_s: float = math.nan
    queue_depth: int = 0
    skipped: bool = False

    @property
    def mean_staleness(self) -> float:
        """Mean over the layers that this batch updated; 0.0 where none is known."""
        known = [age for age in self.staleness if age >= 0]
        return sum(known) / len(known) if known else 0.0


@dataclass(frozen=True, slots=True)
class ThreadTime:
    """How one thread spent its life so far, in seconds: working on passes, and waiting for work."""

    name: str
    worked_s: float
    waited_s: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """A trainer at one instant. Counts are since it was opened; `versions` and `staleness` go by layer, as `layers`."""

    batches: int
    samples: int
    skipped: int
    in_flight: int
    lanes: int
    layers: tuple[str, ...]
    versions: tuple[int, ...]
    staleness: tuple[float, ...]
    mean_queue_depth: float
    max_queue_depth: int
    threads: tuple[ThreadTime, ...]

    @property
    def mean_staleness(self) -> float:
        """Mean over all layer updates so far; 0.0 before the first."""
        updates = sum(self.versions)
        if not updates:
            return 0.0
        return sum(mean * count for mean, count in zip(self.staleness, self.versions, strict=True)) / updates
