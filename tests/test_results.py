"""Results: what is kept can be shown, whichever version wrote it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from asyncprop.cli import main
from asyncprop.report.overview import overview
from asyncprop.report.page import TableBlock, render_html
from asyncprop.report.plans import plans_markdown
from asyncprop.report.tables import COMPARISON, comparison_markdown, print_comparison

ROOT = Path(__file__).parents[1]


def is_comparison(content: Any) -> bool:
    return isinstance(content, dict) and {"rows", "task"} <= set(content)


FILES = sorted((ROOT / "results").glob("*.json"))
COMPARISONS = [file for file in FILES if is_comparison(json.loads(file.read_text(encoding="utf-8")))]
CROSSING = list(COMPARISON).index("crosses target (s)")


def test_there_are_comparisons_of_both_kinds() -> None:
    told = ["crosses_target_s_mean" in json.loads(file.read_text(encoding="utf-8"))["rows"][0] for file in COMPARISONS]
    assert set(told) == {True, False}


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_every_comparison_has_its_page(file: Path) -> None:
    page = overview([file], "asyncprop report")
    content = json.loads(file.read_text(encoding="utf-8"))
    table = page.sections[0].blocks[0]
    assert isinstance(table, TableBlock)
    assert [line[0] for line in table.rows] == [row["method"] for row in content["rows"]]
    for line, row in zip(table.rows, content["rows"], strict=True):
        assert (line[CROSSING] == "–") == (row["reached"] > 0 and "crosses_target_s_mean" not in row)
    assert content["task"] in render_html(page)


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_every_comparison_has_its_table(file: Path) -> None:
    content, said = json.loads(file.read_text(encoding="utf-8")), io.StringIO()
    print_comparison(content, said)
    assert content["task"] in said.getvalue()
    assert comparison_markdown(content).count("\n| ") == len(content["rows"]) + 2


def test_the_tables_of_plans_are_those_of_their_figures() -> None:
    for file in (ROOT / "results").glob("plan_*.json"):
        figures = json.loads(file.read_text(encoding="utf-8"))
        assert plans_markdown(figures) == file.with_suffix(".md").read_text(encoding="utf-8")


def test_older_comparisons_are_refused_in_one_line_where_the_crossing_is_what_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = ROOT / "results" / "methods_fashion-mnist_2-cores_2026-11-24.json"
    with pytest.raises(SystemExit) as ended:
        main(["delays", str(file)])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("asyncprop: comparisons must tell when their runs cross the target")
    assert err.count("\n") == 1
