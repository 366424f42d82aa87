"""Tracks: a timeline as a picture (Figure 1 of the paper is one) and as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.text import Text

from asyncprop.report.charts import escape, labelled
from asyncprop.report.timeline import Span, Timeline, track_of

Window = tuple[float, float]

_FILL = {"forward": "s0", "backward": "s1", "write": "text", "wait": "grid", "average": "s2", "send": "s3",
         "merge": "s4"}  # fmt: skip
_SHADE = {"forward": "-", "backward": "=", "write": "!", "wait": ".", "average": "~", "send": ">", "merge": "<"}
_STYLE = {"forward": "blue", "backward": "dark_orange3", "write": "bold", "wait": "dim", "average": "green",
          "send": "magenta", "merge": "yellow"}  # fmt: skip

LEFT, WIDTH, TRACK, GAP, LETTER = 74.0, 640.0, 26.0, 16.0, 5.0
"""Pixels of a picture: the tracks' names, all of it, a track, what is between two, and a letter."""


def draw(timeline: Timeline, window: Window, *, name: str, title: str) -> str:
    """Return a picture of a stretch of time: a row for each thread, passes in it, their layers, writes as black ticks,
    and an arrow from each forward pass to its backward pass.
    """
    tracks = timeline.tracks
    height = 22 + len(tracks) * (TRACK + GAP) + 22
    top = {track: 18 + place * (TRACK + GAP) for place, track in enumerate(tracks)}
    scale = (WIDTH - LEFT - 6) / max(window[1] - window[0], 1e-12)

    def x(time_s: float) -> float:
        return LEFT + (min(max(time_s, window[0]), window[1]) - window[0]) * scale

    body = [_track(timeline.name(track), top[track]) for track in tracks]
    for event in (*timeline.others, *timeline.passes):
        if _overlaps(event.start_s, event.end_s, window):
            left, y = x(event.start_s), top[track_of(event)]
            words = event.kind if event.batch < 0 else f"{event.kind} {event.batch}"
            body.append(_box(event.kind, left, y, x(event.end_s) - left, words))
    body += [
        _part(span, x, top[span.track], timeline.trace.layers[span.layer])
        for span in timeline.spans
        if _overlaps(span.start_s, span.end_s, window)
    ]
    for event in timeline.passes:
        if window[0] <= event.start_s < window[1]:
            label, left = f"{'F' if event.kind == 'forward' else 'B'}{event.batch}", x(event.start_s) + 5
            if x(event.end_s) - left >= LETTER * len(label):  # or it would run into the next
                body.append(f'<text x="{left:.2f}" y="{top[track_of(event)] - 2:.1f}">{label}</text>')
    for arrow in timeline.arrows:
        if window[0] <= arrow.start_s <= window[1] and arrow.end_s <= window[1]:
            start, end = top[arrow.start_track], top[arrow.end_track]
            if arrow.start_track != arrow.end_track:
                body.append(_arrow(x(arrow.start_s), start, x(arrow.end_s), end, name))
    body.append(_axis(window, height))
    head = (
        '<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5" orient="auto">'
        '<path d="M0 0L6 3L0 6z" style="fill: var(--text)"/></marker></defs>'
    )
    inside = f'{head}<g style="font: 8px sans-serif; fill: var(--text)">{"".join(body)}</g>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}">{inside}</svg>'
    return labelled(svg, name, f"{title}. {describe(timeline, window)}")


def describe(timeline: Timeline, window: Window) -> str:
    """Say in words what a stretch of a timeline shows."""
    inside = [event for event in timeline.passes if _overlaps(event.start_s, event.end_s, window)]
    batches = sorted({event.batch for event in inside})
    if not batches:
        return "Nothing happens in this stretch."
    ages = [age for event, age in timeline.staleness if window[0] <= event.end_s <= window[1]]
    mean = f", writes are {sum(ages) / len(ages):.2f} updates stale in the mean" if ages else ""
    flights = [count for _, time, count in timeline.in_flight if window[0] <= time <= window[1]]
    most = f", at most {max(flights)} passes are in flight" if flights else ""
    return (
        f"{len(timeline.tracks)} threads work on batches {batches[0]} to {batches[-1]} in "
        f"{_seconds(window[1] - window[0])}{most}{mean}."
    )


