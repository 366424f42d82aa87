"""Compare: methods × seeds, each run in a process of its own, in turn, so that a drifting machine hits all alike."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from asyncprop.config import CompareConfig, SimulateConfig, TrainConfig, resolve, to_toml
from asyncprop.methods import get_method
from asyncprop.methods.fitting import refuse_misfits
from asyncprop.methods.tune import Grid, parse_grid, points
from asyncprop.report.rows import comparison
from asyncprop.runs import as_one, environment, machines, read_environment, read_result, write_json, writing
from asyncprop.tasks import get_task

TUNE_SEED = 1000
"""The seed of tuning runs: none of those that are compared."""


class RunFailedError(RuntimeError):
    """A run ended with an error; the message names it and its cause."""


@dataclass(frozen=True)
class Planned:
    """One run to be made: its row's label, what is run, and its folder."""

    label: str
    config: TrainConfig
    folder: Path


def compare(config: CompareConfig, out: Path | None, messages: TextIO, *, quiet: bool = False) -> dict[str, Any]:
    """Make all runs that are not finished yet, and return their comparison (see `report.rows`).

    It is written to `comparison.json` in their folder, too, with the folders' names by row under `runs`. Its
    `environment` is that of the runs; where they differ, values are listed, and `environments` tells them apart.

    Args:
        config: what to compare.
        out: folder of the runs; None for a new one under `compare/`. Finished runs in it are kept.
        messages: where progress is told.
        quiet: tell nothing.

    Raises:
        ValueError: if the configuration is wrong, or the folder holds another comparison.
        RunFailedError: if a run failed; its cause is told. (One that only tunes may fail: it is then not chosen.)
    """
    task = get_task(config.task)
    target = _target(config.target, task.target)
    if config.stop_at_target and (target is None or config.tune):
        raise ValueError("stop-at-target must have a number as target, and nothing to tune: what is best is not sought")
    out = out or Path("compare") / time.strftime(f"%Y%m%d-%H%M%S-{config.task}")
    grid = parse_grid(config.tune) if config.tune else {}
    for planned in _plan(config, _first_points(config, grid), out):
        refuse_misfits(planned.config)
    with writing(out):
        _open_folder(out, config)
    console = Console(file=messages, quiet=quiet, highlight=False)
    variants, tuning = _tune(config, grid, out, console)
    plan = list(_plan(config, variants, out))
    console.print(f"{config.task}: {len(plan)} runs -> {out}")
    for number, planned in enumerate(plan, start=1):
        name = f"[{number}/{len(plan)}] {planned.label} seed {planned.config.seed}"
        console.print(f"{name}: {_make(planned, console, name)}", markup=False, soft_wrap=True)
    results: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[str]] = {label: [] for label in variants}
    for planned in sorted(plan, key=lambda planned: planned.config.seed):
        result = read_result(planned.folder)
        assert result
        results.setdefault(planned.label, []).append(result)
        runs[planned.label].append(planned.folder.name)
    compared = comparison({label: results[label] for label in variants}, target)
    for row in compared["rows"]:
        row["options"] = {option: value for option, value in variants[row["method"]].items() if option != "method"}
    made = {"config": config.model_dump(mode="json"), "runs": runs, **_provenance(plan)}
    whole = {**compared, **({"tuning": tuning} if tuning else {}), **made}
    write_json(out / "comparison.json", whole)
    return whole


def _provenance(plan: list[Planned]) -> dict[str, Any]:
    """Return where the runs come from, also those that were kept: `environment` in one, and the different ones.

    The command is this one, which makes them all.
    """
    own = [read_environment(planned.folder) for planned in plan]
    different = machines(own)
    begun = min(str(one["started"]) for one in own)
    return {"environment": {**environment(), **as_one(different), "started": begun}, "environments": different}


