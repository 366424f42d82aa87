"""Bench: its arithmetic, its contestants and its workloads. Never a time that a test depends on."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncprop import Coupled, Decoupled
from asyncprop.bench import events, exchange, gpu, memory_ranks, partition, plan, trace
from asyncprop.bench.contestants import Async, Contestant, Ddp, Loop
from asyncprop.bench.engine import Entry, Measured, entries, figures, measure
from asyncprop.bench.memory import AllForwardFirst
from asyncprop.bench.nearness import Nearness
from asyncprop.bench.virtual import bench_virtual
from asyncprop.bench.workloads import WORKLOADS, Workload, choose
from asyncprop.devices import available_cores
from asyncprop.report.plans import plans_markdown, print_plans
from asyncprop.report.tables import (
    print_bench,
    print_exchange,
    print_gpu,
    print_memory,
    print_memory_of_ranks,
    print_partition,
    print_trace,
    trace_markdown,
)
from asyncprop.simulate.advice import print_virtual
from asyncprop.simulate.choices import Choice
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.planning import Plan

SMALL = Workload("small", "synthetic-vectors", width=4, batch_size=8)
MEASURED = {
    "limit": [1.0, 2.0, 9.0], "sgd_one_thread": [4.0, 4.0, 4.0], "sgd_all_threads": [2.0, 3.0, 4.0],
    "ddp": [3.0, 3.0, 3.0], "async_lu": [2.0, 2.5, 4.0], "telemetry": [2.0, 2.5, 4.0], "no_telemetry": [2.0, 2.0, 4.0],
    "lockstep": [2.0, 6.0, 4.0], "loop": [2.0, 3.0, 4.0],
}  # fmt: skip


def test_figures_are_medians_and_their_ratios() -> None:
    made = figures(SMALL, Measured(MEASURED, {}))
    assert (made["limit_s"], made["async_lu_s"], made["efficiency"]) == (2.0, 2.5, 0.8)
    assert made["vs_best_sync"] == 3.0 / 2.5
    assert made["lockstep_vs_loop"] == 1.0  # the median of 1, 2 and 1
    assert made["telemetry_cost"] == 1.0
    stream = io.StringIO()
    print_bench({"workloads": [made]}, stream)
    assert "0.800" in stream.getvalue()
    assert made["efficiency_near"] is made["efficiency_far"] is made["handover_ns"] is None


def test_efficiency_is_told_for_near_and_far_cores() -> None:
    near, far = [100.0, 129.0], [131.0]
    made = figures(SMALL, Measured(MEASURED, dict.fromkeys(MEASURED, near + far)))
    assert (made["efficiency_near"], made["efficiency_far"]) == (1.5 / 2.25, 9.0 / 4.0)
    assert made["handover_ns"] == 129.0
    all_near = figures(SMALL, Measured(MEASURED, dict.fromkeys(MEASURED, [100.0] * 3)))
    assert (all_near["efficiency_near"], all_near["efficiency_far"]) == (0.8, None)


def test_cores_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with Nearness() as nearness:
        assert [handover > 0 for _ in range(2) if (handover := nearness.handover_ns())] == [True, True]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with Nearness() as nearness:
        assert nearness.handover_ns() is None


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        (Loop(1), 2),
        (Ddp(), 2),
        (Async(Decoupled(1, 2)), 1),
        (Async(Decoupled(), lockstep=True, threads=1), 1),
        (Async(Decoupled(), gossip={"bucket_bytes": 1000}), 2),
    ],
    ids=["limit", "ddp", "async", "lockstep", "gossip"],
)
def test_every_kind_of_contestant_trains(kind: Any, ranks: int) -> None:
    with Contestant((kind,), SMALL, ranks) as contestant:
        assert contestant.measure(3) > 0
        assert contestant.measure(3) > 0


def test_kinds_that_share_a_process_are_measured_in_turn() -> None:
    pair = (Async(Decoupled()), Async(Decoupled(), telemetry=False))
    with Contestant(pair, SMALL) as contestant:
        assert all(contestant.measure(3, which) > 0 for which in (0, 1, 0, 1))


def test_gossip_s_figures_are_ratios_to_ranks_that_never_meet() -> None:
    measured = {"off": [1.0, 2.0, 4.0], "ddp": [2.0, 2.0, 2.0], "1000": [1.1, 2.2, 4.0]}
    rows = exchange.figures(SMALL, measured)
    assert [row["ratio"] for row in rows] == [1.0, 1.0, pytest.approx(1.1)]
    assert [row["batch_s"] for row in rows] == [2.0, 2.0, 2.2]
    stream = io.StringIO()
    print_exchange({"ranks": 2, "rows": rows}, stream)
    assert "1.100" in stream.getvalue()
    assert {"off", "ddp", str(1 << 20)} <= set(exchange.contestants(2))


def test_a_contestant_that_fails_says_so() -> None:
    with Contestant((Loop(1),), Workload("wrong", "no-such-task")) as contestant:
        with pytest.raises(RuntimeError, match="Loop on wrong: ValueError: task must be one of"):
            contestant.measure(1)


def test_what_is_measured() -> None:
    names = {name for entry in entries(False) for name in entry.kinds}
    assert names == set(MEASURED)
    assert len(entries(True)) > len(entries(False))
    assert choose("mlp, lstm") == [WORKLOADS["mlp"], WORKLOADS["lstm"]]


def test_every_contestant_is_started_anew_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = Contestant.__init__

    def noted(self: Contestant, kinds: Any, *rest: Any) -> None:
        started.append(kinds)
        start(self, kinds, *rest)

    monkeypatch.setattr(Contestant, "__init__", noted)
    pair = Entry({"one": Loop(1), "other": Loop(1)})
    measured = measure(SMALL, [Entry({"limit": Loop(1)}), pair], 2, 2, 1e-3)
    assert len(started) == 4
    assert {name: len(seconds) for name, seconds in measured.seconds.items()} == {"limit": 4, "one": 8, "other": 8}
    assert {name: len(ns) for name, ns in measured.handover_ns.items()} == {"limit": 4, "one": 8, "other": 8}


def test_bursts_are_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lanes whose batches end three at a time, each three a second later: every batch takes a third of it."""

    class Abreast:
        ended = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> "Abreast":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def statistics(self) -> Any:
            return SimpleNamespace(lanes=3)

        def run(self, _: Any) -> Iterator[None]:
            while True:
                Abreast.ended += 1
                yield None

    monkeypatch.setattr("asyncprop.Engine", Abreast)
    monkeypatch.setattr("asyncprop.bench.contestants.time.perf_counter", lambda: float(Abreast.ended // 3))
    serve = Async(None).serve(SMALL, 0, 1, Path())
    next(serve)
    assert [serve.send(count) for count in (3, 4, 13)] == pytest.approx([1, 4 / 3, 13 / 3])


def test_the_worst_case_of_memory_is_forced() -> None:
    turn = AllForwardFirst(lanes=2, last_layer=3)
    with turn.at(0, "read", 3), turn.at(1, "read", 3), turn.at(0, "write", 3):
        pass  # passes: both have come to the last layer


def test_the_gpu_benchmark_runs_the_same_code_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 2, "BATCHES": 2, "WARM_BATCHES": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    moved: list[int] = []
    move = gpu._batches_on

    def noted(*args: Any) -> Any:
        batches = move(*args)
        moved.append(len(batches))
        return batches

    monkeypatch.setattr(gpu, "_batches_on", noted)
    made = gpu.bench_gpu(io.StringIO(), torch.device("cpu"), (SMALL,))
    assert moved == [SMALL.distinct]  # once, for all rounds and methods
    assert [row["method"] for row in made["rows"]] == ["sgd", "async-lu 1F2B", "async-lu 2F2B", "async-bu 2F2B"]
    assert all(row["seconds_per_batch"] > 0 for row in made["rows"])
    stream = io.StringIO()
    print_gpu(made, stream)
    assert "async-lu 1F2B" in stream.getvalue()


def test_engines_on_a_gpu_are_timed_in_their_steady_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making an engine takes a minute, and its end, too; three lanes finish three batches at a time, once a second."""

    class Slow:
        passed_s = ended = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            Slow.passed_s += 60

        def __enter__(self) -> "Slow":
            return self

        def __exit__(self, *_: object) -> None:
            Slow.passed_s += 60

        def statistics(self) -> Any:
            return SimpleNamespace(lanes=3)

        def run(self, _: Any) -> Iterator[None]:
            while True:
                Slow.ended += 1
                Slow.passed_s += Slow.ended % 3 == 0
                yield None

    monkeypatch.setattr(gpu, "Engine", Slow)
    monkeypatch.setattr(gpu, "BATCHES", 4)
    monkeypatch.setattr("asyncprop.bench.gpu.time.perf_counter", lambda: float(Slow.passed_s))
    measure, device = gpu._async(Decoupled(1, 2), "layer"), torch.device("cpu")
    measured = measure(SMALL.make(), SMALL.batches(), device)
    assert measured.batch_s == pytest.approx(1 / 3)
    assert Slow.passed_s < 3 * 60  # one engine was made


def test_partial_backward_passes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "ROUNDS", 1)
    monkeypatch.setattr(partition, "choose", lambda names: [SMALL])
    made = partition.bench_partition(None, io.StringIO())
    assert [len(row["blocks"]) for row in made["rows"]] == [2, 4]
    assert all(len(row["block_s"]) == len(row["blocks"]) and row["backward_s"] > 0 for row in made["rows"])
    stream = io.StringIO()
    print_partition(made, stream)
    assert stream.getvalue().count("small") == 2


def test_memory_figures_are_printed() -> None:
    keys = ("beyond_sgd_bytes", "expected_bytes", "activations_bytes", "gradients_bytes")
    row = {"name": "x", "lanes": 2, "ratio": 1.0, "ratio_with_workspaces": 0.98, **dict.fromkeys(keys, 2**20)}
    stream = io.StringIO()
    print_memory({"rows": [row]}, stream)
    assert "0.980" in stream.getvalue()


def test_memory_of_ranks_is_measured_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ranks, "NAMES", (SMALL,))
    made = memory_ranks.bench_memory_of_ranks(2, io.StringIO())
    assert all(len(row["rank_peak_bytes"]) == 2 and row["parameters_bytes"] > 0 for row in made["rows"])
    stream = io.StringIO()
    print_memory_of_ranks(made, stream)
    assert "small" in stream.getvalue()


def test_predictions_stand_beside_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "small", SMALL)
    made = bench_virtual("small", rounds=1, batches=4, messages=io.StringIO())["rows"]
    choices = [(row["forward"], row["backward"], row["lanes"]) for row in made]
    assert choices == [(2, 2, 2), (1, 2, 2), (1, 1, 2), (1, 2, 3)]
    for row in made:
        assert row["ratio"] == row["predicted_s"] / row["measured_s"] > 0
    stream = io.StringIO()
    print_virtual({"rows": made}, stream)
    assert "small" in stream.getvalue()


def test_every_choice_of_a_plan_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "SHAPES", {"small": SMALL, "other": SMALL})
    made = plan.bench_plan("small", plans=2, rounds=3, seconds=1e-3, passes=4, messages=io.StringIO())
    (row,) = made["rows"]
    labels = [choice["choice"] for choice in row["choices"]]
    assert len(set(labels)) == len(labels)
    assert {"SGD, 1 intra-op thread", row["best"], *(one["choice"] for one in row["advice"])} <= set(labels)
    assert (f"torch DDP, {available_cores()} processes" in labels) == (available_cores() > 1)
    assert all([len(rounds) for rounds in choice["rounds_s"]] == [3, 3] for choice in row["choices"])
    assert row["best_s"] == min(choice["measured_s"] for choice in row["choices"])
    assert all(choice["planned_s"] > 0 for choice in row["choices"])
    assert {choice["tried"] for choice in row["choices"]} <= {0, 1, 2}
    assert sum(choice["tried"] for choice in row["choices"]) >= 2
    earlier = tmp_path / "plan.json"
    earlier.write_text(json.dumps({"rows": [{"name": "other"}, {"name": "small"}]}))
    assert plan.merge(made, earlier)["rows"] == [row, {"name": "other"}]
    assert plan.merge(made, None) is made
    stream = io.StringIO()
    print_plans(made, stream)
    assert row["best"] in stream.getvalue()
    assert f"| small | {row['advice'][0]['choice']}" in plans_markdown(made)


def test_the_ratio_of_advice_is_a_median_of_all_rounds_and_plans() -> None:
    workers = Choice(Coupled(2, 1), 1.0, 0.5, "", 0)
    loop = Choice(None, None, 0.0, "", 0, measured_s=2.0)
    faster = replace(loop, measured_s=0.5)
    costs = LayerCosts((), (), (), ())
    plans = [
        Plan((), costs, costs, 0, 0, (workers, loop), loop),
        Plan((), costs, costs, 0, 0, (faster, workers), faster),  # in another order
        Plan((), costs, costs, 0, 0, (workers, loop), workers),
    ]
    made = plan.figures("small", plans, [[[1.0, 2.0], [2.0, 3.0]], [[9.0], [9.0]], [[2.0], [2.0]]])
    assert (made["best"], made["best_s"], made["advised_s"]) == ("2 coupled workers", 2.0, 2.5)
    assert [one["ratio"] for one in made["advice"]] == [1.25, 1.25, 1.0]  # the median of 2, 1.5, 1 and 1
    assert (made["ratio"], made["worst_ratio"]) == (1.25, 1.25)
    assert made["planned_s"] == 1.0
    assert [(choice["planned_s"], choice["tried"]) for choice in made["choices"]] == [(1.0, 0), (2.0, 3)]
    assert made["choices"][1]["rounds_s"] == [[2.0, 3.0], [9.0], [2.0]]
    stream = io.StringIO()
    print_plans({"rows": [made]}, stream)
    assert "planned: what the plan says: tried where it was tried, else predicted" in stream.getvalue()
    text = plans_markdown({"rows": [{**made, "environment": dict.fromkeys(
        ("command", "commit", "torch", "python", "cores", "processor", "started"), "x")}]})  # fmt: skip
    assert "| choice | planned (ms) | measured (ms) | planned / measured | staleness |" in text
    assert "| 2 coupled workers | 1000.00 | 2000.00 | 0.500 | 0.50 |" in text
    advised = "SGD, 1 intra-op thread (2 of 3); 2 coupled workers (1 of 3)"
    assert f"| small | {advised} | 2500.00 | 1000.00 | 2 coupled workers | 2000.00 | 1.250 | 1.250 |" in text


def test_tracing_is_measured_against_free_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "small", SMALL)
    made = trace.bench_trace("small", rounds=2, seconds=1e-3, messages=io.StringIO())
    (row,) = made["rows"]
    assert (row["free_ratio"], row["free_error"]) == (1.0, 0.0)
    assert min(row["traced_ratio"], row["ordered_ratio"]) > 0
    stream = io.StringIO()
    print_trace(made, stream)
    assert "small" in stream.getvalue()
    assert trace_markdown(made).startswith("# Cost of tracing and ordering: medians of 2 rounds' ratios")


def test_costs_of_tracing_are_medians_with_their_errors() -> None:
    row = trace.figures(SMALL, {"free": [1.0, 2.0, 4.0], "traced": [1.1, 2.0, 4.8]})
    assert row["traced_ratio"] == pytest.approx(1.1)
    assert row["traced_error"] == pytest.approx(1.25 * 0.1 / 3**0.5)


def test_what_a_simulation_costs_is_told_by_layer_events() -> None:
    made = events.bench_events(io.StringIO(), rounds=2, layers=(2, 4), workers=(1, 3))
    rows = {(row["layers"], row["workers"]): row for row in made["rows"]}
    assert rows.keys() == {(2, 1), (2, 3), (4, 1), (4, 3)}
    assert rows[4, 3]["layer_events"] == 4 * 3 * 4 * 3  # passes, workers, layers, moments
    assert rows[4, 3]["events"] - rows[2, 3]["events"] == pytest.approx(
        3 * (rows[4, 1]["events"] - rows[2, 1]["events"]), rel=0.1
    )  # what a layer adds does not depend on how many workers there are
    assert len(rows[2, 1]["rounds_s"]) == 2
    assert "µs per layer event" in events.events_markdown(made)
