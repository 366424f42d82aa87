"""Bench plan: what a plan advises, beside the best of all choices that it considers, each of them measured."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from asyncprop.bench.contestants import Async, Contestant, Ddp, Kind, Loop
from asyncprop.bench.workloads import SHAPES, Workload, choose
from asyncprop.devices import keep_freed_memory
from asyncprop.runs import environment, write_json
from asyncprop.simulate.choices import Choice
from asyncprop.simulate.ddp import Made
from asyncprop.simulate.planning import Plan, plan
from asyncprop.tasks import get_task

BURST = 6
"""Batches of one measurement are a multiple of it, and so of 1, 2 and 3 lanes: batches end in bursts of as many."""


def bench_plan(
    names: str | None,
    plans: int,
    rounds: int,
    seconds: float,
    passes: int,
    messages: TextIO,
    file: Path | None = None,
) -> dict[str, Any]:
    """Plan for each workload several times, and after each plan measure all that it considers, round after round.

    Each plan, and each measuring, has a process of its own: luck that lasts as long as a process does not count twice.

    Args:
        names: of the workloads (SHAPES), separated by commas.
        plans: how often each workload is planned for.
        rounds: of measuring each choice after each plan, in turn; medians over all of them count.
        seconds: length of one measurement.
        passes: of a plan.
        messages: where progress is told.
        file: to write the figures to after each workload; what it has of others is kept.
    """
    made: dict[str, Any] = {"rows": []}
    for workload in choose(names, SHAPES):
        found, measured = [], []
        for number in range(plans):
            print(f"{workload.name}, plan {number + 1} of {plans} ...", file=messages, flush=True)
            found.append(_in_a_process(workload, passes))
            measured.append(_measure(workload, found[-1].choices, rounds, seconds))
        row = figures(workload.name, found, measured)
        made = merge({"rows": [*made["rows"], {**row, "environment": environment()}]}, file)
        if file:
            write_json(file, made)
    return made


def figures(name: str, plans: Sequence[Plan], measured: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Return a workload's figures: of each choice what was planned and measured, and each advice against the best.

    What was planned is the time of a choice's trial where it was `tried`, and predicted where not; the median plan's.
    The best is the choice with the least median of all rounds. A plan's ratio is the median of all rounds' ratios,
    those after other plans among them; the workload's is the median of the plans'.

    Args:
        name: of the workload.
        plans: for it.
        measured: after each plan, of each of its choices, in its order: seconds per batch, one per round.
    """
    choices = [_figures_of(choice.label, plans, measured) for choice in plans[0].choices]
    rounds = {choice["choice"]: [second for rounds in choice["rounds_s"] for second in rounds] for choice in choices}
    best = min(choices, key=lambda choice: choice["measured_s"])["choice"]
    advice = []
    for one in plans:
        advised = one.advice.label
        ratios = [ours / theirs for ours, theirs in zip(rounds[advised], rounds[best], strict=True)]
        planned = one.advice.seconds_per_batch
        advice.append({"choice": advised, "planned_s": planned, "ratio": median(ratios)})
    return {
        "name": name,
        "advice": advice,
        "advised_s": median(median(rounds[one["choice"]]) for one in advice),
        "planned_s": median(one["planned_s"] for one in advice),
        "best": best,
        "best_s": median(rounds[best]),
        "ratio": median(one["ratio"] for one in advice),
        "worst_ratio": max(one["ratio"] for one in advice),
        "choices": choices,
    }


def _figures_of(label: str, plans: Sequence[Plan], measured: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Return what all plans and rounds say of one choice."""
    places = [[choice.label for choice in plan.choices].index(label) for plan in plans]
    said = [plan.choices[place] for plan, place in zip(plans, places, strict=True)]
    rounds = [list(choices[place]) for choices, place in zip(measured, places, strict=True)]
    return {
        "choice": label,
        "planned_s": median(choice.seconds_per_batch for choice in said),
        "tried": sum(choice.measured for choice in said),
        "measured_s": median(chain.from_iterable(rounds)),
        "staleness": median(choice.staleness for choice in said),
        "rounds_s": rounds,
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
    return plan(*_make(workload), passes=passes, make=partial(_make, workload))


def _make(workload: Workload) -> Made:
    keep_freed_memory(large_tensors=get_task(workload.task).large_tensors)
    trained = workload.make()
    return trained.model, trained.loss, list(islice(workload.batches(), workload.distinct)), trained.optimizer


def _measure(workload: Workload, choices: tuple[Choice, ...], rounds: int, seconds: float) -> list[list[float]]:
    measured: list[list[float]] = [[] for _ in choices]
    places = list(range(len(choices)))
    with ExitStack() as stack:
        measures = _measures(workload, choices, stack)
        fastest = min(measure(BURST) for measure in measures)  # to warm up, too
        count = BURST * max(1, round(seconds / fastest / BURST))
        for number in range(rounds):
            for place in places[number % len(places) :] + places[: number % len(places)]:
                measured[place].append(measures[place](count))
    return measured


def _measures(workload: Workload, choices: tuple[Choice, ...], stack: ExitStack) -> list[Callable[[int], float]]:
    """Return what measures each choice: those of one rank share a process."""
    alone = [choice for choice in choices if choice.ranks == 1]
    contestant = stack.enter_context(Contestant([_kind(choice) for choice in alone], workload))
    return [
        partial(contestant.measure, which=alone.index(choice))
        if choice.ranks == 1
        else stack.enter_context(Contestant([Ddp()], workload, choice.ranks)).measure
        for choice in choices
    ]


def _kind(choice: Choice) -> Kind:
    return Async(choice.workers) if choice.workers else Loop(choice.intraop_threads)
