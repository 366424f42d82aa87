"""Tables: comparisons and benchmarks, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def print_table(stream: TextIO, columns: list[str], rows: list[list[str]], *, numbers_from: int | None = None) -> None:
    """Print a table; columns from `numbers_from` on are aligned right. Off a terminal nothing is cut off."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        is_number = numbers_from is not None and place >= numbers_from
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if stream.isatty() else 240
    Console(file=stream, width=width, highlight=False, markup=False).print(table)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ---- compare

COMPARISON: Columns = {
    "method": lambda row: str(row["method"]),
    "best": lambda row: _mean_std(row, "best_accuracy", ".4f"),
    "final": lambda row: _mean_std(row, "final_accuracy", ".4f"),
    "time to target (s)": lambda row: _to_target(row, "time_to_target_s"),
    "crosses target (s)": lambda row: _to_target(row, "crosses_target_s"),
    "epochs to target": lambda row: _to_target(row, "epochs_to_target"),
    "time to own best (s)": lambda row: _mean_std(row, "time_to_own_best_s", ".1f"),
    "training time (s)": lambda row: _mean_std(row, "train_s", ".1f"),
    "samples/s": lambda row: _mean_std(row, "samples_per_s", ",.0f"),
    "staleness": lambda row: _mean_std(row, "staleness", ".2f"),
    "peak memory (MiB)": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
}


def print_comparison(comparison: dict[str, Any], stream: TextIO) -> None:
    """Print the rows of a comparison."""
    print(comparison_title(comparison), file=stream)
    print_table(stream, list(COMPARISON), cells(COMPARISON, comparison["rows"]), numbers_from=1)


def comparison_title(comparison: dict[str, Any]) -> str:
    """Return what was compared, in one line."""
    origin = ", the best of the worst run" if comparison["target_is"] == "worst-best" else ""
    return (
        f"{comparison['task']}: test {comparison['metric']} after {comparison['epochs']} epochs, n = "
        f"{comparison['seeds']} seeds, mean ± sample standard deviation; target {comparison['target']:.4g}{origin}"
    )


def comparison_markdown(comparison: dict[str, Any]) -> str:
    """Return a comparison in Markdown, with the command, the commit and the machine."""
    table = markdown_table(list(COMPARISON), cells(COMPARISON, comparison["rows"]))
    return f"# {comparison_title(comparison)}\n\n{table}\n{provenance(comparison['environment'])}\n"


def provenance(environment: dict[str, Any]) -> str:
    """Return where figures come from: the command, the versions, the machine."""
    return (
        f"`{environment['command']}`, commit {environment['commit']}, torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['cores']} cores ({environment['processor']}), "
        f"{environment['started']}"
    )


def markdown_cell(value: Any) -> str:
    """Return a value as a cell: a dash for nothing, and no bar that would end the cell."""
    return "–" if value is None else str(value).replace("|", "/")


def cells(columns: Columns, rows: list[Row]) -> list[list[str]]:
    """Return the text of each row's cells."""
    return [[cell(row) for cell in columns.values()] for row in rows]


def _mean_std(row: Row, name: str, form: str) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    return format(mean, form) if std is None else f"{mean:{form}} ± {std:{form}}"


def _to_target(row: Row, name: str) -> str:
    """Return a time or epochs to the target; a dash where an older comparison does not tell it."""
    if not row["reached"]:
        return f"not reached (0 of {row['n']})"
    if f"{name}_mean" not in row:
        return "–"
    partly = "" if row["reached"] == row["n"] else f" ({row['reached']} of {row['n']})"
    return _mean_std(row, name, ".1f") + partly


# ---- bench

ENGINE: Columns = {
    "workload": lambda row: str(row["name"]),
    "limit": lambda row: _ms(row["limit_s"]),
    "SGD, 1 thread": lambda row: _ms(row["sgd_one_thread_s"]),
    "SGD, all threads": lambda row: _ms(row["sgd_all_threads_s"]),
    "DDP": lambda row: _ms(row["ddp_s"]),
    "Async LU": lambda row: _ms(row["async_lu_s"]),
    "efficiency": lambda row: f"{row['efficiency']:.3f}",
    "cores near": lambda row: _ratio(row["efficiency_near"]),
    "cores far": lambda row: _ratio(row["efficiency_far"]),
    "vs best sync": lambda row: f"{row['vs_best_sync']:.3f}",
    "lockstep / loop": lambda row: f"{row['lockstep_vs_loop']:.3f}",
    "telemetry on / off": lambda row: f"{row['telemetry_cost']:.3f}",
}


