"""Exhibits: what was found, beside what the paper prints, as tables and figures."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asyncprop.report.charts import Curve, curves
from asyncprop.report.files import Comparison, RunFiles
from asyncprop.report.page import Block, FigureBlock, TableBlock
from asyncprop.report.published import Published, spread
from asyncprop.report.rows import comparison
from asyncprop.report.timeline import Timeline, load_timeline
from asyncprop.report.tracks import describe, draw
from asyncprop.trace import Trace

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What was run for one network of an exhibit.

    Args:
        network: as the paper names it.
        data: what it was trained on, in words.
        comparison: the runs.
        is_throughput: whether accuracies mean nothing: the data are noise.
        is_virtual: whether seconds are virtual: those of the paper's GPUs, by its Table 9.
    """

    network: str
    data: str
    comparison: Comparison
    is_throughput: bool = False
    is_virtual: bool = False

    @property
    def where(self) -> str:
        """Return what was trained on, and by whose clock."""
        clock = ", in virtual time on three GPUs by the costs of the paper's Table 9" if self.is_virtual else ""
        return f"{self.network} on {self.data}{clock}"

    @property
    def command(self) -> str:
        """Return the command that makes these runs."""
        options = dict(self.comparison.content["config"])
        words = ["asyncprop", "compare", str(options.pop("task"))]
        for key, value in options.items():
            if value is not None and value is not False:
                words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
        return shlex.join(words)

    @property
    def methods(self) -> list[str]:
        """Return the methods that were run."""
        return list(dict.fromkeys(map(method_of, self.comparison.runs)))

    def rows(self, methods: Sequence[str]) -> list[Row]:
        """Return a row for each of these methods that was run; the target is what the worst of their runs reached."""
        results: dict[str, list[Row]] = {}
        for run in self.comparison.runs:
            name = method_of(run)
            if name in methods and run.result:
                results.setdefault(name, []).append(run.result)
        ordered = {method: results[method] for method in methods if method in results}
        return [{**row, "target": made["target"]} for made in [comparison(ordered, None)] for row in made["rows"]]


def method_of(run: RunFiles) -> str:
    """Return the method of a run, without the options of its row."""
    return str(run.config["method"])


# ---- tables


def time_to_worst(paper: Published, founds: Sequence[Found]) -> list[Block]:
    """Tables 1 and 3: time and epochs to the best accuracy that the worst of the asynchronous methods reached."""
    columns = ["method", "target", "time (s)", "÷ the first", "paper (s)", "paper, ÷ the first", "epochs",
               "paper, epochs"]  # fmt: skip
    blocks: list[Block] = []
    for found in founds:
        if found.is_throughput:
            continue
        theirs = [row for row in paper.rows if row["network"] == found.network]
        rows = {row["method"]: row for row in found.rows([row["method"] for row in theirs])}
        first = next(iter(rows.values()))["time_to_target_s_mean"]
        lines = [
            [
                printed["method"], f"{row['target']:.4f}", _mean(row, "time_to_target_s", ".1f"),
                f"{row['time_to_target_s_mean'] / first:.2f}", spread(printed["tta_s"], "g"),
                f"{printed['tta_s'][0] / theirs[0]['tta_s'][0]:.2f}", _mean(row, "epochs_to_target", ".1f"),
                spread(printed["epochs"], "g"),
            ]
            for printed in theirs
            if (row := rows[printed["method"]])
        ]  # fmt: skip
        blocks.append(_table("Time to the best accuracy of the worst run", columns, lines, found))
    return [*blocks, *_rates(paper, founds)]


def own_best(paper: Published, founds: Sequence[Found]) -> list[Block]:
    """Tables 2, 4 and 6: best accuracy, and the time and epochs to it."""
    columns = ["method", "best (%)", "paper (%)", "time (s)", "paper (s)", "epochs", "paper, epochs", "staleness"]
    blocks: list[Block] = []
    for found in founds:
        if found.is_throughput:
            continue
        lines = []
        for row in found.rows(found.methods):
            theirs = paper.row(network=found.network, method=row["method"])
            lines.append([
                row["method"], _mean(row, "best_accuracy", ".2f", 100), spread(theirs.get("best"), "g"),
                _mean(row, "time_to_own_best_s", ".1f"), spread(theirs.get("tta_s"), "g"),
                _mean(row, "epochs_to_own_best", ".1f"), spread(theirs.get("epochs"), "g"),
                _mean(row, "staleness", ".2f"),
            ])  # fmt: skip
        blocks.append(_table("Best accuracy, time and epochs to it", columns, lines, found))
    return [*blocks, *_rates(paper, founds)]


