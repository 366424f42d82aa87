"""Fleets in virtual time: runs are kept, the best of the grid is told, and a straggler is beside it."""

import io
import json
from typing import Any

import pytest

from asyncprop.bench import fleets
from asyncprop.bench.fleet_tables import fleets_markdown, plot_fleets, print_fleets
from asyncprop.bench.fleets import Point, bench_fleets, best_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "GRID", ((0.1, 0.9), (0.1, 0.0)))
    monkeypatch.setattr(fleets, "TASK", {**fleets.TASK, "train_samples": 64, "test_samples": 50, "epochs": 2})


def test_runs_are_kept_and_each_method_has_its_best(small: None, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, told = tmp_path / "fleets.json", io.StringIO()
    found = bench_fleets("2", "ddp,layup", file, told)
    assert len(found["runs"]) == 2 * (2 + 1)
    assert json.loads(file.read_text()) == found
    monkeypatch.setattr(fleets, "_run", pytest.fail)  # all are there
    assert bench_fleets("2", "ddp,layup", file, told)["runs"] == found["runs"]
    best = best_of(found["runs"], "layup", 2)
    assert best
    slowed = next(run for run in found["runs"] if run["method"] == "layup" and run["straggler"])
    assert (slowed["lr"], slowed["momentum"]) == (best["lr"], best["momentum"])
    print_fleets(found, told)
    assert "µs per event" in told.getvalue()
    assert "Virtual seconds to 0.85" in fleets_markdown(found)
    plot_fleets(found, tmp_path / "fleets.svg")
    assert "virtual devices" in (tmp_path / "fleets.svg").read_text()
    with pytest.raises(ValueError, match="plot must be a"):
        plot_fleets(found, tmp_path / "fleets.txt")


KEPT = {"task": fleets.TASK, "straggler_s": fleets.STRAGGLER_S, "runs": []}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {**KEPT, "task": {**fleets.TASK, "epochs": 3}},
            r"json must keep runs of the same fleets .* differs in task\)",
        ),
        ({**KEPT, "straggler_s": 1.0}, r"differs in straggler_s\)"),
        ({"rows": []}, "json must be a new file, or one that bench fleets has written"),
        ([], "json must be a new file, or one that bench fleets has written"),
    ],
)
def test_runs_of_another_task_or_straggler_are_not_mixed_in(kept: Any, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fleets, "_run", pytest.fail)
    file = tmp_path / "fleets.json"
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=message):
        bench_fleets("2", "ddp", file, io.StringIO())
    assert json.loads(file.read_text()) == kept


def test_the_picture_says_what_was_not_reached(tmp_path) -> None:
    runs = [
        {"method": method, "devices": count, "straggler": straggler, "best_metric": 0.5,
         "time_to_target_s": None if (method, count) == ("ddp", 8) else 1.0 + straggler}
        for method in ("ddp", "layup") for count in (3, 8) for straggler in (False, True)
    ]  # fmt: skip
    plot_fleets({"runs": runs, "task": {"target": 0.85}}, tmp_path / "fleets.svg")
    drawn = (tmp_path / "fleets.svg").read_text()
    assert ">ddp, not reached with 8<" in drawn
    assert ">ddp, a straggler, not reached with 8<" in drawn
    assert "layup, not" not in drawn
    assert ">layup, a straggler<" in drawn


def test_a_sweep_ends_where_smaller_steps_are_slower(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "GRID", ((0.4, 0.0), (0.2, 0.0), (0.1, 0.0), (0.05, 0.0)))
    seconds = {0.4: None, 0.2: 3.0, 0.1: 4.0, 0.05: 1.0}

    def run(point: Point) -> dict[str, Any]:
        return {"time_to_target_s": seconds[point.lr], "best_metric": 0.0, "computing_s": 0.0}

    monkeypatch.setattr(fleets, "_run", run)
    found = bench_fleets("2", "ddp", None, io.StringIO())
    assert [(made["lr"], made["straggler"]) for made in found["runs"]] == [
        (0.4, False), (0.2, False), (0.1, False), (0.2, True),
    ]  # fmt: skip


def test_a_straggler_is_a_rank_or_where_there_is_one_replica_a_worker() -> None:
    point: dict[str, Any] = {"devices": 3, "straggler": True, "lr": 0.1, "momentum": 0.0, "seed": 0}
    delays = [Point(method=method, **point).config.delay for method in ("layup", "async-lu")]
    assert delays == ["rank=0,seconds=0.151", "worker=0,seconds=0.151"]


def test_a_run_that_diverges_is_told(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "GRID", ((1e9, 0.9),))
    found = bench_fleets("2", "ddp", None, io.StringIO())
    assert all(run["diverged"] and run["time_to_target_s"] is None for run in found["runs"])
    assert "diverged" in fleets_markdown(found)


@pytest.mark.parametrize(
    ("devices", "methods", "message"),
    [
        ("two", None, "devices must be numbers >= 1"),
        ("0", None, "devices must be"),
        ("2", "best", "methods must be some of"),
        ("3,300", None, "devices must be at most the batches of an epoch, 256, for method ddp, .* .got 300."),
        ("257", "layup,post-local-sgd", "256, for method post-local-sgd"),
    ],
)
def test_what_is_wrong_is_told(
    devices: str, methods: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleets, "_run", pytest.fail)  # before any run
    with pytest.raises(ValueError, match=message):
        bench_fleets(devices, methods, None, io.StringIO())
