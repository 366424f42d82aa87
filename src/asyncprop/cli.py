"""The command. It reads what is asked for, says what went wrong in one line, and leaves the work to others.

PyTorch is imported by what needs it, so that `--help` and wrong input are answered at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from cyclopts import App, CycloptsError, Parameter, ValidationError
from cyclopts.validators import Number

from asyncprop import __version__
from asyncprop.config import CompareConfig, CompareOptions, TrainConfig, TrainOptions, one_line, resolve

if TYPE_CHECKING:
    from asyncprop.runs import Run

BAD_INPUT = 2
FAILED = 1

app = App(
    name="asyncprop",
    help="Train PyTorch models by asynchronous backpropagation, and compare it with what else there is.",
    version=__version__,
)
data = App(name="data", help="The data sets of the tasks.")
bench = App(name="bench", help="Measure this machine: figures are ratios within one run, interleaved, medians.")
app.command(data)
app.command(bench)

Flat = Parameter(name="*")
JsonFile = Annotated[Path | None, Parameter(name="--json", help="File to write the figures to.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 failed, 2 bad input, 128 + n ended by signal n."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        code = _complain(_one_line(error), BAD_INPUT)
    except ValueError as error:  # of several ranks, which all say the same, one says it
        code = _complain(str(error), BAD_INPUT) if os.environ.get("RANK", "0") == "0" else BAD_INPUT
    except KeyboardInterrupt:
        code = _complain("stopped at once", 130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone
        code = FAILED
    sys.exit(code if isinstance(code, int) else 0)


@app.command
def train(
    task: str | None = None,
    /,
    *,
    options: Annotated[TrainOptions, Flat] = TrainOptions(),  # noqa: B008 (frozen)
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    quiet: bool = False,
) -> int:
    """Train TASK by one method, into a run folder.

    Args:
        task: Name from `asyncprop tasks`.
        options: What to train, and how.
        config: TOML file of options, such as a run's config.toml; what is given here overrides it.
        out: Folder of the run, new or empty. Default: one under runs/.
        resume: Folder of a run to go on with, from its last checkpoint, with its own options.
        quiet: Print the result only.
    """
    from asyncprop.runs import create_run, open_run, read_config, read_result

    given = _given(options, task)
    if resume is None:
        resolved = resolve(TrainConfig, given, config)
        return _train(resolved, None, lambda: create_run(out, resolved), quiet=quiet)
    if given or config or out:
        raise ValueError(f"resume takes no other option: the run goes on as {resume / 'config.toml'} says")
    resolved = read_config(resume)
    if result := read_result(resume):
        return _print_result(result, resume)
    return _train(resolved, resume / "checkpoint", lambda: open_run(resume), quiet=quiet)


def _train(config: TrainConfig, checkpoint: Path | None, open_folder: Callable[[], Run], *, quiet: bool) -> int:
    """Train, on one rank or several, and turn every way in which that can end into an exit code."""
    from asyncprop.launch import is_rank, launch

    ranks = config.ranks or 1
    if not is_rank():
        if ranks == 1:
            return _train_rank(config, checkpoint, open_folder, quiet=quiet)
        code, failure = launch(ranks, sys.argv[1:])
        return _complain(failure, code) if failure and code != BAD_INPUT else code
    if config.ranks not in (None, int(os.environ["WORLD_SIZE"])):
        raise ValueError(f"ranks must be left out, or what the launcher started (got {config.ranks})")
    return _train_rank(config, checkpoint, open_folder, quiet=quiet or os.environ["RANK"] != "0")


def _train_rank(config: TrainConfig, checkpoint: Path | None, open_folder: Callable[[], Run], *, quiet: bool) -> int:
    import torch

    from asyncprop.devices import available_cores, keep_freed_memory
    from asyncprop.exchange import World
    from asyncprop.interrupt import Interrupt
    from asyncprop.methods.train import Interrupted, Session
    from asyncprop.methods.train import train as train_session
    from asyncprop.progress import progress_on
    from asyncprop.tasks import get_task

    keep_freed_memory(large_tensors=get_task(config.task).large_tensors)
    observer = progress_on(sys.stderr, quiet=quiet)
    with World() as world, Interrupt(sys.stderr) as interrupt, ExitStack() as stack:
        if world.size > 1:
            torch.set_num_threads(available_cores())
        session = Session(config, checkpoint, world)
        run = stack.enter_context(open_folder()) if world.is_first else None
        stack.callback(observer.close)
        who = "" if world.size == 1 else f"rank {world.rank}: "
        go_on = f"; to go on: asyncprop train --resume {run.path}" if run else ""
        try:
            result = train_session(session, run, observer, interrupt)
        except Interrupted:
            said = f"{who}stopped after {session.position.steps} batches{go_on}"
            return _complain(said, interrupt.exit_code) if run else interrupt.exit_code
        except Exception as error:
            traceback.print_exception(error)
            code = _complain(f"{who}the run failed: {type(error).__name__}: {error}{go_on}", FAILED)
            if world.size > 1:
                sys.stderr.flush()
                os._exit(code)  # threads that wait for this rank's peers would hold it up
            return code
    return _print_result(result, run.path) if run else 0


@app.command
def compare(
    task: str | None = None,
    /,
    *,
    options: Annotated[CompareOptions, Flat] = CompareOptions(),  # noqa: B008 (frozen)
    config: Path | None = None,
    out: Path | None = None,
    json: JsonFile = None,
    markdown: Path | None = None,
    quiet: bool = False,
) -> int:
    """Train TASK by several methods and seeds, in turn, and set them side by side.

    Args:
        task: Name from `asyncprop tasks`.
        options: What to compare.
        config: TOML file of options; what is given here overrides it.
        out: Folder of the runs. Given again, finished runs are kept and the others go on. Default: one under compare/.
        json: File to write the rows to.
        markdown: File to write the table to, with how it was made.
        quiet: Print the table only.
    """
    from asyncprop.methods.compare import RunFailedError
    from asyncprop.methods.compare import compare as compare_methods
    from asyncprop.report.tables import comparison_markdown, print_comparison
    from asyncprop.runs import write_json

    _check_writable(json, markdown)
    resolved = resolve(CompareConfig, _given(options, task), config)
    try:
        comparison = compare_methods(resolved, out, sys.stderr, quiet=quiet)
    except RunFailedError as error:
        return _complain(str(error), FAILED)
    print_comparison(comparison, sys.stdout)
    if json:
        write_json(json, comparison)
    if markdown:
        markdown.write_text(comparison_markdown(comparison), encoding="utf-8")
    return 0


@app.command
def delays(*comparisons: Path, json: JsonFile = None, markdown: Path | None = None, plot: Path | None = None) -> None:
    """Set comparisons of the same methods side by side that differ in their delay: how much a straggler costs.

    Args:
        comparisons: JSON files that `asyncprop compare --delay ... --json FILE` has written.
        json: File to write the rows to.
        markdown: File to write the table to.
        plot: File to draw the curves to (.svg or .png).
    """
    from asyncprop.report.delays import delay_markdown, delay_rows, print_delays, read_comparisons
    from asyncprop.runs import write_json

    _check_writable(json, markdown, plot)
    rows = delay_rows(read_comparisons(comparisons))
    print_delays(rows, sys.stdout)
    if json:
        write_json(json, rows)
    if markdown:
        markdown.write_text(delay_markdown(rows), encoding="utf-8")
    if plot:
        from asyncprop.report.figures import plot_delays

        plot_delays(rows, plot)


@data.command(name="list")
def list_data() -> None:
    """List the data sets that can be fetched, and where they are."""
    from asyncprop.listing import print_data

    print_data(sys.stdout)


@data.command
def fetch(name: str, /) -> None:
    """Fetch a data set into the cache, checked; what is there already is kept.

    Args:
        name: Name from `asyncprop data list`.
    """
    from asyncprop.tasks.fetch import fetch as fetch_data

    print(fetch_data(name))


@app.command
def tasks(*, data_dir: Path | None = None) -> None:
    """List the tasks, with what is on this machine.

    Args:
        data_dir: Folder to look for data in.
    """
    from asyncprop.listing import print_tasks

    print_tasks(sys.stdout, data_dir)


@app.command
def methods() -> None:
    """List the methods, and what separates them."""
    from asyncprop.listing import print_methods

    print_methods(sys.stdout)


@bench.command
def engine(
    *,
    workloads: str | None = None,
    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 9,
    seconds: Annotated[float, Parameter(validator=Number(gt=0))] = 2.0,
    sweep: bool = False,
    json: JsonFile = None,
    markdown: Path | None = None,
) -> int:
    """Measure Async LU against what the machine can give, and against the best synchronous choices.

    Args:
        workloads: Names, separated by commas. Default: all.
        rounds: How often everything is measured, in turn; medians are taken.
        seconds: Length of one measurement.
        sweep: Measure other numbers of threads and lanes, too.
        json: File to write the figures to.
        markdown: File to write the table to, with how it was made.
    """
    from asyncprop.bench.engine import bench_engine
    from asyncprop.report.tables import engine_markdown, print_bench
    from asyncprop.runs import write_json

    _check_writable(json, markdown)
    try:
        figures = bench_engine(workloads, rounds=rounds, seconds=seconds, sweep=sweep, messages=sys.stderr)
    except RuntimeError as error:  # of one of its processes
        return _complain(str(error), FAILED)
    print_bench(figures, sys.stdout)
    if json:
        write_json(json, figures)
    if markdown:
        markdown.write_text(engine_markdown(figures), encoding="utf-8")
    return 0


@bench.command
def memory(*, json: JsonFile = None) -> None:
    """Measure the peak memory of Async LU beyond SGD's, by lanes, beside what is to be expected.

    Args:
        json: File to write the figures to.
    """
    from asyncprop.bench.memory import bench_memory
    from asyncprop.report.tables import print_memory
    from asyncprop.runs import write_json

    _check_writable(json)
    figures = bench_memory(sys.stderr)
    print_memory(figures, sys.stdout)
    if json:
        write_json(json, figures)


@bench.command
def partition(*, workloads: str | None = None, json: JsonFile = None) -> None:
    """Measure what partial backward passes save: each block's, against a whole one.

    Args:
        workloads: Names, separated by commas. Default: all.
        json: File to write the figures to.
    """
    from asyncprop.bench.partition import bench_partition
    from asyncprop.report.tables import print_partition
    from asyncprop.runs import write_json

    _check_writable(json)
    figures = bench_partition(workloads, sys.stderr)
    print_partition(figures, sys.stdout)
    if json:
        write_json(json, figures)


@bench.command
def gpu(*, json: JsonFile = None) -> None:
    """Measure Async LU against SGD on this machine's GPU.

    Args:
        json: File to write the figures to.
    """
    from asyncprop.bench.gpu import bench_gpu
    from asyncprop.report.tables import print_gpu
    from asyncprop.runs import write_json

    _check_writable(json)
    figures = bench_gpu(sys.stderr)
    print_gpu(figures, sys.stdout)
    if json:
        write_json(json, figures)


# ---- input and output


def _given(options: pydantic.BaseModel, task: str | None) -> dict[str, Any]:
    """Return what was given on the command line, and nothing that is a default."""
    given = {name: getattr(options, name) for name in options.model_fields_set}
    return given if task is None else {"task": task, **given}


def _check_writable(*files: Path | None) -> None:
    """Refuse, before hours of work, a file that could not be written after them."""
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ValueError(f"the file to write must be in a folder that exists (got {file})")


def _print_result(result: dict[str, Any], path: Path) -> int:
    from asyncprop.progress import result_line

    print(f"{result_line(result)} -> {path}")
    return 0


def _one_line(error: CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(error, ValidationError) and isinstance(cause, pydantic.ValidationError):
        return f"--{one_line(cause, TrainOptions)}"
    return " ".join(str(error).split())


def _complain(message: str, code: int) -> int:
    print(f"asyncprop: {' '.join(message.split())}", file=sys.stderr)
    return code
