"""Fleets in virtual time: runs are kept, the best of the grid is told, and a straggler is beside it."""

import io
import json
from typing import Any

import pytest

from asyncprop.bench import fleet_tables, fleets
from asyncprop.bench.fleet_tables import fleets_markdown, plot_fleets, print_fleets
from asyncprop.bench.fleets import Point, bench_fleets, best_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "GRID", ((0.1, 0.9), (0.1, 0.0)))
    monkeypatch.setattr(fleets, "TASK", {**fleets.TASK, "train_samples": 64, "test_samples": 50, "epochs": 2})
    monkeypatch.setattr(fleets, "LEAST_STEPS", 1)


def test_runs_are_kept_and_each_method_has_its_best(small: None, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, told = tmp_path / "fleets.json", io.StringIO()
    found = bench_fleets("2", "ddp,layup", file, told)
    seeds = fleets.SEEDS
    assert len(found["runs"]) == 2 * (2 + (seeds - 1) + seeds)  # of the best point, the first seed is there
    assert json.loads(file.read_text()) == found
    monkeypatch.setattr(fleets, "_run", pytest.fail)  # all are there
    assert bench_fleets("2", "ddp,layup", file, told)["runs"] == found["runs"]
    best = best_of(found["runs"], "layup", 2)
    assert best
    for straggler in (False, True):
        ours = [run for run in found["runs"] if run["method"] == "layup" and run["straggler"] is straggler]
        same = [run for run in ours if (run["lr"], run["momentum"]) == (best["lr"], best["momentum"])]
        assert [run["seed"] for run in same] == list(range(seeds))
    print_fleets(found, told)
    assert "µs per event" in told.getvalue()
    assert "Virtual seconds to 0.85" in fleets_markdown(found)
    plot_fleets(found, tmp_path / "fleets.svg")
    assert "virtual devices" in (tmp_path / "fleets.svg").read_text()
    with pytest.raises(ValueError, match="plot must be a"):
        plot_fleets(found, tmp_path / "fleets.txt")


KEPT = {"task": fleets.TASK, "least_steps": fleets.LEAST_STEPS, "straggler_s": fleets.STRAGGLER_S, "runs": []}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {**KEPT, "task": {**fleets.TASK, "epochs": 3}},
            r"json must keep runs of the same fleets .* differs in task\)",
        ),
        ({**KEPT, "straggler_s": 1.0}, r"differs in straggler_s\)"),
        ({"task": fleets.TASK, "straggler_s": fleets.STRAGGLER_S, "runs": []}, r"differs in least_steps\)"),
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
        {"method": method, "devices": count, "straggler": straggler, "best_metric": 0.5, "diverged": False, "seed": 0,
         "lr": 0.1, "momentum": 0.0, "time_to_target_s": None if (method, count) == ("ddp", 8) else 1.0 + straggler}
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
        return {
            "time_to_target_s": seconds[point.lr], "best_metric": 0.0, "computing_s": 0.0, "diverged": False,
        }  # fmt: skip

    monkeypatch.setattr(fleets, "_run", run)
    found = bench_fleets("2", "ddp", None, io.StringIO())
    assert [(made["lr"], made["straggler"], made["seed"]) for made in found["runs"]] == [
        (0.4, False, 0), (0.2, False, 0), (0.1, False, 0), (0.2, False, 1), (0.2, False, 2),
        (0.2, True, 0), (0.2, True, 1), (0.2, True, 2),
    ]  # fmt: skip


def test_cells_are_means_over_seeds_or_say_how_many_got_there() -> None:
    reached = {"time_to_target_s": 2.0, "best_metric": 0.9, "diverged": False}
    slower, missed = {**reached, "time_to_target_s": 4.0}, {**reached, "time_to_target_s": None, "best_metric": 0.5}
    assert fleet_tables._time([reached, slower]) == "3.00 ± 1.41"
    assert fleet_tables._time([reached]) == "2.00"
    assert fleet_tables._time([reached, missed]) == "not reached (0.500) in 1 of 2"
    assert fleet_tables._time([{**missed, "diverged": True}] * 2) == "diverged"
    assert fleet_tables._time([]) == "–"


def test_what_diverged_is_the_best_only_where_all_did() -> None:
    point = {"method": "ddp", "devices": 2, "straggler": False, "seed": 0, "time_to_target_s": None}
    lucky = {**point, "lr": 0.1, "best_metric": 0.6, "diverged": True}
    steady, reached = {**point, "lr": 0.05, "best_metric": 0.5, "diverged": False}, {**point, "time_to_target_s": 1.0}
    assert best_of([lucky, steady], "ddp", 2) is steady
    assert best_of([lucky, {**lucky, "best_metric": 0.7}], "ddp", 2) == {**lucky, "best_metric": 0.7}
    reached |= {"lr": 0.02, "best_metric": 0.4, "diverged": False}
    assert best_of([lucky, steady, reached], "ddp", 2) is reached


@pytest.mark.parametrize(("devices", "epochs"), [(3, 25), (100, 25), (128, 32), (256, 64)])
def test_each_of_many_devices_makes_enough_steps(devices: int, epochs: int) -> None:
    config = Point("ddp", devices, False, 0.1, 0.0, 0).config()
    assert config.epochs == epochs
    assert epochs * 256 // devices >= 64


def test_a_row_may_have_options() -> None:
    point = Point("async-lu:compensation=attenuation", 8, False, 0.1, 0.0, 2)
    assert (point.config().method, point.config().compensation, point.config().seed) == ("async-lu", "attenuation", 2)


def test_a_straggler_is_a_rank_or_where_there_is_one_replica_a_worker() -> None:
    point: dict[str, Any] = {"devices": 3, "straggler": True, "lr": 0.1, "momentum": 0.0, "seed": 0}
    delays = [Point(method=method, **point).config().delay for method in ("layup", "async-lu")]
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
        ("2", "best", "method must be one of"),
        ("2", "layup:topology", "an option must be NAME:OPTION=VALUE"),
        ("2", "layup:topology=star", "topology"),
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
