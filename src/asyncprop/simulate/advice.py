"""Advice: a task's plan, as the command gives it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from asyncprop.devices import available_cores, keep_freed_memory
from asyncprop.engine import Coupled
from asyncprop.runs import environment
from asyncprop.simulate.choices import MARGIN, Choice
from asyncprop.simulate.costs import write_costs
from asyncprop.simulate.ddp import Made
from asyncprop.simulate.planning import Plan, plan
from asyncprop.tasks import Batches, get_task

DISTINCT = 4
"""Batches that are used again and again."""


def plan_task(
    name: str, width: int | None, batch_size: int | None, passes: int, data_dir: Path | None, costs: Path | None
) -> Plan:
    """Plan for a task's model, optimizer and batches, and write its costs if a file is given."""
    make = partial(make_task, name, width, batch_size, data_dir)
    found = plan(*make(), passes=passes, make=make)
    if costs:
        machine = environment()
        size = batch_size or get_task(name).recipe.batch_size
        source = f"asyncprop plan {name}: {machine['processor']}, {machine['cores']} cores, batch size {size}"
        write_costs(costs, name, source, found.layers, found.costs)
    return found


def make_task(name: str, width: int | None, batch_size: int | None, data_dir: Path | None) -> Made:
    """Return a task's model, loss, first batches and optimizer; this process keeps freed memory from then on."""
    task = get_task(name)
    keep_freed_memory(large_tensors=task.large_tensors)
    train = task.load(data_dir=data_dir).train
    size = batch_size or task.recipe.batch_size
    batches = [batch for batch, _ in zip(Batches(train, size, seed=0, epoch=0), range(DISTINCT), strict=False)]
    model = task.build(width=width)
    return model, task.loss, batches, task.optimizer(model)


def print_plan(found: Plan, stream: TextIO) -> None:
    """Print what was measured, the choices, and the advice."""
    console = _console(stream)
    cores = available_cores()
    for what, costs in (("one pass alone", found.alone), (f"{cores} passes at once", found.costs)):
        whole = sum(costs.forward_s) + sum(costs.backward_s) + sum(costs.update_s)
        console.print(
            f"{what}: forward {_ms(sum(costs.forward_s))} ms (launch {_ms(costs.launch_s)} of it), "
            f"backward {_ms(sum(costs.backward_s))} ms, updates {_ms(sum(costs.update_s))} ms "
            f"({len(found.layers)} layers), "
            f"backward/forward {costs.backward_forward_ratio:.2f}, together {_ms(whole)} ms, "
            f"± {100 * costs.variation:.0f} % from pass to pass"
        )
    mib = 2**20
    console.print(
        f"memory: {found.activations_bytes / mib:.1f} MiB of activations per lane, "
        f"{found.gradients_bytes / mib:.1f} MiB of gradients"
    )
    table = Table("workers", "ms per batch: predicted", "measured", "staleness", "bound by", "MiB")
    for choice in found.choices:
        table.add_row(
            choice.label, _ms(choice.predicted_s), _ms(choice.measured_s, "not tried"), f"{choice.staleness:.2f}",
            choice.bound,
            f"{choice.memory_bytes / mib:.0f}",
        )  # fmt: skip
    console.print(table)
    whole = sum(found.costs.forward_s) * (1 + found.costs.backward_forward_ratio)
    busy = f"{1e3 * whole / cores:.2f} ms per batch"
    console.print(f"By traced passes, all cores busy would take about {busy}.")
    console.print(f"Advice: {found.advice.label} ({_how(found.advice)}).{_why(found)}")


def _ms(seconds: float | None, none: str = "–") -> str:
    return none if seconds is None else f"{1e3 * seconds:.2f}"


def _how(choice: Choice) -> str:
    """Say how to take a choice: the options of `asyncprop train`, where it has them."""
    workers = choice.workers
    if workers is None:
        return f"--method ddp --ranks {choice.ranks}" if choice.ranks > 1 else "--method sgd"
    if isinstance(workers, Coupled):
        return f"asyncprop.Coupled({workers.workers}) in a program"
    lanes = f" --lanes {workers.lanes}" if workers.lanes else ""
    return f"--forward-threads {workers.forward} --backward-threads {workers.backward}{lanes}"


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 120)


def _why(found: Plan) -> str:
    best = next(choice for choice in found.choices if choice.measured)
    advice, limit = found.advice, f"{100 * MARGIN:g} %"
    if advice.ranks > 1:
        return (
            f" Nothing is faster by more than {limit}, and it has no staleness. But each process has a batch a step: "
            f"{advice.ranks} times the batch size, and fewer steps."
        )
    if advice.workers is None:
        return f" Nothing is faster by more than {limit}, and SGD has no staleness."
    if advice.workers.lanes_on(1) == 1:
        return (
            " It computes one pass at a time, as SGD does; but each layer is stepped as soon as its gradient is there."
        )
    if best is not advice:
        return f" It is within {limit} of the fastest ({best.label}), and less stale."
    return ""


def print_virtual(figures: dict[str, Any], stream: TextIO) -> None:
    """Print what was predicted beside what was measured."""
    table = Table("workload", "forward, backward, lanes", "ms: predicted", "measured", "ratio", "staleness: predicted",
                  "measured", "ratio", "equal passes", "ratio")  # fmt: skip
    for row in figures["rows"]:
        ratios = [row[key] for key in ("staleness_ratio", "equal_passes_staleness_ratio")]
        varied, equal = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        table.add_row(
            row["name"],
            f"{row['forward']}, {row['backward']}, {row['lanes']}",
            f"{1e3 * row['predicted_s']:.2f}",
            f"{1e3 * row['measured_s']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['predicted_staleness']:.3f}",
            f"{row['measured_staleness']:.3f}",
            varied,
            f"{row['equal_passes_staleness']:.3f}",
            equal,
        )
    _console(stream).print(table)
