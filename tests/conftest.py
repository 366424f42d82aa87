"""Every test runs on one intra-op thread, and fails if it leaves a thread behind."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: they run beside each other


@pytest.fixture(autouse=True)
def _one_intraop_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncprop")]
    assert not left
