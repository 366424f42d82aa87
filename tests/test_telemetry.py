"""Telemetry: the difference of two Statistics, what ranks noted together, and what a run's file says of an epoch."""

import json
from pathlib import Path

import pytest

from asyncprop.config import TrainConfig
from asyncprop.methods import telemetry
from asyncprop.methods.session import Session
from asyncprop.methods.train import train
from asyncprop.progress import Quiet
from asyncprop.runs import create_run
from asyncprop.trace import Statistics, ThreadTime


def noted(
    versions: tuple[int, ...], staleness: tuple[float, ...], *threads: ThreadTime, layers: tuple[str, ...] = ("a", "b")
) -> Statistics:
    return Statistics(0, 0, 0, 0, 2, layers, versions, staleness, 0.0, 0, threads)


def test_only_what_came_in_between_counts() -> None:
    before = noted((10, 4), (1.0, 0.5), ThreadTime("t", 5.0, 1.0))
    after = noted((20, 4), (2.0, 0.5), ThreadTime("t", 8.0, 1.5), ThreadTime("u", 1.0, 2.0))
    row = telemetry.between(before, after, rank=3, peak_memory_bytes=7)
    assert row == {
        "updates": {"a": 10, "b": 0},
        "staleness_by_layer": {"a": 3.0, "b": None},  # (20 · 2.0 - 10 · 1.0) / 10
        "threads": [
            {"rank": 3, "name": "t", "worked_s": 3.0, "waited_s": 0.5},
            {"rank": 3, "name": "u", "worked_s": 1.0, "waited_s": 2.0},
        ],
        "peak_memory_bytes": 7,
    }


def test_layers_that_were_found_anew_count_from_nothing() -> None:
    before = noted((10,), (1.0,), layers=("a",))
    assert telemetry.between(before, noted((2, 3), (1.0, 2.0)), rank=0, peak_memory_bytes=0)["updates"] == {
        "a": 2, "b": 3,
    }  # fmt: skip


def test_ranks_are_weighted_by_their_updates() -> None:
    start = noted((0, 0), (0.0, 0.0))
    ranks = [
        telemetry.between(start, noted((30, 0), (1.0, 0.0), ThreadTime("t", 1.0, 0.0)), rank=0, peak_memory_bytes=5),
        telemetry.between(start, noted((10, 0), (3.0, 0.0), ThreadTime("t", 2.0, 0.0)), rank=1, peak_memory_bytes=6),
    ]
    both = telemetry.merge(ranks)
    assert both["staleness_by_layer"] == {"a": 1.5, "b": None}
    assert (both["updates"], both["peak_memory_bytes"]) == ({"a": 40, "b": 0}, 11)
    assert [(thread["rank"], thread["worked_s"]) for thread in both["threads"]] == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("method", ["sgd", "async-lu"])
def test_a_run_notes_every_epoch(method: str, tmp_path: Path) -> None:
    config = TrainConfig(task="digits", method=method, epochs=2, train_samples=320, test_samples=50)
    with create_run(tmp_path / "run", config) as run:
        train(Session(config), run, Quiet())
    rows = [json.loads(line) for line in (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()]
    for row in rows:
        assert set(row["updates"].values()) == {10}  # batches of 32
        assert all(thread["worked_s"] + thread["waited_s"] > 0 for thread in row["threads"])
        assert row["peak_memory_bytes"] > 2**20
    assert "updates" not in json.loads((tmp_path / "run" / "result.json").read_text())["history"][0]
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert all(step["forward_s"] > 0 and step["backward_s"] > 0 and step["waited_s"] >= 0 for step in steps)
