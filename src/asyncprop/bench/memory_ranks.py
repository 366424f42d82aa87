"""Bench memory of ranks: the peak memory of a rank that gossips beyond SGD's, in copies of the model's parameters.

With one lane, so that activations are SGD's; and with a meeting at the end, where ranks hold the mean of all beside
their own. SGD holds gradients of the whole model meanwhile, of which Async LU has a layer's.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

from asyncprop.bench.memory import BATCHES, give_memory_back, measure_alone, peak_bytes
from asyncprop.bench.workloads import Workload, set_threads
from asyncprop.runs import environment

NAMES = (
    Workload("mlp-width2048", "synthetic-vectors", width=2048),
    Workload("resnet18-width64", "synthetic-images", width=64, batch_size=8),
)
"""Workloads with so many parameters that the rest of a process is small beside them."""


def bench_memory_of_ranks(ranks: int, messages: TextIO) -> dict[str, Any]:
    """Measure SGD in a process of its own, and so many ranks that gossip; of their peaks the largest is told."""
    rows = []
    for workload in NAMES:
        print(f"{workload.name} ...", file=messages, flush=True)
        sgd = measure_alone(workload, 0)
        peaks = measure_ranks(workload, ranks)
        beyond = max(peaks) - sgd["peak"]
        rows.append(
            {
                "name": workload.name,
                "ranks": ranks,
                "parameters_bytes": sgd["gradients"],
                "sgd_peak_bytes": sgd["peak"],
                "beyond_sgd_bytes": beyond,
                "copies": beyond / sgd["gradients"],
                "rank_peak_bytes": peaks,
            }
        )
    return {"rows": rows, "environment": environment()}


def measure_ranks(workload: Workload, ranks: int) -> list[int]:
    """Return the peak of each rank's process, in bytes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="asyncprop-bench-") as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_live, args=(workload, rank, ranks, Path(folder) / "meet", theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [pipe.recv() for pipe in pipes]
        except EOFError:
            raise RuntimeError(f"a rank that trained {workload.name} has failed: see above") from None
        finally:
            for process in processes:
                process.kill()
                process.join()


def _live(workload: Workload, rank: int, ranks: int, meet: Path, pipe: Connection) -> None:
    from torch import distributed

    from asyncprop import Decoupled, Engine
    from asyncprop.exchange import LayerGossip

    give_memory_back()
    set_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    trained, batches = workload.make(), workload.batches()
    workers = Decoupled(1, 1, lanes=1, intraop_threads=1)
    with Engine(trained.model, trained.optimizer, trained.loss, workers=workers, exchange=LayerGossip()) as engine:
        for _ in engine.run(next(batches) for _ in range(BATCHES)):
            pass
        engine.settle()
        pipe.send(peak_bytes())
        pipe.poll(None)  # until the benchmark is over: the others may still gossip
