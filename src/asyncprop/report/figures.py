"""Figures: what the tables say, drawn by matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from asyncprop.report.delays import methods_of


def check_picture(path: Path) -> None:
    """Refuse, before hours of work, a picture that could not be drawn after them.

    Raises:
        ValueError: if the suffix is of no picture, or matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("plot needs matplotlib: pip install 'asyncprop[report]'")
    if path.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise ValueError(f"plot must be a .svg, .png or .pdf file (got {path})")


def new_figure(path: Path) -> tuple[Any, Any]:
    """Return an empty figure and its axes, for a picture that is to be written to `path`.

    Raises:
        ValueError: if the suffix is of no picture, or matplotlib is not installed.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    return figure, figure.add_subplot()


def plot_delays(found: dict[str, Any], path: Path) -> None:
    """Draw each method's time to target against the delay; the legend says where not every run reached it.

    Args:
        found: what `report.delays.delay_rows` returns.
        path: of the picture; its suffix says which kind.

    Raises:
        ValueError: if the suffix is of no picture, or matplotlib is not installed.
    """
    figure, axes = new_figure(path)
    from matplotlib import rc_context

    for method, marker in zip(methods_of(found), "osD^vP*X<>", strict=False):
        rows = [row for row in found["rows"] if method in row["methods"]]
        cells = [(row["delay_s"], row["methods"][method]) for row in rows if row["methods"][method]["mean_s"]]
        missed = [f"{row['delay_s']:g}" for row in rows if not row["methods"][method]["mean_s"]]
        axes.errorbar(
            [delay for delay, _ in cells],
            [cell["mean_s"] for _, cell in cells],
            yerr=[cell["std_s"] or 0.0 for _, cell in cells],
            marker=marker,
            capsize=3,
            label=f"{method}, not by every run at {', '.join(missed)} s" if missed else method,
        )
    axes.set_xlabel("delay (s per step)")
    axes.set_ylabel(f"training time to {found['target']:.4g} (s)")
    axes.set_title(found["task"])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, dpi=150)
