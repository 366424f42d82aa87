"""Telemetry: what a trainer noted between two instants, and all ranks together, as a line of a run's file."""

from __future__ import annotations

from typing import Any

from asyncprop.trace import Statistics, ThreadTime

Telemetry = dict[str, Any]
"""`updates` and `staleness_by_layer` (by layer name), `threads`, `peak_memory_bytes`, as in `epochs.jsonl`."""


def between(before: Statistics, after: Statistics, *, rank: int, peak_memory_bytes: int) -> Telemetry:
    """Return what one rank noted from `before` to `after`.

    Times of a thread are what it worked and waited in between; staleness is the mean over a layer's updates.
    """
    if before.layers != after.layers:  # its layers were found anew: their counts are, too
        before = Statistics(0, 0, 0, 0, 0, after.layers, *_nothing(after), 0.0, 0, before.threads)
    updates = [late - early for early, late in zip(before.versions, after.versions, strict=True)]
    ages = [late - early for early, late in zip(_ages(before), _ages(after), strict=True)]
    starts = {thread.name: thread for thread in before.threads}
    return {
        "updates": dict(zip(after.layers, updates, strict=True)),
        "staleness_by_layer": {
            layer: round(max(0.0, age / count), 4) if count else None
            for layer, age, count in zip(after.layers, ages, updates, strict=True)
        },
        "threads": [_lived(starts.get(thread.name), thread, rank) for thread in after.threads],
        "peak_memory_bytes": peak_memory_bytes,
    }


def merge(ranks: list[Telemetry]) -> Telemetry:
    """Return what all ranks noted: updates, threads and memory are added up, staleness is weighted by updates."""
    layers = list(ranks[0]["updates"])
    updates = {layer: sum(rank["updates"][layer] for rank in ranks) for layer in layers}
    ages = {
        layer: sum((rank["staleness_by_layer"][layer] or 0.0) * rank["updates"][layer] for rank in ranks)
        for layer in layers
    }
    return {
        "updates": updates,
        "staleness_by_layer": {
            layer: round(ages[layer] / updates[layer], 4) if updates[layer] else None for layer in layers
        },
        "threads": [thread for rank in ranks for thread in rank["threads"]],
        "peak_memory_bytes": sum(rank["peak_memory_bytes"] for rank in ranks),
    }


def _nothing(statistics: Statistics) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return (0,) * len(statistics.layers), (0.0,) * len(statistics.layers)


def _ages(statistics: Statistics) -> list[float]:
    return [mean * count for mean, count in zip(statistics.staleness, statistics.versions, strict=True)]


def _lived(start: ThreadTime | None, end: ThreadTime, rank: int) -> dict[str, Any]:
    worked, waited = (start.worked_s, start.waited_s) if start else (0.0, 0.0)
    return {
        "rank": rank,
        "name": end.name,
        "worked_s": round(max(0.0, end.worked_s - worked), 6),
        "waited_s": round(max(0.0, end.waited_s - waited), 6),
    }