def print_tracks(timeline: Timeline, window: Window, stream: TextIO) -> None:
    """Print a stretch of time: a line for each thread; off a terminal it is 120 characters wide."""
    console = Console(file=stream, width=None if stream.isatty() else 120, highlight=False)
    names = {track: timeline.name(track) for track in timeline.tracks}
    margin = max(map(len, names.values())) + 1
    width = max(20, console.width - margin - 1)
    step = (window[1] - window[0]) / width
    console.print(Text("".rjust(margin) + f"{window[0]:.4f} s, a character is {_seconds(step)}", style="dim"))
    for track, name in names.items():
        line = Text(name.ljust(margin))
        for kind, shown in _characters(timeline, track, window, width):
            line.append(shown, style=_STYLE.get(kind))
        console.print(line, soft_wrap=True)
    legend = "F0-- forward pass of batch 0   B0== its backward pass   ! a layer is written   . waits"
    console.print(Text("".rjust(margin) + legend, style="dim"), soft_wrap=True)
    console.print(describe(timeline, window), soft_wrap=True)


def _characters(timeline: Timeline, track: tuple[int, int], window: Window, width: int) -> list[tuple[str, str]]:
    """Return a kind and a character for each cell of a track; labels stand at the start of passes."""
    cells = [("", " ")] * width
    step = (window[1] - window[0]) / width

    def place(time_s: float) -> int:
        return min(width, max(0, int((time_s - window[0]) / step + 1e-6)))

    events = [event for event in (*timeline.others, *timeline.passes) if track_of(event) == track]
    for event in events:
        if _overlaps(event.start_s, event.end_s, window):
            for cell in range(place(event.start_s), max(place(event.start_s) + 1, place(event.end_s))):
                if cell < width:
                    cells[cell] = (event.kind, _SHADE[event.kind])
    for span in timeline.spans:
        if span.kind == "write" and span.track == track and window[0] < span.end_s <= window[1]:
            cells[max(0, place(span.end_s) - 1)] = ("write", "!")
    for event in timeline.passes:
        if track_of(event) == track and window[0] <= event.start_s < window[1]:
            label = f"{event.kind[0].upper()}{event.batch}"
            for cell, character in enumerate(label, place(event.start_s)):
                if cell < min(width, place(event.end_s)):
                    cells[cell] = (event.kind, character)
    return cells


def _overlaps(start_s: float, end_s: float, window: Window) -> bool:
    return end_s > window[0] and start_s < window[1]


def _track(name: str, y: float) -> str:
    text = f'<text x="{LEFT - 5}" y="{y + TRACK / 2 + 3}" text-anchor="end">{escape(name)}</text>'
    line = f'<rect x="{LEFT}" y="{y + TRACK - 0.5}" width="{WIDTH - LEFT - 6}" height="0.5" style="fill: var(--grid)"/>'
    return text + line


def _box(kind: str, x: float, y: float, width: float, words: str) -> str:
    style = f"fill: var(--{_FILL[kind]}); fill-opacity: 0.3"
    return (
        f'<rect x="{x:.2f}" y="{y:g}" width="{max(width, 0.3):.2f}" height="{TRACK:g}" style="{style}">'
        f"<title>{escape(words)}</title></rect>"
    )


def _part(span: Span, x: Callable[[float], float], y: float, layer: str) -> str:
    left, right = x(span.start_s), x(span.end_s)
    words = f"<title>{escape(f'{span.kind} {layer}, batch {span.batch}')}</title>"
    if span.kind == "write":
        middle = max(right - 0.8, left)
        return (
            f'<rect x="{middle:.2f}" y="{y:g}" width="{max(right - middle, 0.8):.2f}" height="{TRACK:g}" '
            f'style="fill: var(--text)">{words}</rect>'
        )
    style = f"fill: var(--{_FILL[span.kind]}); fill-opacity: {0.85 if span.layer % 2 else 0.6}"
    box = (
        f'<rect x="{left:.2f}" y="{y + 4:g}" width="{max(right - left, 0.2):.2f}" height="{TRACK - 8:g}" '
        f'style="{style}">{words}</rect>'
    )
    if right - left < LETTER * len(layer):
        return box
    return (
        f'{box}<text x="{(left + right) / 2:.2f}" y="{y + TRACK / 2 + 3:g}" text-anchor="middle" '
        f'style="fill: var(--paper)">{escape(layer)}</text>'
    )


def _arrow(x1: float, top1: float, x2: float, top2: float, name: str) -> str:
    y1, y2 = (top1 + TRACK, top2) if top2 > top1 else (top1, top2 + TRACK)
    return (
        f'<path d="M{x1:.2f} {y1:g}L{x2 + 1:.2f} {y2:g}" marker-end="url(#head)" '
        f'style="stroke: var(--text); stroke-width: 0.8; fill: none"/>'
    )


def _axis(window: Window, height: float) -> str:
    left = f'<text x="{LEFT}" y="{height - 6:g}">{window[0]:.4g} s</text>'
    right = f'<text x="{WIDTH - 6}" y="{height - 6:g}" text-anchor="end">{window[1]:.4g} s</text>'
    return left + right


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
