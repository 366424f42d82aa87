"""The command. It reads what is asked for, says what went wrong in one line, and leaves the work to others.

A family of commands is a file; a command is a function in it, and a line here. PyTorch is imported by what needs it,
inside the functions, so that `--help` and wrong input are answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import pydantic
from cyclopts import App, CycloptsError, ValidationError

from asyncprop import __version__
from asyncprop.cli import bench, compare, data, report, reproduce, simulate, theory, trace, train
from asyncprop.cli.common import BAD_INPUT, FAILED, complain
from asyncprop.config import TrainOptions, one_line

app = App(
    name="asyncprop",
    help="Train PyTorch models by asynchronous backpropagation, and compare it with what else there is.",
    version=__version__,
)
app.command(train.train)
app.command(train.replay)
app.command(simulate.simulate)
app.command(simulate.plan)
app.command(compare.compare)
app.command(compare.delays)
app.command(trace.trace)
app.command(report.report)
app.command(reproduce.reproduce)
app.command(theory.theory)
app.command(data.tasks)
app.command(data.methods)
app.command(data.app)
app.command(bench.app)

app.register_install_completion_command(help="Let your shell complete commands and options.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 failed, 2 bad input, 128 + n ended by signal n."""
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))  # one that joins is given another
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        code = complain(_one_line(error), BAD_INPUT)
    except ValueError as error:  # of a machine's ranks, which all say the same, one says it
        said = str(error) if rank == "0" else f"rank {rank}: {error}"
        code = complain(said, BAD_INPUT) if "0" in (rank, local_rank) else BAD_INPUT
    except KeyboardInterrupt:
        code = complain("stopped at once", 130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone
        code = FAILED
    except OSError as error:  # of a disk that is full, a folder that is gone
        code = complain(str(error), FAILED)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(error, ValidationError) and isinstance(cause, pydantic.ValidationError):
        return f"--{one_line(cause, TrainOptions)}"
    return " ".join(str(error).split())
