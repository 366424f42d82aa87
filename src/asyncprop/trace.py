"""Trace: what threads did, and when. Step and Statistics: what a trainer reports of each batch, and of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

Staleness = tuple[int, ...]
"""Updates by other passes that landed on each layer between a pass's read and its write, one entry a layer."""


@dataclass(frozen=True, slots=True)
class Step:
    """One batch, finished: its gradient has been applied (or `skipped`).

    `index` counts the batches in the order in which the trainer took them, from 0. `staleness` has an entry for each
    layer, in `Statistics.layers` order; -1 marks a layer that this pass did not update; it is empty with telemetry off.
    Times are seconds: `forward_s` and `backward_s` of the passes themselves, `waited_s` between the two, and in virtual
    time for other ranks. (Real loops in step wait for these inside their passes, where nothing tells it from work.)
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
    """A trainer at one instant. Counts are since it was opened; `versions` and `staleness` go by layer, as `layers`.

    `exchange` is what the exchange counts, by name (see `GossipTally`).
    """

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
    exchange: dict[str, float] = field(default_factory=dict)

    @property
    def mean_staleness(self) -> float:
        """Mean over all layer updates so far; 0.0 before the first."""
        updates = sum(self.versions)
        if not updates:
            return 0.0
        return sum(mean * count for mean, count in zip(self.staleness, self.versions, strict=True)) / updates


Kind = Literal["forward", "backward", "read", "ready", "write", "send", "merge", "average", "wait"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a thread did.

    Times are seconds since the trainer was opened, or virtual seconds; of an instant both are the same. A schedule, a
    recorded trace and a predicted one are made of the same events.

    Attributes:
        kind: a whole `forward` or `backward` pass; the instant at which a pass `read` a layer, or had its whole
            gradient `ready`; the `write` of a layer (its step); a layer's `send` to a peer and the `merge` of one that
            came; an `average` of the ranks; a `wait`.
        start_s, end_s: from when to when.
        thread: its place in `Trace.threads`.
        rank, lane, batch, layer: whose, in which lane, of which batch (in the order of taking), at which layer (its
            place in `Trace.layers`); -1 where that says nothing.
        detail: what the kind does not say.
    """

    kind: Kind
    start_s: float
    end_s: float
    thread: int
    rank: int = 0
    lane: int = -1
    batch: int = -1
    layer: int = -1
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """Events of one run, in the order of their starts, with the names of its layers and threads.

    As a file (`trace.jsonl` in a run's folder) it has a line per event, after a first line that says what they mean.
    """

    layers: tuple[str, ...]
    threads: tuple[str, ...]
    events: Sequence[Event]

    def save(self, path: Path) -> None:
        """Write the trace."""
        header = {
            "trace": FORMAT,
            "fields": [field.name for field in fields(Event)],
            "layers": list(self.layers),
            "threads": list(self.threads),
        }
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
            file.writelines(json.dumps(astuple(event)) + "\n" for event in self.events)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a trace.

        Raises:
            ValueError: if the file is not there, or is no trace of this kind.
        """
        try:
            with path.open(encoding="utf-8") as file:
                header = json.loads(file.readline())
                if header["trace"] != FORMAT:
                    raise ValueError(f"format {header['trace']}, not {FORMAT}")
                names = header["fields"]
                events = [Event(**dict(zip(names, json.loads(_whole(line)), strict=True))) for line in file]
            return cls(tuple(header["layers"]), tuple(header["threads"]), events)
        except OSError as error:
            raise ValueError(f"trace must be a readable file ({path}: {error.strerror})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a trace ({error})") from None


FORMAT = 1
"""Of the file. Another number would mean that fields have other meanings."""


def _whole(line: str) -> str:
    """Refuse a last line that was not written to its end."""
    if not line.endswith("\n"):
        raise ValueError("its last line is cut off")
    return line
