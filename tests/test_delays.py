"""Delays: comparisons that differ in their delay alone, as a table and a picture."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from asyncprop.report.delays import delay_markdown, delay_rows, print_delays, read_comparisons
from asyncprop.report.figures import plot_delays


def comparison(delay: str | None, times: dict[str, float | None], **config: Any) -> dict[str, Any]:
    return {
        "task": "digits",
        "target": 0.9,
        "config": {"task": "digits", "epochs": 2, "delay": delay, **config},
        "environment": dict.fromkeys(("command", "commit", "torch", "python", "cores", "processor", "started"), "x"),
        "rows": [
            {"method": method, "n": 3, "reached": 3 if seconds else 1, "crosses_target_s_mean": seconds or 1.0,
             "crosses_target_s_std": 0.5}
            for method, seconds in times.items()
        ],
    }  # fmt: skip


def write(folder: Path, *comparisons: dict[str, Any]) -> list[Path]:
    files = [folder / f"{number}.json" for number in range(len(comparisons))]
    for file, content in zip(files, comparisons, strict=True):
        file.write_text(json.dumps(content))
    return files


def test_rows_are_in_the_order_of_delays(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        comparison("rank=1,seconds=2.0", {"ddp": 20.0, "async-lu": 4.0}),
        comparison("rank=1,seconds=0", {"ddp": 4.0, "async-lu": None}),
    )
    found = delay_rows(read_comparisons(files))
    assert [row["delay_s"] for row in found["rows"]] == [0.0, 2.0]
    assert [row["methods"]["async-lu"]["ratio"] for row in found["rows"]] == [None, 5.0]
    stream = io.StringIO()
    print_delays(found, stream)
    assert "reached by 1 of 3" in stream.getvalue()
    markdown = delay_markdown(found, "asyncprop delays one two")
    assert "| 2 | 20.0 ± 0.5 | 4.0 ± 0.5 | 5.00 |" in markdown
    assert markdown.count("\n- `x`, commit x") == len(found["rows"])
    assert markdown.endswith("\nThis table: `asyncprop delays one two`\n")


def test_files_that_cannot_be_set_side_by_side(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be given"):
        read_comparisons([])
    with pytest.raises(ValueError, match=r"missing.json"):
        read_comparisons([tmp_path / "missing.json"])
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other.json"):
        read_comparisons([tmp_path / "other.json"])
    with pytest.raises(ValueError, match="these differ in epochs"):
        read_comparisons(write(tmp_path, comparison(None, {"a": 1.0}), comparison(None, {"a": 1.0}, epochs=3)))
    one, other = comparison(None, {"a": 1.0}), {**comparison(None, {"a": 1.0}), "target": 0.5}
    with pytest.raises(ValueError, match=r"must have one target \(got 0.9 and 0.5\)"):
        read_comparisons(write(tmp_path, one, other))
    with pytest.raises(ValueError, match=r"must begin with the same method \(got a and b\)"):
        read_comparisons(write(tmp_path, one, comparison(None, {"b": 1.0})))
    older = comparison(None, {"a": 1.0})
    del older["rows"][0]["crosses_target_s_mean"]
    with pytest.raises(ValueError, match=r"must tell when .* \(.*0\.json is older, .* its --out, which keeps finished"):
        read_comparisons(write(tmp_path, older))
    with pytest.raises(ValueError, match=r"one delay each, in seconds \(got rank=1,factor=3\)"):
        delay_rows([comparison("rank=1,factor=3", {"a": 1.0})])


def test_a_method_may_be_missing_at_some_delays(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        comparison(None, {"ddp": 4.0, "layup": 4.0}, methods="ddp,layup"),
        comparison("seconds=2", {"ddp": 20.0, "peer": 10.0, "layup": 5.0}, methods="ddp,peer,layup"),
    )
    found = delay_rows(read_comparisons(files))
    markdown = delay_markdown(found, "asyncprop delays one two")
    assert "| 0 | 4.0 ± 0.5 | 4.0 ± 0.5 | – | 1.00 | – |" in markdown
    assert "| 2 | 20.0 ± 0.5 | 5.0 ± 0.5 | 10.0 ± 0.5 | 4.00 | 2.00 |" in markdown
    plot_delays(found, tmp_path / "curve.svg")
    assert "peer" in (tmp_path / "curve.svg").read_text()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    found = delay_rows([comparison(f"seconds={s}", {"ddp": 1.0 + s, "async-lu": 1.0}) for s in (0, 1)])
    plot_delays(found, tmp_path / "curve.svg")
    assert "async-lu" in (tmp_path / "curve.svg").read_text()
    found = delay_rows([comparison("seconds=0", {"ddp": 1.0, "async-lu": 1.0}),
                        comparison("seconds=2", {"ddp": None, "async-lu": 1.0})])  # fmt: skip
    plot_delays(found, tmp_path / "missed.svg")
    assert "ddp, not by every run at 2 s" in (tmp_path / "missed.svg").read_text()
    assert "async-lu, not" not in (tmp_path / "missed.svg").read_text()
    with pytest.raises(ValueError, match=r"plot must be a .svg"):
        plot_delays(found, tmp_path / "curve.txt")