def large_scale(paper: Published, founds: Sequence[Found]) -> list[Block]:
    """Table 5: accuracy and time where the data are real; samples per second otherwise."""
    return [*([] if all(found.is_throughput for found in founds) else own_best(paper, founds)), *_rates(paper, founds)]


def _rates(paper: Published, founds: Sequence[Found]) -> list[Block]:
    """Return samples per second on noise, and what the paper's times say of the same ratio."""
    lines = []
    for found in founds:
        if not found.is_throughput:
            continue
        theirs = [row for row in paper.rows if row["network"] == found.network and "tta_s" in row]
        rows = found.rows(found.methods)
        base = {row["method"]: row["samples_per_s_mean"] for row in rows}.get(theirs[0]["method"])
        for row in rows:
            printed = next((one for one in theirs if one["method"] == row["method"]), None)
            ratio = f"{theirs[0]['tta_s'][0] / printed['tta_s'][0]:.2f}" if printed else "–"
            ours = f"{row['samples_per_s_mean'] / base:.2f}" if base else "–"
            lines.append([found.network, row["method"], _mean(row, "samples_per_s", ".2f"), ours, ratio,
                          _mean(row, "staleness", ".2f"), f"{row['peak_memory_bytes'] / 2**20:,.0f}"])  # fmt: skip
    if not lines:
        return []
    columns = ["network", "method", "samples/s", "÷ the paper's first", "paper, time ratio", "staleness",
               "peak memory (MiB)"]  # fmt: skip
    note = (
        "Throughput only, on noise of ImageNet's shape: no accuracy can be told from it. The paper's ratio is one of "
        "times to an accuracy, in which the number of epochs counts, too."
    )
    return [TableBlock("Throughput", columns, lines, 2, note)]


def speed_ups(paper: Published, benches: dict[str, Row]) -> list[Block]:
    """Tables 7 and 8: how much faster than one device several are."""
    lines = []
    for network, figures in benches.items():
        (workload,) = figures["workloads"]
        measured = workload["rounds"]
        for method in (str(row["method"]) for row in paper.rows if row["network"] == network):
            key = method.replace("-", "_")
            ratios = [one / many for one, many in zip(measured["sgd_one_thread"], measured[key], strict=True)]
            deviation = statistics.stdev(ratios) if len(ratios) > 1 else None
            ours = f"{statistics.fmean(ratios):.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
            printed = paper.row(network=network, method=method).get("speed_up")
            share = f"{statistics.fmean(ratios) / workload['cores']:.2f}"
            theirs = f"{printed[0] / 3:.2f}" if printed else "–"
            lines.append([network, method, ours, spread(printed, ".2f"), share, theirs])
    cores = next(iter(benches.values()))["workloads"][0]["cores"]
    columns = ["network", "method", f"{cores} cores ÷ 1", "paper, 3 GPUs ÷ 1", "per core", "paper, per GPU"]
    note = (
        f"Speed-up of steps of the same batch size on {cores} cores over one core, on noise; mean ± deviation over "
        f"{len(measured['ddp'])} rounds. The paper's is of times to an accuracy, DDP's batches three times as large."
    )
    return [TableBlock("Speed-up over one device", columns, lines, 2, note)]


def virtual_speed_ups(paper: Published, founds: Sequence[Found]) -> list[Block]:
    """Tables 7 and 8 in virtual time: training time of one device over that of three, at the same number of epochs."""
    blocks: list[Block] = []
    for found in founds:
        rows = {row["method"]: row for row in found.rows(found.methods)}
        base = rows[found.methods[0]]["train_s_mean"]  # the plain loop, which is on one device
        lines = []
        for method, row in list(rows.items())[1:]:
            theirs = paper.row(network=found.network, method=method).get("speed_up")
            ours = base / row["train_s_mean"]
            per_gpu = f"{theirs[0] / 3:.2f}" if theirs else "–"
            lines.append([method, f"{ours:.2f}", spread(theirs, ".2f"), f"{ours / 3:.2f}", per_gpu])
        columns = ["method", "3 devices ÷ 1", "paper, 3 GPUs ÷ 1", "per device", "paper, per GPU"]
        blocks.append(
            _table("Speed-up over one device, of whole trainings of equally many epochs", columns, lines, found)
        )
    return blocks


