"""Every method on every kind of task: a new row in either table is tested here without another line."""

from pathlib import Path

import pytest

from asyncprop.config import TrainConfig
from asyncprop.methods import METHODS
from asyncprop.methods.session import Session
from asyncprop.methods.train import train
from asyncprop.progress import Quiet
from asyncprop.runs import create_run
from asyncprop.tasks import TASKS

# Tasks whose data are made on the spot, of every shape; those of files are the same models on other data.
MADE = [
    name for name, task in TASKS.items() if task.dataset == "synthetic" and name != "synthetic-imagenet"
]  # too slow
NARROW = {"synthetic-images": 2, "synthetic-vectors": 8}


@pytest.mark.parametrize("task", MADE)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_kind_of_model(tmp_path: Path, method: str, task: str) -> None:
    config = TrainConfig(
        task=task, method=method, epochs=2, batch_size=4, train_samples=24, test_samples=8, width=NARROW.get(task, 16),
        warm_up_batches=2,
    )  # fmt: skip
    with create_run(tmp_path / "run", config) as run:
        result = train(Session(config), run, Quiet())
    assert (result["epochs"], result["samples"]) == (2, 48)
    assert all(row["test_loss"] < 1e3 for row in result["history"])
