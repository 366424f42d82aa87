"""Dashboard: a running trainer on a terminal: what each thread does, what waits, and how stale each layer is."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asyncprop.trace import Statistics

WINDOW_S = 2.0
"""What threads do is told of so many seconds: a pass counts when it ends, so shorter windows would only flicker."""
SHADES = " ░▒▓█"
BAR = 20


class Dashboard:
    """Remembers the last seconds of a trainer, and draws them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Statistics]] = deque()

    def add(self, statistics: Statistics, now_s: float | None = None) -> None:
        """Look at the trainer; the time is the present by default."""
        now_s = time.monotonic() if now_s is None else now_s
        if self._seen and self._seen[-1][1].layers != statistics.layers:
            self._seen.clear()
        self._seen.append((now_s, statistics))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()

    def draw(self, width: int, limit_samples_per_s: float | None = None) -> RenderableType:
        """Return what is to be seen, so many characters wide; nothing before the second look.

        Args:
            width: of the terminal.
            limit_samples_per_s: what the machine could give; None if that is unknown.
        """
        if len(self._seen) < 2:
            return Text("")
        (start_s, before), (end_s, now) = self._seen[0], self._seen[-1]
        table = Table.grid(padding=(0, 1))
        old = {thread.name: thread.worked_s for thread in before.threads}
        for thread in now.threads:
            share = (thread.worked_s - old.get(thread.name, 0.0)) / max(end_s - start_s, 1e-9)
            table.add_row(thread.name, _bar(share), f"{min(1.0, share):4.0%} inside passes")
        if limit_samples_per_s:
            rate = (now.samples - before.samples) / max(end_s - start_s, 1e-9)
            table.add_row("machine", _bar(rate / limit_samples_per_s), against_limit(rate, limit_samples_per_s))
        depth = f"{now.in_flight} of {now.lanes} lanes in flight, {now.mean_queue_depth:.2f} passes wait in the mean"
        return Group(table, Text(depth), _strip(recent_staleness(before, now), width))


def against_limit(samples_per_s: float, limit_samples_per_s: float | None) -> str:
    """Return throughput in words, against what the machine could give where that is known."""
    if not limit_samples_per_s:
        return f"{samples_per_s:,.0f} samples/s"
    share = samples_per_s / limit_samples_per_s
    return f"{samples_per_s:,.0f} samples/s, {share:.0%} of an estimated limit of {limit_samples_per_s:,.0f}"


def recent_staleness(before: Statistics, now: Statistics) -> list[float | None]:
    """Return each layer's mean staleness over the updates between two looks; None where there was none."""
    ages: list[float | None] = []
    for place in range(len(now.layers)):
        count = now.versions[place] - before.versions[place]
        total = now.staleness[place] * now.versions[place] - before.staleness[place] * before.versions[place]
        ages.append(max(0.0, total / count) if count > 0 else None)
    return ages


def _bar(share: float) -> Text:
    filled = round(BAR * min(1.0, max(0.0, share)))
    return Text("█" * filled, style="cyan") + Text("░" * (BAR - filled), style="dim")


def _strip(ages: list[float | None], width: int) -> Text:
    """Draw a cell for each layer, from the input to the output, or for a few at a time where there are too many."""
    known = [age for age in ages if age is not None]
    if not known:
        return Text("staleness: no layer has been stepped lately", style="dim")
    room = max(10, width - 36)
    group = -(-len(ages) // room)
    cells = [[age for age in ages[at : at + group] if age is not None] for at in range(0, len(ages), group)]
    means = [sum(cell) / len(cell) if cell else None for cell in cells]
    highest = max(age for age in means if age is not None) or 1.0
    line = Text("staleness, first layer ")
    for mean in means:
        line.append(SHADES[0] if mean is None else SHADES[round(mean / highest * (len(SHADES) - 1))], style="yellow")
    return line + Text(f" last; █ = {highest:.2f}" if any(known) else " last; none is stale")
