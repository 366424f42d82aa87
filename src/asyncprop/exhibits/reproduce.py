"""Reproduce: make what exhibits need that is not made yet, and set it beside what the paper prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from asyncprop.bench.engine import entries, measure
from asyncprop.bench.workloads import choose
from asyncprop.config import CompareConfig, resolve
from asyncprop.devices import available_cores
from asyncprop.exhibits import DRAWN, ONE_RUN, STUDIES, Exhibit, Study
from asyncprop.exhibits.scales import Scale
from asyncprop.methods.compare import compare
from asyncprop.report import exhibits as show
from asyncprop.report.exhibits import Found
from asyncprop.report.figure1 import figure1
from asyncprop.report.files import read_paths
from asyncprop.report.page import Block, Page, Section, TextBlock
from asyncprop.report.published import published
from asyncprop.runs import as_one, environment, machines, write_json
from asyncprop.tasks import get_task

COMPARED = {"sgd_one_thread", "async_lu", "ddp"}
"""What `bench engine` calls what the paper's speed-ups compare."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        scale: how large runs are.
        scale_name: what that is called.
        out: folder of runs and results; given again, what is there is kept.
        data_dir: folder with a folder for each of the paper's data sets that is at hand, by the data set's name.
        device: of the runs.
        seeds: runs of each method; the scale's if None.
    """

    scale: Scale
    scale_name: str
    out: Path
    data_dir: Path | None = None
    device: str = "cpu"
    seeds: int | None = None

    def data_of(self, study: Study) -> Path | None:
        """Return the folder of the study's own data; None if they are not at hand."""
        folder = self.data_dir / get_task(study.task).dataset if self.data_dir else None
        return folder if folder and folder.is_dir() else None


def reproduce(exhibits: Sequence[Exhibit], request: Request, messages: TextIO, *, quiet: bool = False) -> Page:
    """Make what is missing, and return the page with a section for every exhibit.

    Raises:
        ValueError: if the folder holds runs of another scale, or data are missing.
        RunFailedError: if a run failed.
    """
    founds: dict[str, Found] = {}
    benches: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(study for exhibit in exhibits for study in exhibit.studies):
        founds[name] = _study(STUDIES[name], request, messages, quiet=quiet)
    for workload in dict.fromkeys(workload for exhibit in exhibits for _, workload in exhibit.bench):
        benches[workload] = _bench(workload, request, messages)
    now = environment()
    sections = [_section(exhibit, founds, benches, str(now["command"])) for exhibit in exhibits]
    own = [run.environment for found in founds.values() for run in found.comparison.runs]
    made = as_one(machines([*own, *(figures["environment"] for figures in benches.values())] or [now]))
    lead = (
        f"Scale {request.scale_name}, {request.seeds or request.scale.seeds} seeds, {request.device}, {made['cores']} "
        f"cores ({made['processor']}), torch {made['torch']}, commit {made['commit']}. The paper's times are of three "
        "A100 GPUs and of networks of full size: compare ratios, not seconds."
    )
    return Page("The paper's tables and figures, ours beside its own", lead, sections)


def _study(study: Study, request: Request, messages: TextIO, *, quiet: bool) -> Found:
    """Make the runs of a study, or keep those that are there."""
    folder = request.data_of(study)
    task = study.task if folder else study.stand_in
    options = request.scale.options(study.kind, is_real=folder is not None)
    is_virtual = study.kind == "virtual"
    device = "cpu" if is_virtual else request.device
    given = {
        **options,
        "task": task,
        "methods": ",".join(study.methods).format(ranks=request.scale.ranks),
        "seeds": 1 if study.kind in ONE_RUN else request.seeds or request.scale.seeds,
        "target": "worst-best",
        "device": device,
        **({"data_dir": folder} if folder else {}),
    }
    out = request.out / "runs" / (f"{task}-{study.kind}" if study.kind in ("times", "trace", "virtual") else task)
    out.parent.mkdir(parents=True, exist_ok=True)
    compare(resolve(CompareConfig, given, None), out, messages, quiet=quiet)
    (comparison,), _ = read_paths([out])
    is_throughput = study.kind == "throughput" and folder is None
    data = study.data if folder else f"{study.shown_as}, not {study.data}"
    return Found(study.network, data, comparison, is_throughput=is_throughput, is_virtual=is_virtual)


