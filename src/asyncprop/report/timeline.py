"""Timeline: a trace as spans: passes and what they do layer by layer, in tracks, with what is in flight and how stale.

A measured trace and a predicted one are the same to it: it reads events, and asks nobody where they come from.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from asyncprop.trace import Event, Trace

PASSES = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Span:
    """What one layer took of a pass: the pass's kind, or `write` for its step."""

    kind: str
    layer: int
    start_s: float
    end_s: float
    batch: int
    track: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Arrow:
    """A hand-over: from the end of a batch's forward pass to the start of its backward pass."""

    batch: int
    start_s: float
    start_track: tuple[int, int]
    end_s: float
    end_track: tuple[int, int]


class Timeline:
    """A trace, cut into what can be drawn.

    Args:
        trace: of one rank or several; a track is a rank's thread.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.passes = [event for event in trace.events if event.kind in PASSES]
        self.others = [event for event in trace.events if event.kind in ("send", "merge", "average", "wait")]

    @cached_property
    def tracks(self) -> list[tuple[int, int]]:
        """Rank and thread of every track, in order."""
        return sorted({track_of(event) for event in self.trace.events})

    def name(self, track: tuple[int, int]) -> str:
        """Return a track's name; the rank is told where there are several."""
        rank, thread = track
        name = self.trace.threads[thread]
        return f"rank {rank} {name}" if len({rank for rank, _ in self.tracks}) > 1 else name

    @cached_property
    def spans(self) -> list[Span]:
        """What each layer took, pass by pass.

        A forward pass is with a layer from its read until the next layer's, a backward pass from what it did last
        until the layer's gradient is ready. So the two ends of a pass that no layer has (data, loss) are left out.
        """
        inside = defaultdict(list)
        for event in self.trace.events:
            if event.kind in ("read", "ready", "write") and event.layer >= 0:
                inside[event.rank, event.batch].append(event)
        spans: list[Span] = []
        for one in self.passes:
            events = [event for event in inside[one.rank, one.batch] if one.start_s <= event.start_s <= one.end_s]
            spans += _forward(one, events) if one.kind == "forward" else _backward(one, events)
        return spans

    @cached_property
    def arrows(self) -> list[Arrow]:
        """The hand-overs of the passes of which both halves are there."""
        ends = {(event.rank, event.batch): event for event in self.passes if event.kind == "forward"}
        return [
            Arrow(event.batch, start.end_s, track_of(start), event.start_s, track_of(event))
            for event in self.passes
            if event.kind == "backward" and (start := ends.get((event.rank, event.batch)))
        ]

    @cached_property
    def in_flight(self) -> list[tuple[int, float, int]]:
        """Rank, time, and the passes in flight from then on."""
        changes = [(event.start_s if event.kind == "forward" else event.end_s, event.kind == "forward", event.rank)
                   for event in self.passes]  # fmt: skip
        counts: dict[int, int] = defaultdict(int)
        found = []
        for time, begins, rank in sorted(changes):
            counts[rank] = max(0, counts[rank] + (1 if begins else -1))
            found.append((rank, time, counts[rank]))
        return found

    @cached_property
    def staleness(self) -> list[tuple[Event, int]]:
        """Every write whose read is there, with the updates by other passes that landed in between."""
        versions: dict[tuple[int, int], int] = defaultdict(int)
        read: dict[tuple[int, int, int], int] = {}
        found = []
        moments = [event for event in self.trace.events if event.kind in ("read", "write") and event.layer >= 0]
        for event in sorted(moments, key=lambda event: (event.end_s, event.kind)):  # at one moment: reads first
            key = (event.rank, event.batch, event.layer)
            if event.kind == "read":
                read.setdefault(key, versions[event.rank, event.layer])
            else:
                if key in read:
                    found.append((event, versions[event.rank, event.layer] - read[key]))
                versions[event.rank, event.layer] += 1
        return found

    @property
    def end_s(self) -> float:
        """When the last event ends."""
        return max((event.end_s for event in self.trace.events), default=0.0)

    def window(self, passes: int = 8) -> tuple[float, float]:
        """Return a stretch near the middle of the trace in which so many batches begin, without a pause such as
        evaluations make.
        """
        starts = sorted(event.start_s for event in self.passes if event.kind == "forward")
        if len(starts) <= passes:
            return 0.0, self.end_s
        lengths = [end - start for start, end in zip(starts, starts[passes:], strict=False)]
        usual, middle = 1.5 * statistics.median(lengths), (len(starts) - passes) // 2
        first = min((n for n, length in enumerate(lengths) if length <= usual), key=lambda n: abs(n - middle))
        return starts[first], starts[first + passes]


def load_timeline(path: Path) -> Timeline:
    """Read the timeline of a run's folder, or of a trace file.

    Raises:
        ValueError: if there is none.
    """
    file = path / "trace.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"run must be a folder with a trace.jsonl, or such a file ({path} is neither)")
    timeline = Timeline(Trace.load(file))
    if not timeline.passes:
        raise ValueError(f"{file} must have forward or backward passes in it (it has none)")
    return timeline


def track_of(event: Event) -> tuple[int, int]:
    """Return the track that an event is in."""
    return event.rank, event.thread


def _forward(one: Event, events: Iterable[Event]) -> list[Span]:
    reads = sorted((event for event in events if event.kind == "read" and not event.detail), key=_start)
    ends = [event.start_s for event in reads[1:]] + ([one.end_s] if reads else [])
    return [
        Span("forward", event.layer, event.start_s, end, one.batch, track_of(one))
        for event, end in zip(reads, ends, strict=True)
    ]


def _backward(one: Event, events: Iterable[Event]) -> list[Span]:
    spans, last = [], one.start_s
    for event in sorted((event for event in events if event.kind in ("ready", "write")), key=_start):
        if event.kind == "write":
            spans.append(Span("write", event.layer, event.start_s, event.end_s, one.batch, track_of(one)))
        elif event.start_s > last:
            spans.append(Span("backward", event.layer, last, event.start_s, one.batch, track_of(one)))
        last = max(last, event.end_s)
    return spans


def _start(event: Event) -> float:
    return event.start_s
