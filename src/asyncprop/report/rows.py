"""Rows: the results of runs, one row per method. Means and sample deviations over seeds."""

from __future__ import annotations

import statistics
from typing import Any

Result = dict[str, Any]


def comparison(results: dict[str, list[Result]], target: float | None) -> dict[str, Any]:
    """Set methods side by side.

    Args:
        results: for each row's label, what `result.json` holds of its runs, one per seed.
        target: test metric to reach; None for the best that the worst run of the worst method reached, which every
            run has (as the paper's Tables 1 and 3 have it).

    Returns:
        `task`, `metric`, `epochs`, `seeds`, `target`, and `rows`, in the order given.
    """
    runs = [run for group in results.values() for run in group]
    reach = target if target is not None else min(run["best_metric"] for run in runs)
    first = runs[0]
    return {
        "task": first["task"],
        "metric": first["metric"],
        "epochs": max(run["epochs"] for run in runs),
        "seeds": max(len(group) for group in results.values()),
        "target": reach,
        "target_is": "given" if target is not None else "worst-best",
        "rows": [_row(label, group, reach) for label, group in results.items()],
    }


def _row(label: str, runs: list[Result], target: float) -> dict[str, Any]:
    """Return one method's row. Times to the target are means over the `reached` runs; None if none reached it.

    `time_to_target_s` ends with the first epoch whose evaluation reaches the target, as in the paper;
    `crosses_target_s` is when the line through the evaluations does, which does not come in steps of an epoch.
    """
    hits = [(run, hit) for run in runs if (hit := _first_hit(run, target))]
    own_best = [_first_hit(run, run["best_metric"]) for run in runs]
    return {
        "method": label,
        "n": len(runs),
        **_spread("best_accuracy", [run["best_metric"] for run in runs]),
        **_spread("final_accuracy", [run["final_metric"] for run in runs]),
        "reached": len(hits),
        **_spread("time_to_target_s", [hit["train_s"] for _, hit in hits]),
        **_spread("crosses_target_s", [_crossing_s(run, hit, target) for run, hit in hits]),
        **_spread("epochs_to_target", [hit["epoch"] for _, hit in hits]),
        **_spread("time_to_own_best_s", [hit["train_s"] for hit in own_best if hit]),
        **_spread("epochs_to_own_best", [hit["epoch"] for hit in own_best if hit]),
        **_spread("train_s", [run["train_s"] for run in runs]),
        **_spread("samples_per_s", [run["samples_per_s"] for run in runs]),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        **_spread("staleness", [run["mean_staleness"] for run in runs]),
    }


def _first_hit(run: Result, target: float) -> dict[str, Any] | None:
    """Return the first epoch of a run whose test metric reaches `target`."""
    return next((epoch for epoch in run["history"] if epoch["test_metric"] >= target), None)


def _crossing_s(run: Result, hit: dict[str, Any], target: float) -> float:
    """Return when the line from the evaluation before the first hit crosses the target; the hit's own time at first."""
    if hit["epoch"] == 1:
        return float(hit["train_s"])
    before = run["history"][hit["epoch"] - 2]
    share = (target - before["test_metric"]) / (hit["test_metric"] - before["test_metric"])
    return float(before["train_s"] + share * (hit["train_s"] - before["train_s"]))


def _spread(name: str, values: list[float]) -> dict[str, float | None]:
    """Return mean and sample standard deviation (n - 1); None where there are too few values."""
    return {
        f"{name}_mean": statistics.fmean(values) if values else None,
        f"{name}_std": statistics.stdev(values) if len(values) > 1 else None,
    }
