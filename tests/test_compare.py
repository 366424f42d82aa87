"""Compare: the plan, what is kept, and the arithmetic of its rows."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asyncprop.config import CompareConfig
from asyncprop.methods.compare import TUNE_SEED, RunFailedError, _make, _plan, compare, parse_variants
from asyncprop.methods.tune import parse_grid, points
from asyncprop.report.rows import comparison
from asyncprop.report.tables import comparison_markdown, print_comparison
from asyncprop.runs import create_run

SMALL = {"task": "digits", "epochs": 2, "train_samples": 320, "test_samples": 100}


def test_methods_take_turns_seed_by_seed(tmp_path: Path) -> None:
    config = CompareConfig(methods="sgd,async-lu, async-bu:momentum=0.5:lr=0.1", seeds=3, **SMALL)
    plan = list(_plan(config, parse_variants(config.methods), tmp_path))
    first = "async-bu:momentum=0.5:lr=0.1"
    assert [(planned.label, planned.config.seed) for planned in plan] == [
        ("sgd", 0), ("async-lu", 0), (first, 0),
        ("async-lu", 1), (first, 1), ("sgd", 1),
        (first, 2), ("sgd", 2), ("async-lu", 2),
    ]  # fmt: skip
    assert {(p.config.momentum, p.config.lr) for p in plan if p.label == first} == {(0.5, 0.1)}
    assert {p.config.epochs for p in plan} == {2}
    assert len({p.folder for p in plan}) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "sgd,adam"}, "method must be one of"),
        ({"methods": "sgd,sgd"}, "must be different"),
        ({"methods": "sgd:lr"}, "NAME:OPTION=VALUE"),
        ({"methods": "sgd:colour=red"}, "colour is no option"),
        ({"target": "high"}, "target must be a number"),
        ({"target": "1.5"}, "target must be a number"),
        ({"task": "mnist"}, "task must be one of"),
        ({"tune": "lr"}, "tune must be like"),
        ({"stop_at_target": True, "target": "worst-best"}, "stop-at-target must have a number as target"),
        ({"stop_at_target": True, "tune": "lr=1,2"}, "stop-at-target must have .* nothing to tune"),
        ({"devices": 2}, "devices and speeds are of virtual time"),
        ({"tune": "colour=1"}, "tune must be like"),
        ({"tune": "seed=1,2"}, "tune must be like"),
        ({"methods": "async-lu,sgd:ranks=2"}, "ranks must be 1 for method sgd"),
        ({"methods": "layup,ddp", "ranks": 2, "delay": "rank=3,seconds=1"}, "delay: rank must be < 2"),
        ({"methods": "async-lu,ddp", "ranks": 2, "delay": "factor=2"}, "factor must slow one named rank"),
        ({"methods": "async-lu,sgd", "delay": "worker=1,seconds=1"}, "delay: worker must be < 1"),
        ({"methods": "sgd,ddp:ranks=2", "costs": "a100-resnet18"}, "devices must be a multiple of ranks"),
        ({"methods": "sgd,layup:wire=bf16", "costs": "a100-resnet18"}, "wire must be left out of a simulation"),
        ({"methods": "async-lu,sgd", "tune": "lanes=1,2"}, "lanes must not be given for method sgd"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(CompareConfig(**{**SMALL, **options}), tmp_path / "out", io.StringIO())
    assert not list(tmp_path.rglob("result.json"))


def test_a_comparison_is_made_once(tmp_path: Path) -> None:
    config = CompareConfig(methods="sgd,async-lu", seeds=1, target="0.01", **SMALL)
    said = io.StringIO()
    made = compare(config, tmp_path / "out", said)
    assert [row["method"] for row in made["rows"]] == ["sgd", "async-lu"]
    assert all(row["reached"] == row["n"] == 1 for row in made["rows"])
    again = compare(config, tmp_path / "out", said)
    assert again["rows"] == made["rows"]
    assert said.getvalue().count("kept,") == 2
    with pytest.raises(ValueError, match="differs in epochs"):
        compare(config.model_copy(update={"epochs": 3}), tmp_path / "out", said)
    (tmp_path / "out" / "sgd_seed-0" / "result.json").unlink()
    third = compare(config, tmp_path / "out", io.StringIO())  # goes on from its checkpoint: nothing is left to train
    assert third["rows"][0]["best_accuracy_mean"] == made["rows"][0]["best_accuracy_mean"]


@pytest.mark.parametrize("has", ["result.json", "checkpoint", "neither"])
def test_a_folder_of_another_run_is_neither_kept_nor_gone_on_with_nor_removed(tmp_path: Path, has: str) -> None:
    config = CompareConfig(methods="sgd", seeds=1, **SMALL)
    planned = next(_plan(config, parse_variants(config.methods), tmp_path))
    create_run(planned.folder, planned.config.model_copy(update={"lr": 0.3})).close()
    if has == "result.json":
        (planned.folder / has).write_text('{"best_metric": 0.5}')
    elif has == "checkpoint":
        (planned.folder / has).mkdir()
    with pytest.raises(ValueError, match=r"must be a run of this comparison \(its config.toml differs\): remove it"):
        _make(planned, Console(file=io.StringIO()), "sgd")
    assert (planned.folder / "config.toml").is_file()


def test_kept_runs_keep_where_they_come_from(tmp_path: Path) -> None:
    options = {**SMALL, "epochs": 1, "seeds": 1, "target": "0.01"}
    made = compare(CompareConfig(methods="sgd", **options), tmp_path / "out", io.StringIO())
    now = made["environment"]["commit"]
    assert [machine["commit"] for machine in made["environments"]] == [now]
    file = tmp_path / "out" / "sgd_seed-0" / "environment.json"
    earlier = {**json.loads(file.read_text()), "commit": "earlier", "started": "2001-01-01T00:00:00+0000"}
    file.write_text(json.dumps(earlier))
    kept = compare(CompareConfig(methods="sgd", **options), tmp_path / "out", io.StringIO())
    assert (kept["environment"]["commit"], kept["environment"]["started"]) == ("earlier", earlier["started"])
    assert kept["environment"]["command"] == made["environment"]["command"]  # that of the comparison, not of a run
    more = compare(CompareConfig(methods="sgd,async-lu", **options), tmp_path / "out", io.StringIO())
    assert more["environment"]["commit"] == f"earlier, {now}"
    assert [machine["commit"] for machine in more["environments"]] == ["earlier", now]
    assert f"commit earlier, {now}, torch" in comparison_markdown(more)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["environments"] == more["environments"]


def test_runs_end_at_the_target_where_that_is_all(tmp_path: Path) -> None:
    options = {**SMALL, "epochs": 4, "methods": "sgd", "seeds": 1, "stop_at_target": True}
    made = compare(CompareConfig(target="0.01", **options), tmp_path / "out", io.StringIO())
    result = json.loads((tmp_path / "out" / "sgd_seed-0" / "result.json").read_text())
    assert (made["rows"][0]["reached"], result["epochs"], result["epochs_to_target"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="differs in target"):
        compare(CompareConfig(target="0.02", **options), tmp_path / "out", io.StringIO())
    missed = compare(CompareConfig(target="1", **{**options, "epochs": 2}), tmp_path / "other", io.StringIO())
    assert (missed["rows"][0]["reached"], missed["epochs"]) == (0, 2)


def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    config = CompareConfig(methods="sgd:lr=1e30", seeds=1, **SMALL)
    with pytest.raises(RunFailedError, match=r"\[1/1\] sgd:lr=1e30 seed 0 failed: .*NonFiniteError"):
        compare(config, tmp_path / "out", io.StringIO())
    assert "Traceback" in (tmp_path / "out" / "sgd_lr-1e30_seed-0.log").read_text()


def test_a_comparison_in_virtual_time(tmp_path: Path) -> None:
    config = CompareConfig(methods="sgd,async-lu", seeds=1, target="0.01", costs="a100-resnet18", devices=2, **SMALL)
    made = compare(config, tmp_path / "out", io.StringIO())
    sgd, lu = made["rows"]
    assert sgd["train_s_mean"] == pytest.approx(
        20 * (0.0049 + 0.0102)
    )  # 2 epochs of 10 batches, by the paper's Table 9
    assert lu["train_s_mean"] < sgd["train_s_mean"]
    said = io.StringIO()
    assert compare(config, tmp_path / "out", said)["rows"] == made["rows"]
    assert said.getvalue().count("kept,") == 2


def test_the_grid_leaves_out_what_is_fixed() -> None:
    grid = parse_grid("lr=0.1, 0.2:momentum=0.5")
    assert list(points(grid, {})) == [{"lr": "0.1", "momentum": "0.5"}, {"lr": "0.2", "momentum": "0.5"}]
    assert list(points(grid, {"lr": "0.3"})) == [{"momentum": "0.5"}]
    assert list(points(grid, {"lr": "0.3", "momentum": "0"})) == []


def test_every_method_is_tuned_by_the_same_grid(tmp_path: Path) -> None:
    config = CompareConfig(methods="sgd,async-lu:lr=0.1", seeds=1, tune="lr=1e-9,0.1,1e30", target="0.01", **SMALL)
    said = io.StringIO()
    made = compare(config, tmp_path / "out", said)
    sgd, fixed = made["rows"]
    assert sgd["options"] == {"lr": "0.1"}
    assert fixed["options"] == {"lr": "0.1"}
    assert list(made["tuning"]) == ["sgd"]
    slow, good, failed = made["tuning"]["sgd"]["grid"]
    assert slow["best_metric"] < good["best_metric"]
    assert failed["best_metric"] is None
    assert "NonFiniteError" in said.getvalue()
    assert json.loads((tmp_path / "out" / "tuning.json").read_text()) == made["tuning"]
    tuned = tmp_path / "out" / "tuning" / "sgd_lr-0.1" / "result.json"
    assert json.loads(tuned.read_text())["seed"] == TUNE_SEED
    again = io.StringIO()
    compare(config, tmp_path / "out", again)
    assert again.getvalue().count("kept,") == 4


def run(*metrics: float, memory: int = 10, seconds: float = 2.0) -> dict[str, Any]:
    history = [{"epoch": n, "test_metric": metric, "train_s": n * seconds} for n, metric in enumerate(metrics, start=1)]
    return {
        "task": "digits", "metric": "accuracy", "epochs": len(metrics), "best_metric": max(metrics),
        "final_metric": metrics[-1], "train_s": len(metrics) * seconds, "samples_per_s": 100.0,
        "mean_staleness": 0.5, "peak_memory_bytes": memory, "history": history,
    }  # fmt: skip


RESULTS = {"a": [run(0.5, 0.9), run(0.7, 0.8, memory=20)], "b": [run(0.6, 0.6), run(0.2, 0.85, seconds=4.0)]}


def test_rows_with_a_target_that_was_given() -> None:
    made = comparison(RESULTS, 0.84)
    a, b = made["rows"]
    assert (made["target"], made["seeds"], made["epochs"]) == (0.84, 2, 2)
    assert a["best_accuracy_mean"] == pytest.approx(0.85)
    assert a["best_accuracy_std"] == pytest.approx(0.05 * 2**0.5)
    assert (a["reached"], a["time_to_target_s_mean"], a["epochs_to_target_mean"]) == (1, 4.0, 2.0)
    assert (b["reached"], b["time_to_target_s_mean"], b["time_to_target_s_std"]) == (1, 8.0, None)
    assert (a["crosses_target_s_mean"], b["crosses_target_s_mean"]) == (
        pytest.approx(2 + 2 * 0.34 / 0.4),
        pytest.approx(4 + 4 * 0.64 / 0.65),
    )
    assert a["peak_memory_bytes"] == 20
    assert b["epochs_to_own_best_mean"] == 1.5


def test_rows_with_the_best_of_the_worst_run_as_target() -> None:
    made = comparison(RESULTS, None)
    assert made["target"] == 0.6
    assert [row["reached"] for row in made["rows"]] == [2, 2]
    a, b = made["rows"]
    assert a["crosses_target_s_mean"] == pytest.approx((2 + 2 * 0.1 / 0.4 + 2) / 2)  # the second began above it
    assert b["crosses_target_s_mean"] == pytest.approx((2 + 4 + 4 * 0.4 / 0.65) / 2)


def test_a_target_that_nobody_reached() -> None:
    made = {**comparison(RESULTS, 0.99), "environment": dict.fromkeys(
        ("command", "commit", "torch", "python", "cores", "processor", "started"), "x")}  # fmt: skip
    assert made["rows"][0]["time_to_target_s_mean"] is None
    stream = io.StringIO()
    print_comparison(made, stream)
    assert stream.getvalue().count("not reached (0 of 2)") == 6
    assert "| a | 0.8500 ± 0.0707 |" in comparison_markdown(made)
    json.dumps(made)


def test_a_comparison_in_virtual_time_is_the_same_each_time(tmp_path: Path) -> None:
    config = CompareConfig(methods="sgd,ddp", seeds=1, costs="a100-resnet50", devices=2, **SMALL)
    rows = [compare(config, tmp_path / name, io.StringIO())["rows"] for name in ("a", "b")]
    assert [row["train_s_mean"] for row in rows[0]] == [row["train_s_mean"] for row in rows[1]]
    assert rows[0][0]["train_s_mean"] == pytest.approx(20 * 0.0465)
    again = compare(config, tmp_path / "a", io.StringIO())["rows"]
    assert again == rows[0]
