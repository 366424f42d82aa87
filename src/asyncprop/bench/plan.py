"""Bench plan: what a plan advises, beside the best of all choices that it considers, each of them measured."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from asyncprop.bench.contestants import Async, Contestant, Kind, Loop
from asyncprop.bench.workloads import SHAPES, Workload, choose
from asyncprop.devices import keep_freed_memory
from asyncprop.runs import environment, write_json
from asyncprop.simulate.choices import Choice
from asyncprop.simulate.planning import Plan, plan
from asyncprop.tasks import get_task

BURST = 6
"""Batches of one measurement are a multiple of it, and so of 1, 2 and 3 lanes: batches end in bursts of as many."""


def bench_plan(
    names: str | None, rounds: int, seconds: float, passes: int, messages: TextIO, file: Path | None = None
) -> dict[str, Any]:
    """Plan for each workload, and measure all that the plan considers: in one process, in turn, round after round.

    Args:
        names: of the workloads (SHAPES), separated by commas.
        rounds: of measuring each choice; medians count.
        seconds: length of one measurement.
        passes: of the plan.
        messages: where progress is told.
        file: to write the figures to after each workload; what it has of others is kept.
    """
    made: dict[str, Any] = {"rows": []}
    for workload in choose(names, SHAPES):
        print(f"{workload.name} ...", file=messages, flush=True)
        found = _in_a_process(workload, passes)
        row = figures(workload, found, _measure(workload, found.choices, rounds, seconds))
        made = merge({"rows": [*made["rows"], {**row, "environment": environment()}]}, file)
        if file:
            write_json(file, made)
    return made


def figures(workload: Workload, found: Plan, measured: list[list[float]]) -> dict[str, Any]:
    """Return a workload's figures: of each choice what was planned and measured, and the advised against the best.

    What was planned is the time of a choice's trial where it was `tried`, and predicted where not.

    Args:
        workload: of which.
        found: the plan.
        measured: seconds per batch of each of its choices, in their order, one per round.
    """
    choices: list[dict[str, Any]] = [
        {
            "choice": choice.label,
            "planned_s": choice.seconds_per_batch,
            "tried": choice.measured,
            "measured_s": median(rounds),
            "staleness": choice.staleness,
            "rounds_s": rounds,
        }
        for choice, rounds in zip(found.choices, measured, strict=True)
    ]
    advised = choices[found.choices.index(found.advice)]
    best = min(choices, key=lambda choice: choice["measured_s"])
    ratio = median(ours / theirs for ours, theirs in zip(advised["rounds_s"], best["rounds_s"], strict=True))
    return {
        "name": workload.name,
        "advised": advised["choice"],
        "advised_s": advised["measured_s"],
        "planned_s": advised["planned_s"],
        "best": best["choice"],
        "best_s": best["measured_s"],
        "ratio": ratio,
        "choices": choices,
    }


def merge(figures: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Return the figures with the rows of other workloads that a file has from an earlier call, in their order."""
    if file is None or not file.exists():
        return figures
    rows = {row["name"]: row for row in (*json.loads(file.read_text(encoding="utf-8"))["rows"], *figures["rows"])}
    return {"rows": [rows[name] for name in SHAPES if name in rows]}


def _in_a_process(workload: Workload, passes: int) -> Plan:
    """Plan in a process of its own, since how memory is kept is a setting of a whole process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_plan, workload, passes).result()


def _plan(workload: Workload, passes: int) -> Plan:
    keep_freed_memory(large_tensors=get_task(workload.task).large_tensors)
    trained = workload.make()
    batches = list(islice(workload.batches(), workload.distinct))
    return plan(trained.model, trained.loss, batches, trained.optimizer, passes=passes)


def _measure(workload: Workload, choices: tuple[Choice, ...], rounds: int, seconds: float) -> list[list[float]]:
    measured: list[list[float]] = [[] for _ in choices]
    places = list(range(len(choices)))
    with Contestant([_kind(choice) for choice in choices], workload) as contestant:
        fastest = min(contestant.measure(BURST, place) for place in places)  # to warm up, too
        count = BURST * max(1, round(seconds / fastest / BURST))
        for number in range(rounds):
            for place in places[number % len(places) :] + places[: number % len(places)]:
                measured[place].append(contestant.measure(count, place))
    return measured


def _kind(choice: Choice) -> Kind:
    return Async(choice.workers) if choice.workers else Loop(choice.intraop_threads)