def pass_times(paper: Published, founds: Sequence[Found]) -> list[Block]:
    """Table 9: how long passes take, and beta, the ratio of the two."""
    columns = ["network", "batch size", "forward (s)", "paper (s)", "backward (s)", "paper (s)", "beta", "paper, beta"]
    blocks: list[Block] = []
    for found in founds:
        printed = paper.row(network=found.network)
        runs = found.comparison.runs
        forward = [step["forward_s"] for run in runs for step in run.all_steps]
        backward = [step["backward_s"] for run in runs for step in run.all_steps]
        beta = statistics.fmean(backward) / statistics.fmean(forward)
        note = (
            f"{len(forward)} batches of {len(runs)} run. The backward pass includes the optimizer's step. The paper's "
            "batches have 128 samples."
        )
        line = [
            found.network, f"{runs[0].steps[0]['batch_size']:g}", _of(forward), spread(printed["forward_s"], "g"),
            _of(backward), spread(printed["backward_s"], "g"), f"{beta:.2f}",
            f"{printed['backward_s'][0] / printed['forward_s'][0]:.2f}",
        ]  # fmt: skip
        blocks.append(_table("Times of passes, mean ± deviation over batches", columns, [line], found, note))
    return blocks


def hyper_parameters(paper: Published, ours: dict[str, Row]) -> list[Block]:
    """Table 10: the recipes that tasks are trained by, and whether they are the paper's."""
    keys = [key for key in paper.rows[0] if key != "task"]
    lines = []
    for printed in paper.rows:
        recipe = ours[str(printed["task"])]
        same = all(recipe[key] == printed[key] for key in keys if key in printed)
        lines.append([printed["task"], *(f"{recipe[key]:g}" for key in keys), "yes" if same else "no"])
    caption = "Hyper-parameters of our recipes, all of which a run's options override"
    return [TableBlock(caption, ["task", *keys, "as printed"], lines)]


# ---- figures


def timelines(trace: Trace, founds: Sequence[Found], name: str, command: str) -> list[Block]:
    """Figure 1: the timeline that the paper draws, predicted, and one that was measured."""
    drawn = Timeline(trace)
    whole = (0.0, drawn.end_s)
    caption = (
        "As the paper draws it, predicted: one forward and two backward threads, three layers, a backward pass of "
        "twice a forward pass. A black tick is the write of a layer; an arrow hands a loss over."
    )
    svg = draw(drawn, whole, name=name, title=caption)
    blocks: list[Block] = [FigureBlock(name, caption, f"{caption} {describe(drawn, whole)}", svg, command,
                                        is_wide=True)]  # fmt: skip
    for found in founds:
        measured = load_timeline(found.comparison.runs[0].path)
        some, own = measured.window(4), f"{name}-measured"
        caption = f"Measured: {found.network} on {found.data}, by {found.comparison.runs[0].label}"
        svg = draw(measured, some, name=own, title=caption)
        described = f"{caption}. {describe(measured, some)}"
        blocks.append(FigureBlock(own, described, described, svg, command, is_wide=True))
    return blocks


def learning(founds: Sequence[Found], methods: Sequence[str], key: str, name: str, command: str) -> list[Block]:
    """Figures 2 to 8: a line for each run of these methods, against epochs."""
    blocks: list[Block] = []
    for found in founds:
        runs = [run for method in methods for run in found.comparison.runs if method_of(run) == method and run.epochs]
        lines = [
            Curve(method_of(run), [row["epoch"] for row in run.epochs], [row[key] for row in run.epochs])
            for run in runs
        ]
        what = {"test_metric": "Test accuracy", "train_loss": "Training loss"}[key]
        caption = f"{what}, {found.network} on {found.data}, a line for each run"
        if found.is_throughput:
            caption += " (noise: that it is learnt says nothing of ImageNet)"
        last = {line.label: statistics.fmean(one.y[-1] for one in lines if one.label == line.label) for line in lines}
        says = ", ".join(f"{label} {value:.4f}" for label, value in last.items())
        own = f"{name}-{found.network.lower()}"
        svg = curves(lines, x="epochs", y=what.lower(), name=own, description=f"{caption}. In the end: {says}.")
        table = TableBlock(f"{what} after the last epoch, mean of runs", ["method", what.lower()],
                           [[label, f"{value:.4f}"] for label, value in last.items()])  # fmt: skip
        blocks.append(FigureBlock(own, caption, f"{caption}. In the end: {says}.", svg, command, table))
    return blocks


# ---- cells


def _table(caption: str, columns: list[str], lines: list[list[str]], found: Found, note: str = "") -> TableBlock:
    """Return a table, with what it was made of."""
    seeds = f"n = {found.comparison.content['seeds']} seeds, mean ± sample standard deviation."
    return TableBlock(f"{caption} ({found.where})", columns, lines, 1, f"{seeds} {note}".strip())


def _mean(row: Row, name: str, form: str, scale: float = 1.0) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean * scale:{form}}" + ("" if std is None else f" ± {std * scale:{form}}")


def _of(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"
