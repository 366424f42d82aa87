"""`asyncprop reproduce`: the paper's tables and figures, ours beside its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import FAILED, complain

if TYPE_CHECKING:
    from asyncprop.report.page import Page


def reproduce(
    *exhibits: str,
    scale: str = "small",
    data_dir: Path | None = None,
    seeds: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    device: str = "cpu",
    out: Path | None = None,
    quiet: bool = False,
) -> int:
    """Run what tables and figures of the paper need, and write ours beside the paper's.

    Args:
        exhibits: table1 to table10, figure1 to figure8, or all.
        scale: tiny (shows that it works), small (for two cores), medium, or full (the paper's protocol).
        data_dir: Folder that holds cifar10, cifar100, imagenet and imdb, or some of them. What is not there is replaced
            by a stand-in, which headings name.
        seeds: Runs of each method. Default: the scale's.
        device: Where models live: cpu, cuda or cuda:N.
        out: Folder of runs and results; given again, what is finished is kept. Default: reproduce/ and the scale.
        quiet: Print the names of the files only.
    """
    from asyncprop.exhibits import choose, name_of
    from asyncprop.exhibits.scales import get_scale

    chosen, size = choose(exhibits), get_scale(scale)
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"data-dir must be a folder ({data_dir} is not)")
    from asyncprop.exhibits.reproduce import Request
    from asyncprop.exhibits.reproduce import reproduce as make
    from asyncprop.methods.compare import RunFailedError
    from asyncprop.runs import writing

    out = out or Path("reproduce") / scale
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    request = Request(size, scale, out, data_dir, device, seeds)
    try:
        page = make(chosen, request, sys.stderr, quiet=quiet)
    except (RunFailedError, RuntimeError) as error:
        return complain(str(error), FAILED)
    name = name_of(chosen)
    _write(page, out, name)
    print(out / f"{name}.md", out / f"{name}.html", sep="\n")
    return 0


def _write(page: Page, out: Path, name: str) -> None:
    """Write the page as Markdown and as HTML, and each picture as SVG and as PNG."""
    from asyncprop.report.page import render_html, write_markdown
    from asyncprop.report.png import write_pngs

    (out / f"{name}.html").write_text(render_html(page), encoding="utf-8")
    write_markdown(page, out / f"{name}.md")
    try:
        write_pngs(page, out)
    except ValueError as error:  # all else is there: what has run for hours does not fail at this
        print(f"asyncprop: pictures are SVG only: {error}", file=sys.stderr)
