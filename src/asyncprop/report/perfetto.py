"""Perfetto: a timeline in Chrome's trace event format, which https://ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from asyncprop.report.timeline import Timeline, track_of

Row = dict[str, Any]


def chrome_trace(timeline: Timeline) -> Row:
    """Return the content of the file: a process for each rank, a thread for each thread, times in microseconds.

    Passes are slices, with what each layer took of them inside; arrows lead from the end of a batch's forward pass to
    its backward pass; passes in flight and the staleness of each write are counters.
    """
    rows = [*_names(timeline), *_slices(timeline), *_arrows(timeline), *_counters(timeline)]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _names(timeline: Timeline) -> list[Row]:
    ranks = sorted({rank for rank, _ in timeline.tracks})
    rows = [_meta("process_name", rank, 0, name=f"rank {rank}") for rank in ranks]
    for rank, thread in timeline.tracks:
        rows.append(_meta("thread_name", rank, thread, name=timeline.trace.threads[thread]))
        rows.append(_meta("thread_sort_index", rank, thread, sort_index=thread))
    return rows


def _meta(kind: str, rank: int, thread: int, **arguments: Any) -> Row:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": arguments}


def _slices(timeline: Timeline) -> list[Row]:
    """Return outer slices before inner ones: slices that begin together nest in the order of the file."""
    stale = {(event.rank, event.batch, event.layer): age for event, age in timeline.staleness}
    rows = [
        _slice(f"{event.kind} {event.batch}", event.kind, event.start_s, event.end_s, track_of(event),
               {"batch": event.batch, "lane": event.lane})
        for event in timeline.passes
    ]  # fmt: skip
    rows += [
        _slice(event.kind, event.kind, event.start_s, event.end_s, track_of(event),
               {"detail": event.detail, **({"batch": event.batch} if event.batch >= 0 else {}),
                **({"layer": timeline.trace.layers[event.layer]} if event.layer >= 0 else {})})
        for event in timeline.others
    ]  # fmt: skip
    for span in timeline.spans:
        name = timeline.trace.layers[span.layer]
        age = {"staleness": stale.get((span.track[0], span.batch, span.layer))} if span.kind == "write" else {}
        shown = f"write {name}" if span.kind == "write" else name
        rows.append(_slice(shown, span.kind, span.start_s, span.end_s, span.track, {"batch": span.batch, **age}))
    return rows


def _slice(name: str, kind: str, start_s: float, end_s: float, track: tuple[int, int], arguments: Row) -> Row:
    return {
        "ph": "X", "name": name, "cat": kind, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6, "pid": track[0],
        "tid": track[1], "args": arguments,
    }  # fmt: skip


def _arrows(timeline: Timeline) -> list[Row]:
    rows: list[Row] = []
    for arrow in timeline.arrows:
        rank, thread = arrow.start_track
        same = {"name": "hand-over", "cat": "hand-over", "id": f"{rank}.{arrow.batch}", "pid": rank, "bp": "e"}
        # An arrow starts in the slice that its start is in: a pass's last instant is in no slice any more.
        rows.append({**same, "ph": "s", "ts": arrow.start_s * 1e6 - 1e-3, "tid": thread})
        rows.append({**same, "ph": "f", "ts": arrow.end_s * 1e6, "tid": arrow.end_track[1]})
    return rows


def _counters(timeline: Timeline) -> list[Row]:
    rows: list[Row] = [
        {"ph": "C", "name": "passes in flight", "pid": rank, "tid": 0, "ts": time * 1e6, "args": {"passes": count}}
        for rank, time, count in timeline.in_flight
    ]
    rows += [
        {"ph": "C", "name": "staleness", "pid": event.rank, "tid": 0, "ts": event.end_s * 1e6,
         "args": {"updates": age}}
        for event, age in timeline.staleness
    ]  # fmt: skip
    return rows
