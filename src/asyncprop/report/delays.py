"""Delays: comparisons that differ in their delay, as one table: what a straggler costs each method."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from asyncprop.report.tables import markdown_table, print_table, provenance

Comparison = dict[str, Any]


def read_comparisons(files: Sequence[Path]) -> list[Comparison]:
    """Read what `asyncprop compare --json` has written.

    Raises:
        ValueError: if a file is no comparison, or an older one that does not tell when runs cross the target, or the
            comparisons are not of the same runs but for their delay. Some may have methods that others have not; the
            first method is in all.
    """
    if not files:
        raise ValueError("comparisons must be given: the files that asyncprop compare --json has written")
    found = []
    for file in files:
        try:
            comparison = json.loads(file.read_text(encoding="utf-8"))
            comparison["rows"], comparison["config"]["task"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"comparisons must be files of asyncprop compare --json ({file}: {error})") from None
        if any("crosses_target_s_mean" not in row for row in comparison["rows"]):
            raise ValueError(
                f"comparisons must tell when their runs cross the target ({file} is older, and does not): make it anew "
                "by asyncprop compare --json with its --out, which keeps finished runs"
            )
        found.append(comparison)
    for comparison in found[1:]:
        ours, theirs = ({**c["config"], "delay": None, "methods": None} for c in (found[0], comparison))
        if ours != theirs:
            wrong = ", ".join(sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)))
            raise ValueError(f"comparisons must differ in their delay alone (these differ in {wrong})")
        if (one := found[0]["target"]) != (other := comparison["target"]):
            raise ValueError(
                f"comparisons must have one target (got {one:g} and {other:g}): compare with --target NUMBER"
            )
        if (first := found[0]["rows"][0]["method"]) != (another := comparison["rows"][0]["method"]):
            raise ValueError(f"comparisons must begin with the same method (got {first} and {another})")
    return found


def delay_rows(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return one row per delay, in order, with each method's time to target, and the first method's over it.

    The time is that at which the line through the evaluations crosses the target: a step of an epoch is coarse here.

    `environments` are those of the comparisons, in the order of their delays. Each row has `delay_s` and, by the
    methods that were compared there, `mean_s` and `std_s` (None if not every run reached the target), `reached`, `n`,
    and `ratio`, the first method's mean over this one's.
    """
    comparisons = sorted(comparisons, key=lambda comparison: _seconds(comparison["config"]["delay"]))
    rows = []
    for comparison in comparisons:
        cells = {}
        for row in comparison["rows"]:
            whole = row["reached"] == row["n"]
            cells[row["method"]] = {
                "mean_s": row["crosses_target_s_mean"] if whole else None,
                "std_s": row["crosses_target_s_std"] if whole else None,
                "reached": row["reached"],
                "n": row["n"],
            }
        base = next(iter(cells.values()))["mean_s"]
        for cell in cells.values():
            cell["ratio"] = base / cell["mean_s"] if base and cell["mean_s"] else None
        rows.append({"delay_s": _seconds(comparison["config"]["delay"]), "methods": cells})
    return {
        "task": comparisons[0]["task"],
        "target": comparisons[0]["target"],
        "rows": rows,
        "environments": [comparison["environment"] for comparison in comparisons],
    }


def _seconds(delay: str | None) -> float:
    found = re.findall(r"seconds=([0-9.eE+-]+)", delay or "")
    if delay and len(found) != 1:
        raise ValueError(f"comparisons must have one delay each, in seconds (got {delay})")
    return float(found[0]) if found else 0.0


def _table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    methods = methods_of(found)
    columns = ["delay (s per step)", *methods, *(f"{methods[0]} / {method}" for method in methods[1:])]
    lines = []
    for row in found["rows"]:
        cells = row["methods"]
        times = [_time(cells.get(method)) for method in methods]
        ratios = [f"{ratio:.2f}" if (ratio := cells.get(method, {}).get("ratio")) else "–" for method in methods[1:]]
        lines.append([f"{row['delay_s']:g}", *times, *ratios])
    return columns, lines


def methods_of(found: dict[str, Any]) -> list[str]:
    """Return the methods of all rows, in the order in which they first come."""
    return list(dict.fromkeys(method for row in found["rows"] for method in row["methods"]))


def _time(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if cell["mean_s"] is None:
        return f"reached by {cell['reached']} of {cell['n']}"
    return f"{cell['mean_s']:.1f}" + (f" ± {cell['std_s']:.1f}" if cell["std_s"] is not None else "")


def _title(found: dict[str, Any]) -> str:
    return f"{found['task']}: seconds of training until {found['target']:.4g}, by delay"


def print_delays(found: dict[str, Any], stream: TextIO) -> None:
    """Print the rows."""
    print(_title(found), file=stream)
    columns, lines = _table(found)
    print_table(stream, columns, lines, numbers_from=0)


def delay_markdown(found: dict[str, Any], command: str) -> str:
    """Return the rows in Markdown, with what made each of them, and the command that made this."""
    made = "\n".join(f"- {provenance(environment)}" for environment in found["environments"])
    return f"# {_title(found)}\n\n{markdown_table(*_table(found))}\n{made}\n\nThis table: `{command}`\n"
