"""Launch: starts several ranks of the command on this machine, by torch's own elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from asyncprop.devices import available_cores


def launch(ranks: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Run `asyncprop ARGUMENTS` in so many processes, and wait for them. If one fails, the others are ended.

    Returns:
        The exit code: 0, or that of the rank that failed first; and what to say of it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank tells its own failure
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "asyncprop", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return (failure.exitcode if failure.exitcode > 0 else 1), f"rank {rank} failed first"
    return 0, ""


def is_rank() -> bool:
    """Tell whether this process is one of several that torch's launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
