"""`asyncprop theory`: the paper's formulas held against simulation and real training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from asyncprop.cli.common import JsonFile, check_writable


def theory(
    *,
    seeds: Annotated[int, Parameter(validator=Number(gte=1))] = 3,
    json: JsonFile = None,
    markdown: Path | None = None,
) -> None:
    """Hold the paper's formulas, as printed and corrected, against simulation and real training; a few minutes.

    Args:
        seeds: How often each training is run.
        json: File to write the figures to.
        markdown: File to write the tables to.
    """
    from asyncprop.bench.theory import bench_theory

    check_writable(json, markdown)
    bench_theory(seeds, sys.stdout, sys.stderr, json=json, markdown=markdown)
