"""Overview: the page about runs and comparisons: what was run, on what, and what came of it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asyncprop.report.charts import Curve, bars, curves, strip
from asyncprop.report.files import Comparison, RunFiles, read_paths
from asyncprop.report.page import Block, FigureBlock, Page, Section, TableBlock, TextBlock
from asyncprop.report.tables import COMPARISON, cells, comparison_title, markdown_cell
from asyncprop.report.timeline import load_timeline
from asyncprop.report.tracks import describe, draw

Row = dict[str, Any]


def overview(paths: Sequence[Path], command: str) -> Page:
    """Return the page about these runs and comparisons.

    Args:
        paths: folders of runs and comparisons, and JSON files of comparisons.
        command: what makes this page, told with every figure.

    Raises:
        ValueError: if a path is none of these, or its files are damaged.
    """
    comparisons, runs = read_paths(paths)
    sections: list[Section] = []
    for number, comparison in enumerate(comparisons):
        sections += _comparison_sections(comparison, command, f"c{number}")
    by_task: dict[str, list[RunFiles]] = {}
    for run in runs:
        by_task.setdefault(str(run.config.get("task", "?")), []).append(run)
    compared = {str(comparison.content["task"]) for comparison in comparisons}
    for number, (task, group) in enumerate(by_task.items()):
        sections += _run_sections(f"{task}: {'other ' * (task in compared)}runs", group, command, f"r{number}")
    everything = [run for comparison in comparisons for run in comparison.runs] + runs
    sections.append(_provenance(comparisons, everything, command))
    found = {"comparison": len(comparisons), "run": len(everything)}
    counts = [f"{count} {what}{'s' * (count > 1)}" for what, count in found.items() if count]
    title = ", ".join(dict.fromkeys([*(str(c.content["task"]) for c in comparisons), *by_task]))
    return Page(f"asyncprop: {title}", f"{' and '.join(counts)}, from their files alone.", sections)


def _comparison_sections(comparison: Comparison, command: str, name: str) -> list[Section]:
    content = comparison.content
    rows = content["rows"]
    table = TableBlock(comparison_title(content), list(COMPARISON), cells(COMPARISON, rows))
    blocks: list[Block] = [table, TextBlock(str(content["environment"]["command"]), is_code=True)]
    reached = [row for row in rows if row["time_to_target_s_mean"] is not None]
    if reached:
        blocks.append(_time_to_target(content, reached, command, name))
    if any(row["staleness_mean"] for row in rows):
        blocks.append(_bar_block(
            "staleness", "Staleness: updates by other passes between a layer's read and its write", rows,
            "staleness_mean", 1.0, "updates", command, name, ".2f"))  # fmt: skip
    if not comparison.runs:
        blocks.append(_bar_block("memory", "Peak memory", rows, "peak_memory_bytes", 2.0**-20, "MiB", command, name,
                                 ",.0f"))  # fmt: skip
    first = Section(f"{content['task']}: {len(rows)} methods side by side", blocks)
    if not comparison.runs:
        return [first]
    return [first, *_run_sections(f"{content['task']}: runs", comparison.runs, command, name, content["target"])]


def _run_sections(
    title: str, runs: list[RunFiles], command: str, name: str, target: float | None = None
) -> list[Section]:  # fmt: skip
    """Return what single runs say: a line for each, learning curves, staleness, threads, memory."""
    blocks: list[Block] = [_run_table(title, runs)]
    if target is None and len({str(run.result and run.result["target"]) for run in runs}) == 1 and runs[0].result:
        target = runs[0].result["target"]
    trained = [run for run in runs if run.epochs]
    curve_blocks = list(_learning(trained, command, name, target)) if trained else []
    one_each = list({run.label: run for run in reversed(trained)}.values())[::-1]
    sections = [Section(title, [*blocks, *curve_blocks])]
    if stale := list(_staleness(one_each, command, name)):
        sections.append(Section(f"{title}, staleness", stale))
    if lines := list(_timelines(one_each, command, name)):
        sections.append(Section(f"{title}, timelines", lines))
    if means := list(_means(one_each, command, name)):
        sections.append(Section(f"{title}, threads and memory", means))
    return sections


# ---- blocks


def _run_table(title: str, runs: list[RunFiles]) -> TableBlock:
    columns = ["run", "method", "seed", "epochs", "best", "final", "time to target (s)", "training time (s)",
               "samples/s", "staleness", "peak memory (MiB)"]  # fmt: skip
    return TableBlock(f"Every run of {title.partition(':')[0]}", columns, [_run_cells(run) for run in runs], 2)


def _run_cells(run: RunFiles) -> list[str]:
    found = [run.path.name, run.label, str(run.seed)]
    if run.result is None:
        last = run.epochs[-1] if run.epochs else None
        so_far = f"{last['epoch']} (not finished)" if last else "0 (not finished)"
        metric = f"{last['test_metric']:.4f}" if last else "–"
        return [*found, so_far, metric, metric, *["–"] * 5]
    result = run.result
    to_target = "not reached" if result["time_to_target_s"] is None else f"{result['time_to_target_s']:.1f}"
    return [
        *found, str(result["epochs"]), f"{result['best_metric']:.4f}", f"{result['final_metric']:.4f}", to_target,
        f"{result['train_s']:.1f}", f"{result['samples_per_s']:,.0f}", f"{result['mean_staleness']:.2f}",
        f"{result['peak_memory_bytes'] / 2**20:,.0f}",
    ]  # fmt: skip


def _learning(runs: list[RunFiles], command: str, name: str, target: float | None) -> Iterator[Block]:
    metric = runs[0].result["metric"] if runs[0].result else "metric"
    last = TableBlock(
        "Last epoch of every run", ["method", "seed", "epoch", "seconds", f"test {metric}", "test loss", "train loss"],
        [[run.label, str(run.seed), str(run.epochs[-1]["epoch"]), f"{run.epochs[-1]['train_s']:.1f}",
          *(f"{run.epochs[-1][key]:.4f}" for key in ("test_metric", "test_loss", "train_loss"))] for run in runs],
    )  # fmt: skip
    best = max(runs, key=lambda run: max(float(row["test_metric"]) for row in run.epochs))
    says = f"The highest is {best.label}, seed {best.seed}, with {max(r['test_metric'] for r in best.epochs):.4f}."
    kinds = [
        ("epoch", "test_metric", "epochs", f"test {metric}", "against epochs"),
        ("train_s", "test_metric", "seconds of training", f"test {metric}", "against seconds"),
        ("epoch", "train_loss", "epochs", "training loss", "against epochs"),
        ("train_s", "test_loss", "seconds of training", "test loss", "against seconds"),
    ]
    for number, (x, y, x_label, y_label, against) in enumerate(kinds):
        lines = [Curve(run.label, [row[x] for row in run.epochs], [row[y] for row in run.epochs]) for run in runs]
        caption = f"{y_label.capitalize()} {against}, a line for each run"
        description = f"{caption}. {says if y == 'test_metric' else ''}".strip()
        key = f"{name}-{y.replace('_', '-')}-{against.split()[1]}"
        svg = curves(lines, x=x_label, y=y_label, name=key, description=description,
                     level=target if y == "test_metric" else None)  # fmt: skip
        yield FigureBlock(key, caption, description, svg, command, last if number == 0 else None)


def _time_to_target(content: Row, rows: list[Row], command: str, name: str) -> FigureBlock:
    """Return the bars of what was reached; where not every run did, the label says how many."""
    whole = [row for row in rows if row["reached"] == row["n"]]
    labels = [f"{row['method']}{'' if row in whole else _share(row)}" for row in rows]
    left_out = [str(row["method"]) for row in content["rows"] if row not in rows]
    missing = f" Not reached by {', '.join(left_out)}." if left_out else ""
    partly = " of the runs that reached it" if len(whole) < len(rows) else ""
    caption = (
        f"Seconds of training to test {content['metric']} {content['target']:.4g}, mean ± deviation{partly}.{missing}"
    )
    description = f"{caption} {_fastest(whole, is_choice=len(whole) < len(rows))}"
    svg = bars(
        labels, {"time to target": [row["time_to_target_s_mean"] for row in rows]}, x="seconds of training",
        name=f"{name}-time-to-target", description=description,
        errors={"time to target": [row["time_to_target_s_std"] for row in rows]},
    )  # fmt: skip
    return FigureBlock(f"{name}-time-to-target", caption, description, svg, command)


def _share(row: Row) -> str:
    return f" ({row['reached']} of {row['n']})"


def _fastest(whole: list[Row], *, is_choice: bool) -> str:
    """Say which is the fastest of the methods all of whose runs reached the target."""
    if not whole:
        return "No method reached it in every run."
    fastest = min(whole, key=lambda row: float(row["time_to_target_s_mean"]))
    among = " of those that reached it in every run" if is_choice else ""
    return f"{fastest['method']} is the fastest{among}, with {fastest['time_to_target_s_mean']:.1f} s."


def _bar_block(
    kind: str, caption: str, rows: list[Row], key: str, scale: float, unit: str, command: str, name: str, form: str
) -> FigureBlock:
    labels, values = [str(row["method"]) for row in rows], [row[key] * scale for row in rows]
    highest = labels[values.index(max(values))]
    description = f"{caption}. Highest: {highest}, {max(values):{form}} {unit}."
    svg = bars(labels, {kind: values}, x=unit, name=f"{name}-{kind}", description=description)
    table = TableBlock(caption, ["method", unit], [[a, format(b, form)] for a, b in zip(labels, values, strict=True)])
    return FigureBlock(f"{name}-{kind}", caption, description, svg, command, table)


def _staleness(runs: list[RunFiles], command: str, name: str) -> Iterator[Block]:
    """Yield staleness over time for all methods, and by layer for each that is ever stale."""
    stale = [run for run in runs if any(step["staleness"] for step in run.steps)]
    if not stale:
        return
    lines = [Curve(run.label, [s["step"] for s in run.steps], [s["staleness"] for s in run.steps]) for run in stale]
    peak = max(max(line.y) for line in lines)
    caption = "Staleness over the run: means of all layers, of one run for each method"
    description = f"{caption}. The highest mean of a stretch is {peak:.2f} updates."
    key = f"{name}-staleness-over-time"
    yield FigureBlock(key, caption, description, curves(
        lines, x="batches", y="staleness (updates)", name=key, description=description), command)  # fmt: skip
    for number, run in enumerate(stale):
        noted = [row for row in run.epochs if "staleness_by_layer" in row]
        if noted:
            yield _layers(run, noted, command, f"{name}-layers-{number}")


def _layers(run: RunFiles, noted: list[Row], command: str, key: str) -> FigureBlock:
    layers = list(noted[-1]["staleness_by_layer"])
    values = [[row["staleness_by_layer"].get(layer) for row in noted] for layer in layers]
    means = [statistics.fmean([v for v in row if v is not None] or [0.0]) for row in values]
    worst = layers[means.index(max(means))]
    caption = f"Staleness by layer and epoch: {run.label}, seed {run.seed}"
    description = f"{caption}. The stalest layer is {worst}, {max(means):.2f} updates in the mean of the epochs."
    svg = strip(layers, [str(row["epoch"]) for row in noted], values, x="epochs", unit="updates", name=key,
                description=description)  # fmt: skip
    table = TableBlock(caption, ["layer", "mean of the epochs", "last epoch"], [
        [layer, f"{mean:.2f}", "–" if row[-1] is None else f"{row[-1]:.2f}"]
        for layer, mean, row in zip(layers, means, values, strict=True)
    ])  # fmt: skip
    return FigureBlock(key, caption, description, svg, command, table)


def _timelines(runs: list[RunFiles], command: str, name: str) -> Iterator[Block]:
    for number, run in enumerate(run for run in runs if run.has_trace):
        timeline, key = load_timeline(run.path), f"{name}-timeline-{number}"
        caption = (
            f"About eight batches from the middle of {run.label}, seed {run.seed}: forward passes, backward passes"
        )
        svg = draw(timeline, timeline.window(), name=key, title=caption)
        described = describe(timeline, timeline.window())
        yield FigureBlock(key, f"{caption}. {described}", f"{caption}. {described}", svg, command, is_wide=True)


def _means(runs: list[RunFiles], command: str, name: str) -> Iterator[Block]:
    noted = [run for run in runs if any("threads" in row for row in run.epochs)]
    if not noted:
        return
    labels, worked, waited = [], [], []
    for run in noted:
        for thread, (work, wait) in _thread_times(run).items():
            labels.append(f"{run.label}, {thread}")
            worked.append(100 * work / max(work + wait, 1e-9))
            waited.append(100 - worked[-1])
    lowest = min(range(len(worked)), key=worked.__getitem__)
    caption = "What threads do while training: inside passes, or waiting (one run for each method)"
    description = f"{caption}. The least busy is {labels[lowest]}, {worked[lowest]:.0f} % inside passes."
    svg = bars(labels, {"inside passes": worked, "waiting": waited}, x="% of training time", name=f"{name}-threads",
               description=description, stacked=True)  # fmt: skip
    table = TableBlock(caption, ["thread", "inside passes (%)", "waiting (%)"], [
        [label, f"{work:.1f}", f"{wait:.1f}"] for label, work, wait in zip(labels, worked, waited, strict=True)
    ])  # fmt: skip
    yield FigureBlock(f"{name}-threads", caption, description, svg, command, table)
    rows = [{"method": run.label, "peak": max(r.get("peak_memory_bytes", 0) for r in run.epochs)} for run in noted]
    yield _bar_block("memory", "Peak memory of all ranks, evaluation and data included", rows, "peak", 2.0**-20, "MiB",
                     command, name, ",.0f")  # fmt: skip


def _thread_times(run: RunFiles) -> dict[str, tuple[float, float]]:
    """Return seconds worked and waited by thread, over the whole run."""
    times: dict[str, tuple[float, float]] = {}
    several = len({thread["rank"] for row in run.epochs for thread in row.get("threads", ())}) > 1
    for row in run.epochs:
        for thread in row.get("threads", ()):
            name = f"rank {thread['rank']} {thread['name']}" if several else thread["name"]
            work, wait = times.get(name, (0.0, 0.0))
            times[name] = work + thread["worked_s"], wait + thread["waited_s"]
    return times


def _provenance(comparisons: list[Comparison], runs: list[RunFiles], command: str) -> Section:
    """Return where everything comes from: machines and versions, commands, options."""
    blocks: list[Block] = [_machines(comparisons, runs)]
    if runs:
        fixed = {key: value for key, value in runs[0].config.items()
                 if all(run.config.get(key) == value for run in runs)}  # fmt: skip
        options = [[key, markdown_cell(value)] for key, value in sorted(fixed.items())]
        blocks.append(TableBlock("Options that all runs have in common", ["option", "value"], options, 99))
        commands = [[run.path.name, str(run.environment.get("command")), str(run.environment.get("started"))]
                    for run in runs]  # fmt: skip
        blocks.append(TableBlock("The command of every run", ["run", "command", "started"], commands, 99))
    blocks += [TextBlock("This page is made by:"), TextBlock(command, is_code=True)]
    return Section("Where this comes from", blocks)


def _machines(comparisons: list[Comparison], runs: list[RunFiles]) -> TableBlock:
    """Return each machine with its versions, and how many comparisons and runs are of it."""
    keys = ("asyncprop", "torch", "python", "commit", "cores", "processor", "system")
    contents = [comparison.content for comparison in comparisons]
    made = [
        ("comparison", one) for content in contents for one in content.get("environments", [content["environment"]])
    ]
    made += [("run", run.environment) for run in runs]
    found: dict[tuple[str, ...], Counter[str]] = {}
    for what, environment in made:
        machine = tuple(markdown_cell(environment.get(key)) for key in keys)
        found.setdefault(machine, Counter())[what] += 1
    rows = [[*machine, str(counts["comparison"]), str(counts["run"])] for machine, counts in found.items()]
    return TableBlock("Machines and versions", [*keys, "comparisons", "runs"], rows, len(keys))
