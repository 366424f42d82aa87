"""Charts: curves, bars and strips as SVG that takes its colours from the page, and says what it shows in words."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib writes colours as numbers; each of these numbers becomes one of the page's variables.
NAMES = ("text", "muted", "grid", "paper", *(f"s{number}" for number in range(8)))
COLOURS = {name: f"#0a0b{number:02x}" for number, name in enumerate(NAMES)}
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^DvP*X"

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read, searched and scaled
    "svg.hashsalt": "asyncprop",  # the same picture twice is the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **{f"{key}.color": COLOURS["text"] for key in ("text", "xtick", "ytick")},
    "axes.labelcolor": COLOURS["text"],
    "axes.edgecolor": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """One line: its label, and its points. Curves of one label share a colour; only the first is in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def curves(
    lines: Sequence[Curve], *, x: str, y: str, name: str, description: str, level: float | None = None
) -> str:  # fmt: skip
    """Return curves over an axis that begins at 0; `level` is drawn as a horizontal line, such as a target."""
    with _drawing(name, description) as (axes, done):
        order = list(dict.fromkeys(line.label for line in lines))
        for line in lines:
            place = order.index(line.label)
            is_first = next(other for other in lines if other.label == line.label) is line
            axes.plot(
                line.x, line.y, color=series(place), linestyle=DASHES[place // 8 % 4],
                marker=MARKERS[place % 8] if len(line.x) <= 40 else None, markersize=3, linewidth=1.2,
                label=line.label if is_first else None, alpha=1.0 if is_first else 0.55,
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color=COLOURS["muted"], linewidth=0.8, linestyle=":", label=f"target {level:.4g}")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=7, integer=x != "seconds of training")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(axes, len(order))
    return done[0]


def bars(
    labels: Sequence[str], groups: dict[str, Sequence[float | None]], *, x: str, name: str, description: str,
    errors: dict[str, Sequence[float | None]] | None = None, stacked: bool = False,
) -> str:  # fmt: skip
    """Return horizontal bars: one or several (`groups`) for each label; None leaves a bar out, `x` names the unit."""
    folded = [_folded(label) for label in labels]
    lines = max((label.count("\n") + 1 for label in folded), default=1)
    each = max(0.24 * (1 if stacked else len(groups)), 0.17 * lines)
    with _drawing(name, description, height=max(1.2, 0.6 + each * len(labels))) as (axes, done):
        places = [float(-number) for number in range(len(labels))]
        thickness = 0.7 if stacked else 0.8 / len(groups)
        lefts = [0.0] * len(labels)
        for number, (group, values) in enumerate(groups.items()):
            shift = 0.0 if stacked else thickness * ((len(groups) - 1) / 2 - number)
            widths = [value or 0.0 for value in values]
            spread = [error or 0.0 for error in errors[group]] if errors and group in errors else None
            axes.barh(
                [place + shift for place in places], widths, thickness, left=lefts if stacked else None,
                color=series(number), label=group, xerr=spread,
                error_kw={"ecolor": COLOURS["muted"], "capsize": 2, "elinewidth": 0.8},
            )  # fmt: skip
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)] if stacked else lefts
        axes.set_yticks(places, folded)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x)
        if len(groups) > 1:
            _legend(axes, len(groups))
    return done[0]


def strip(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *, x: str, unit: str,
    name: str, description: str,
) -> str:  # fmt: skip
    """Return a heat strip: a row of cells each, the stronger the higher; None stays empty. Written out by hand, as
    its cells are to mix two colours of the page.
    """
    highest = max((value for row in values for value in row if value is not None), default=0.0) or 1.0
    cell, top, width = 11.0, 6.0, 320.0
    left = 8.0 + 4.4 * max((len(_short(row)) for row in rows), default=0)
    step = (width - left - 4) / max(1, len(columns))
    height = top + cell * len(rows) + 38
    body = []
    for number, row in enumerate(values):
        y = top + cell * number
        body.append(f'<text x="{left - 4}" y="{y + cell - 3}" text-anchor="end">{escape(_short(rows[number]))}</text>')
        for place, value in enumerate(row):
            if value is not None:
                share = value / highest
                body.append(
                    f'<rect x="{left + place * step:.2f}" y="{y:.2f}" width="{step + 0.05:.2f}" height="{cell - 1}" '
                    f'style="fill: var(--heat-low)"/><rect x="{left + place * step:.2f}" y="{y:.2f}" '
                    f'width="{step + 0.05:.2f}" height="{cell - 1}" style="fill: var(--heat-high); '
                    f'fill-opacity: {share:.3f}"/>'
                )
    bottom = top + cell * len(rows) + 9
    for place in sorted({0, len(columns) // 2, len(columns) - 1}):
        middle = f"{left + (place + 0.5) * step:.1f}"
        body.append(f'<text x="{middle}" y="{bottom}" text-anchor="middle">{escape(columns[place])}</text>')
    body.append(f'<text x="{left}" y="{bottom + 12}">{escape(x)}; strongest: {highest:.2f} {escape(unit)}</text>')
    inside = f'<g style="font: 7.5px sans-serif; fill: var(--text)">{"".join(body)}</g>'
    return labelled(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}">{inside}</svg>',
                     name, description)  # fmt: skip


def series(place: int) -> str:
    """Return the colour of the n-th series, as matplotlib is given it."""
    return COLOURS[f"s{place % 8}"]


@contextmanager
def _drawing(
    name: str, description: str, *, width: float = 4.4, height: float = 2.9
) -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to draw on; afterwards the list holds the picture."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install 'asyncprop[report]'") from None
    done: list[str] = []
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), done
        written = io.StringIO()
        figure.savefig(
            written, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None}
        )
    done.append(labelled(_to_page(written.getvalue()), name, description))


def _to_page(svg: str) -> str:
    """Strip what is for files of their own, and let the page have the colours and the size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|title)>.*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("'DejaVu Sans', ", "")


def labelled(svg: str, name: str, description: str) -> str:
    """Give every id of the picture its own name on the page, and the picture a title and a description."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', svg)
    words = f'<title id="{name}-title">{escape(name.replace("-", " "))}</title><desc id="{name}-desc">' \
            f"{escape(description)}</desc>"  # fmt: skip
    return re.sub(
        r"<svg([^>]*)>", rf'<svg\1 role="img" aria-labelledby="{name}-title {name}-desc">{words}', svg, count=1
    )


def _legend(axes: Axes, entries: int) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 if entries > 1 else 1)


def _short(name: str, longest: int = 20) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _folded(label: str, longest: int = 36) -> str:
    """Return a label in lines of at most so many characters, if its colons allow, so that bars keep their room."""
    lines = [""]
    for part in re.findall(r"[^:]+:?|:", label):
        if lines[-1] and len(lines[-1]) + len(part) > longest:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return text as it stands inside a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