def print_bench(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench engine`."""
    print("ms per batch of the whole machine, medians", file=stream)
    print_table(stream, list(ENGINE), cells(ENGINE, figures["workloads"]), numbers_from=1)
    for workload in figures["workloads"]:
        if others := workload.get("sweep"):
            print(f"{workload['name']}, other threads and lanes, efficiency", file=stream)
            rows = [[name, _ms(seconds), f"{workload['limit_s'] / seconds:.3f}"] for name, seconds in others.items()]
            print_table(stream, ["workers", "ms", "efficiency"], rows, numbers_from=1)


def engine_markdown(figures: dict[str, Any]) -> str:
    """Return the figures of `bench engine` in Markdown."""
    table = markdown_table(list(ENGINE), cells(ENGINE, figures["workloads"]))
    return f"# ms per batch of the whole machine, medians\n\n{table}\n{provenance(figures['environment'])}\n"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


EXCHANGE: Columns = {
    "workload": lambda row: str(row["name"]),
    "exchange (bytes of a message)": lambda row: str(row["exchange"]),
    "ms per batch": lambda row: _ms(row["batch_s"]),
    "on / off": lambda row: f"{row['ratio']:.3f}",
}


def print_exchange(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench exchange`."""
    print(f"{figures['ranks']} ranks, ms per batch of the whole machine, medians", file=stream)
    print_table(stream, list(EXCHANGE), cells(EXCHANGE, figures["rows"]), numbers_from=2)


MEMORY: Columns = {
    "workload": lambda row: str(row["name"]),
    "lanes": lambda row: str(row["lanes"]),
    "beyond SGD (MiB)": lambda row: _mib(row["beyond_sgd_bytes"]),
    "expected (MiB)": lambda row: _mib(row["expected_bytes"]),
    "ratio": lambda row: f"{row['ratio']:.3f}",
    "ratio with workspaces": lambda row: f"{row['ratio_with_workspaces']:.3f}",
    "activations of a pass (MiB)": lambda row: _mib(row["activations_bytes"]),
    "gradients (MiB)": lambda row: _mib(row["gradients_bytes"]),
}


def print_memory(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench memory`."""
    print_table(stream, list(MEMORY), cells(MEMORY, figures["rows"]), numbers_from=1)


MEMORY_OF_RANKS: Columns = {
    "workload": lambda row: str(row["name"]),
    "ranks": lambda row: str(row["ranks"]),
    "parameters (MiB)": lambda row: _mib(row["parameters_bytes"]),
    "beyond SGD (MiB)": lambda row: _mib(row["beyond_sgd_bytes"]),
    "copies of the parameters": lambda row: f"{row['copies']:.2f}",
}


def print_memory_of_ranks(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench memory --ranks`."""
    print_table(stream, list(MEMORY_OF_RANKS), cells(MEMORY_OF_RANKS, figures["rows"]), numbers_from=1)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


PARTITION: Columns = {
    "workload": lambda row: str(row["name"]),
    "layers of each block": lambda row: ", ".join(map(str, row["blocks"])),
    "whole backward (ms)": lambda row: _ms(row["backward_s"]),
    "of each block (ms)": lambda row: ", ".join(map(_ms, row["block_s"])),
    "saved": lambda row: f"{row['saved']:.0%}",
}


def print_partition(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench partition`."""
    print_table(stream, list(PARTITION), cells(PARTITION, figures["rows"]), numbers_from=2)


GPU: Columns = {
    "workload": lambda row: str(row["name"]),
    "method": lambda row: str(row["method"]),
    "ms per batch": lambda row: _ms(row["seconds_per_batch"]),
    "SGD / it": lambda row: f"{row['speed_up']:.3f}",
    "peak memory (MiB)": lambda row: _mib(row["peak_memory_bytes"]),
}


def print_gpu(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench gpu`."""
    print(figures["device"], file=stream)
    print_table(stream, list(GPU), cells(GPU, figures["rows"]), numbers_from=2)


TRACE: Columns = {
    "workload": lambda row: str(row["name"]),
    "free (ms per batch)": lambda row: f"{1e3 * row['free_s']:.2f}",
    "traced / free": lambda row: _with_error(row, "traced"),
    "ordered / free": lambda row: _with_error(row, "ordered"),
}


def print_trace(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench trace`."""
    print_table(stream, list(TRACE), cells(TRACE, figures["rows"]), numbers_from=1)


def trace_markdown(figures: dict[str, Any]) -> str:
    """Return the figures of `bench trace` in Markdown."""
    title = f"# Cost of tracing and ordering: medians of {figures['rounds']} rounds' ratios, ± standard error"
    table = markdown_table(list(TRACE), cells(TRACE, figures["rows"]))
    return f"{title}\n\n{table}\n{provenance(figures['environment'])}\n"


def _with_error(row: Row, kind: str) -> str:
    error = row[f"{kind}_error"]
    return f"{row[f'{kind}_ratio']:.3f}" + ("" if error is None else f" ± {error:.3f}")
