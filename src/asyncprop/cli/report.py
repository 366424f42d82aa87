"""`asyncprop report`: one page about runs and comparisons."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from asyncprop.cli.common import check_writable


def report(*runs: Path, out: Annotated[Path, Parameter(name="--out")] = Path("report.html")) -> None:
    """Write one self-contained HTML page about runs and comparisons, from their files alone.

    Args:
        runs: Folders of runs, folders of comparisons, and files that `asyncprop compare --json` has written.
        out: File to write.
    """
    from asyncprop.report.overview import overview
    from asyncprop.report.page import render_html

    check_writable(out)
    command = shlex.join(["asyncprop", "report", *map(str, runs), "--out", str(out)])
    out.write_text(render_html(overview(runs, command)), encoding="utf-8")
    print(out)
