"""`asyncprop compare` and `asyncprop delays`: several methods side by side, and what a straggler costs each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from asyncprop.cli.common import FAILED, Flat, JsonFile, check_writable, complain, given_options
from asyncprop.config import CompareConfig, CompareOptions, resolve


def compare(
    task: str | None = None,
    /,
    *,
    options: Annotated[CompareOptions, Flat] = CompareOptions(),  # noqa: B008 (frozen)
    config: Path | None = None,
    out: Path | None = None,
    json: JsonFile = None,
    markdown: Path | None = None,
    quiet: bool = False,
) -> int:
    """Train TASK by several methods and seeds, in turn, and set them side by side.

    Args:
        task: Name from `asyncprop tasks`.
        options: What to compare.
        config: TOML file of options; what is given here overrides it.
        out: Folder of the runs. Given again, finished runs are kept and the others go on. Default: one under compare/.
        json: File to write the rows to.
        markdown: File to write the table to, with how it was made.
        quiet: Print the table only.
    """
    from asyncprop.methods.compare import RunFailedError
    from asyncprop.methods.compare import compare as compare_methods
    from asyncprop.report.tables import comparison_markdown, print_comparison
    from asyncprop.runs import write_json

    check_writable(json, markdown)
    resolved = resolve(CompareConfig, given_options(options, task), config)
    try:
        comparison = compare_methods(resolved, out, sys.stderr, quiet=quiet)
    except RunFailedError as error:
        return complain(str(error), FAILED)
    print_comparison(comparison, sys.stdout)
    if json:
        write_json(json, comparison)
    if markdown:
        markdown.write_text(comparison_markdown(comparison), encoding="utf-8")
    return 0


def delays(*comparisons: Path, json: JsonFile = None, markdown: Path | None = None, plot: Path | None = None) -> None:
    """Set comparisons of the same methods side by side that differ in their delay: how much a straggler costs.

    Args:
        comparisons: JSON files that `asyncprop compare --delay ... --json FILE` has written.
        json: File to write the rows to.
        markdown: File to write the table to.
        plot: File to draw the curves to (.svg or .png).
    """
    from asyncprop.report.delays import delay_markdown, delay_rows, print_delays, read_comparisons
    from asyncprop.runs import environment, write_json

    check_writable(json, markdown, plot)
    rows = delay_rows(read_comparisons(comparisons))
    print_delays(rows, sys.stdout)
    if json:
        write_json(json, rows)
    if markdown:
        markdown.write_text(delay_markdown(rows, environment()["command"]), encoding="utf-8")
    if plot:
        from asyncprop.report.figures import plot_delays

        plot_delays(rows, plot)
