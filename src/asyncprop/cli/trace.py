"""`asyncprop trace`: the timeline of a run, for Perfetto, as a picture, and as text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import check_writable


def trace(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    start: Annotated[float | None, Parameter(validator=Number(gte=0))] = None,
    seconds: Annotated[float | None, Parameter(validator=Number(gt=0))] = None,
    quiet: bool = False,
) -> None:
    """Write the timeline of a run for https://ui.perfetto.dev, and print a stretch of it.

    Args:
        run: Folder of a run that was trained with --trace, or a trace file.
        out: File to write: .json for Perfetto and chrome://tracing, .svg for a picture of the stretch that is printed.
            Default: trace.json in the run's folder.
        start: Seconds at which the stretch begins. Default: one of about eight batches, from the middle.
        seconds: Length of the stretch.
        quiet: Print the file's name only.
    """
    from asyncprop.report.page import standalone
    from asyncprop.report.perfetto import chrome_trace
    from asyncprop.report.timeline import load_timeline
    from asyncprop.report.tracks import draw, print_tracks

    out = out or (run if run.is_dir() else run.parent) / "trace.json"
    if out.suffix not in (".json", ".svg"):
        raise ValueError(f"out must be a .json or .svg file (got {out})")
    check_writable(out)
    timeline = load_timeline(run)
    first, last = timeline.window()
    length = seconds or last - first
    first = first if start is None else start
    window = (first, first + length)
    if window[0] >= timeline.end_s:
        raise ValueError(f"start must be < {timeline.end_s:.4g}, the end of the trace (got {window[0]:g})")
    if not quiet:
        print_tracks(timeline, window, sys.stdout)
    if out.suffix == ".svg":
        out.write_text(standalone(draw(timeline, window, name="timeline", title=f"Timeline of {run}")), "utf-8")
    else:
        out.write_text(json.dumps(chrome_trace(timeline)), encoding="utf-8")
    print(out)
