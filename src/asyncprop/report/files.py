"""RunFiles: what a run folder says, read from its files alone; and which runs and comparisons some paths hold."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Row = dict[str, Any]

POINTS = 60
"""At most so many points are kept of a run's steps: more cannot be seen."""


@dataclass(frozen=True)
class RunFiles:
    """One run: its folder, finished or not.

    Attributes:
        path: of the folder.
        label: the row that it belongs to: its method, with what options of its own it has.
        config, environment: what was run, and on what.
        epochs: the rows of `epochs.jsonl`.
        result: the content of `result.json`; None if the run is not finished.
    """

    path: Path
    label: str
    config: Row
    environment: Row
    epochs: list[Row]
    result: Row | None

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return int(self.config.get("seed", 0))

    @cached_property
    def steps(self) -> list[Row]:
        """Means of `steps.jsonl` over stretches of steps of equal length, at most POINTS of them."""
        return list(_binned(self.path / "steps.jsonl"))

    @property
    def all_steps(self) -> list[Row]:
        """Every row of `steps.jsonl`."""
        return _lines(self.path / "steps.jsonl")

    @property
    def has_trace(self) -> bool:
        """Whether the run has a timeline."""
        return (self.path / "trace.jsonl").is_file()


@dataclass(frozen=True)
class Comparison:
    """Several methods side by side: the content of its JSON file, and its runs, where they are there."""

    path: Path
    content: Row
    runs: list[RunFiles] = field(default_factory=list)


def read_run(path: Path, label: str | None = None) -> RunFiles:
    """Read a run folder.

    Raises:
        ValueError: if it is none, or one of its files is damaged.
    """
    if not (path / "config.toml").is_file():
        raise ValueError(f"runs must be folders of runs or comparisons, or files of comparisons (got {path})")
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
        epochs = _lines(path / "epochs.jsonl")
        result = path / "result.json"
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a run whose files are whole ({error})") from None
    return RunFiles(path, label or str(config.get("method", "?")), config, environment, epochs, found)


def read_paths(paths: Sequence[Path]) -> tuple[list[Comparison], list[RunFiles]]:
    """Read comparisons (their folders or JSON files) and the runs that belong to none.

    Raises:
        ValueError: if there is nothing to read, or a path is neither.
    """
    if not paths:
        raise ValueError("runs must be given: folders of runs or comparisons, or files of asyncprop compare --json")
    comparisons: list[Comparison] = []
    runs: list[RunFiles] = []
    for path in paths:
        if path.is_file():
            comparisons.append(Comparison(path, _comparison(path)))
        elif (path / "comparison.json").is_file():
            content = _comparison(path / "comparison.json")
            members = [read_run(path / name, label) for label, names in content["runs"].items() for name in names]
            comparisons.append(Comparison(path, content, members))
        elif (path / "compare.toml").is_file():  # a comparison that is not finished
            runs += [read_run(folder.parent) for folder in sorted(path.glob("*/config.toml"))]
        else:
            runs.append(read_run(path))
    return comparisons, tell_apart(runs)


def tell_apart(runs: list[RunFiles]) -> list[RunFiles]:
    """Return the runs with labels that say what they differ in, beyond their seed and their method."""
    keys = {key for run in runs for key in run.config} - {"seed", "method"}
    differing = sorted(key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1)
    named = []
    for run in runs:
        options = [f"{key.replace('_', '-')}={run.config[key]}" for key in differing if key in run.config]
        label = ":".join([str(run.config.get("method", "?")), *options])
        named.append(RunFiles(run.path, label, run.config, run.environment, run.epochs, run.result))
    return named


def _comparison(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["rows"][0]["best_accuracy_mean"], content["environment"], content["target"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path} must be a file that asyncprop compare --json has written") from None
    return dict(content)


def _lines(path: Path) -> list[Row]:
    """Return the whole lines of a file; of a run under way the last may be cut."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _binned(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        count = sum(1 for _ in file)
    length = max(1, -(-count // POINTS))
    stretch: list[Row] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                stretch.append(json.loads(line))
            if len(stretch) == length:
                yield _mean(stretch)
                stretch = []
    if stretch:
        yield _mean(stretch)


def _mean(rows: list[Row]) -> Row:
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {key: sum(float(row.get(key, 0.0)) for row in rows) / len(rows) for key in numbers}