def _tune(
    config: CompareConfig, grid: Grid, out: Path, console: Console
) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Choose the options in `grid` for every method, by one run each with a seed of its own, of the same length.

    Returns:
        The variants, with what was chosen; and, by label, what every point of the grid reached.
    """
    variants = parse_variants(config.methods)
    common = _common(config)
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in variants}
    sweeps = {label: list(points(grid, options)) for label, options in variants.items()}
    for place in range(max(map(len, sweeps.values()), default=0)):
        for label, options in variants.items():
            if place >= len(sweeps[label]):
                continue
            point = sweeps[label][place]
            run = resolve(_kind(config), {**common, "seed": TUNE_SEED, **options, **point}, None)
            name = " ".join([label, *(f"{option}={value}" for option, value in point.items())])
            planned = Planned(label, run, out / "tuning" / _file_name(name))
            try:
                said = _make(planned, console, f"tuning {name}")
            except RunFailedError as failure:
                said = str(failure)
            result = read_result(planned.folder)
            found[label].append({**point, "best_metric": result["best_metric"] if result else None})
            console.print(f"tuning {name}: {said}", markup=False, soft_wrap=True)
    tuning = {}
    for label, options in variants.items():
        finished = [point for point in found[label] if point["best_metric"] is not None]
        if found[label] and not finished:
            raise RunFailedError(f"tuning {label} failed at every point of its grid: lower the learning rates")
        if finished:
            best = max(finished, key=lambda point: float(point["best_metric"]))
            chosen = {option: value for option, value in best.items() if option != "best_metric"}
            options.update(chosen)
            tuning[label] = {"chosen": chosen, "grid": found[label]}
    if tuning:
        write_json(out / "tuning.json", tuning)
    return variants, tuning


def _first_points(config: CompareConfig, grid: Grid) -> dict[str, dict[str, str]]:
    """Return the variants, each with the first options that are tried for it."""
    variants = parse_variants(config.methods)
    return {label: {**options, **next(points(grid, options), {})} for label, options in variants.items()}


def _target(asked: str | None, default: float) -> float | None:
    """Return the test metric to reach; None stands for the best of the worst method."""
    if asked is None:
        return default
    if asked == "worst-best":
        return None
    try:
        target = float(asked)
    except ValueError:
        target = -1.0
    if not 0 < target <= 1:
        raise ValueError(f"target must be a number from 0 to 1, or worst-best (got {asked})")
    return target


def parse_variants(methods: str) -> dict[str, dict[str, str]]:
    """Return the options of each `NAME` or `NAME:OPTION=VALUE:...` by it; they are separated by commas.

    Raises:
        ValueError: if one is not of this form, or there twice, or a method is none.
    """
    variants: dict[str, dict[str, str]] = {}
    for label in methods.split(","):
        name, *assignments = label.strip().split(":")
        get_method(name)
        options = {"method": name}
        for assignment in assignments:
            option, equals, value = assignment.partition("=")
            if not equals:
                raise ValueError(f"methods: an option must be NAME:OPTION=VALUE (got {label.strip()})")
            options[option.strip().replace("-", "_")] = value.strip()
        if label.strip() in variants:
            raise ValueError(f"methods must be different ({label.strip()} is there twice)")
        variants[label.strip()] = options
    return variants


def _common(config: CompareConfig) -> dict[str, Any]:
    """Return the options that all runs have in common."""
    common = config.model_dump(exclude={"methods", "seeds", "target", "tune"}, exclude_none=True)
    if config.stop_at_target:
        common["target"] = _target(config.target, get_task(config.task).target)
    return common


def _plan(config: CompareConfig, variants: dict[str, dict[str, str]], out: Path) -> Iterator[Planned]:
    """Yield all runs, seed by seed; each seed begins with another method."""
    rows = list(variants.items())
    for seed in range(config.seeds):
        turn = seed % len(rows)
        for label, options in rows[turn:] + rows[:turn]:
            run = resolve(_kind(config), {**_common(config), "seed": seed, **options}, None)
            yield Planned(label, run, out / f"{_file_name(label)}_seed-{run.seed}")


def _kind(config: CompareConfig) -> type[TrainConfig]:
    """Return what runs are: trained on this machine, or in virtual time where the comparison has costs."""
    if config.costs is None and (config.devices or config.speeds):
        raise ValueError("devices and speeds are of virtual time: give costs, too, as --costs a100-resnet18")
    return SimulateConfig if config.costs else TrainConfig


def _file_name(label: str) -> str:
    return label.replace(":", "_").replace("=", "-").replace(" ", "_").replace(",", "_")


def _open_folder(out: Path, config: CompareConfig) -> None:
    """Make the folder, or check that the comparison in it may go on with this configuration."""
    record = out / "compare.toml"
    if record.is_file():
        before = resolve(CompareConfig, {}, record)
        changed = [key for key in CompareConfig.model_fields if getattr(before, key) != getattr(config, key)]
        allowed = {"methods", "seeds"} | (set() if config.stop_at_target else {"target"})  # what was run stays valid
        if wrong := sorted(set(changed) - allowed):
            raise ValueError(f"out must hold the same comparison ({out} differs in {', '.join(wrong)}): choose another")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"out must be a new or empty folder, or one of a comparison ({out} is neither)")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(to_toml(config), encoding="utf-8")


def _make(planned: Planned, console: Console, name: str) -> str:
    """Make, or go on with, one run in a process of its own; return what to tell of it."""
    result, record = read_result(planned.folder), planned.folder / "config.toml"
    if (result or record.is_file()) and resolve(type(planned.config), {}, record) != planned.config:
        raise ValueError(f"{planned.folder} must be a run of this comparison (its config.toml differs): remove it")
    if result:
        return f"kept, {_summary(result)}"
    is_simulated = isinstance(planned.config, SimulateConfig)
    command = [sys.executable, "-m", "asyncprop", "simulate" if is_simulated else "train", "--quiet"]
    if (planned.folder / "checkpoint").exists() and not is_simulated:
        command += ["--resume", str(planned.folder)]
    else:
        shutil.rmtree(planned.folder, ignore_errors=True)
        file = planned.folder.with_name(f"{planned.folder.name}.toml")
        file.parent.mkdir(exist_ok=True)
        file.write_text(to_toml(planned.config), encoding="utf-8")
        command += ["--config", str(file), "--out", str(planned.folder)]
    with console.status(name):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = read_result(planned.folder)
    if done.returncode or result is None:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        log = planned.folder.with_name(f"{planned.folder.name}.log")
        log.write_text(done.stderr, encoding="utf-8")
        raise RunFailedError(f"{name} failed: {said[-1]} (all that it said: {log})")
    return _summary(result)


def _summary(result: dict[str, Any]) -> str:
    return f"best {result['metric']} {result['best_metric']:.4f}, {result['train_s']:.1f} s of training"