def _bench(workload: str, request: Request, messages: TextIO) -> dict[str, Any]:
    """Measure what speed-ups are made of, as `asyncprop bench engine` does, or keep what was measured."""
    file = request.out / "runs" / f"bench-{workload}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    file.parent.mkdir(parents=True, exist_ok=True)
    scale = request.scale
    print(f"{workload} ...", file=messages, flush=True)
    (chosen,), needed = choose(workload), [entry for entry in entries(sweep=False) if COMPARED & set(entry.kinds)]
    rounds = measure(chosen, needed, scale.bench_processes, 1, scale.bench_seconds).seconds
    figures = {
        "workloads": [{"name": workload, "cores": available_cores(), "rounds": rounds}],
        "processes": scale.bench_processes, "rounds": 1, "seconds": scale.bench_seconds, "environment": environment(),
    }  # fmt: skip
    write_json(file, figures)
    return figures


def _section(
    exhibit: Exhibit, founds: dict[str, Found], benches: dict[str, dict[str, Any]], command: str
) -> Section:  # fmt: skip
    used = [founds[name] for name in exhibit.studies]
    on = "; ".join(dict.fromkeys(f"{found.network} on {found.data}" for found in used))
    title = f"{_numbered(exhibit.name)}: {exhibit.title}"
    blocks: list[Block] = list(_blocks(exhibit, used, benches, command))
    if exhibit.name.startswith("table"):
        blocks.append(TextBlock(f"In the paper: {published(exhibit.name).place}."))
    commands = [found.command for found in used] + [_bench_command(benches[workload]) for _, workload in exhibit.bench]
    blocks += [TextBlock(command, is_code=True) for command in commands]
    return Section(f"{title} [{on}]" if on else title, blocks)


def _bench_command(figures: dict[str, Any]) -> str:
    """Return the command that measures a workload as it was measured."""
    options = " ".join(f"--{key} {figures[key]}" for key in ("processes", "rounds", "seconds"))
    return f"asyncprop bench engine --workloads {figures['workloads'][0]['name']} {options}"


def _numbered(name: str) -> str:
    """Return `Table 1` for table1."""
    kind = name.rstrip("0123456789")
    return f"{kind.capitalize()} {name.removeprefix(kind)}"


def _blocks(
    exhibit: Exhibit, founds: list[Found], benches: dict[str, dict[str, Any]], command: str
) -> list[Block]:  # fmt: skip
    match exhibit.show:
        case "time to the worst's best":
            return show.time_to_worst(published(exhibit.name), founds)
        case "own best":
            return show.own_best(published(exhibit.name), founds)
        case "large scale":
            return show.large_scale(published(exhibit.name), founds)
        case "speed-up":
            workloads = {network: benches[workload] for network, workload in exhibit.bench}
            return [*show.speed_ups(published(exhibit.name), workloads),
                    *show.virtual_speed_ups(published(exhibit.name), founds)]  # fmt: skip
        case "pass times":
            return show.pass_times(published(exhibit.name), founds)
        case "hyper-parameters":
            return show.hyper_parameters(published(exhibit.name), _recipes(exhibit.name))
        case "timeline":
            return show.timelines(figure1(), founds, exhibit.name, command)
        case "test curves":
            return show.learning(founds, DRAWN[exhibit.name], "test_metric", exhibit.name, command)
        case "training curves":
            return show.learning(founds, DRAWN[exhibit.name], "train_loss", exhibit.name, command)


def _recipes(table: str) -> dict[str, dict[str, Any]]:
    """Return our recipe of each task in the paper's table of hyper-parameters."""
    tasks = [str(row["task"]) for row in published(table).rows]
    keys = [key for key in published(table).rows[0] if key != "task"]
    return {task: {key: getattr(get_task(task).recipe, key) for key in keys} for task in tasks}
