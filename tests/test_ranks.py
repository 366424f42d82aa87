"""Several ranks: every method on two of them, and what happens when one dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from asyncprop.methods import METHODS
from asyncprop.testing import TINY, plain_loop
from processes import command

ON_RANKS = [name for name, row in METHODS.items() if row.workers is not None or row.exchange is not None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, ranks.__file__, str(out)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*ON_RANKS, "fp16", "powersgd", *map("stopped {}".format, ranks.STOPPED)])
def test_ranks_learn_together_and_end_equal(found: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    out, (first, second) = found
    assert first[name]["parameters"] == second[name]["parameters"]
    result = first[name]["result"]
    assert result["best_metric"] > 0.3  # chance is 0.1; how far six epochs come depends on who comes first
    assert result["ranks"] == 2
    steps = [json.loads(line) for line in (out / name.replace(" ", "-") / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert {row["rank"] for row in steps} == {0, 1}
    in_step = name.split()[-1] in ("fp16", "powersgd") or METHODS[name.split()[-1]].workers is None
    batches = 10 if in_step else 11  # in step, a batch that is left over is left out
    epochs = [row["epoch"] for row in steps]
    assert [epochs.count(epoch) for epoch in range(ranks.EPOCHS)] == [batches] * ranks.EPOCHS
    assert result["samples"] == 32 * batches * ranks.EPOCHS


@pytest.mark.parametrize("method", ranks.STOPPED)
def test_a_stopped_run_goes_on_where_it_was(found: tuple[Path, list[dict[str, Any]]], method: str) -> None:
    _, both = found
    at = {rank[f"stopped {method}"]["resumed_at"] for rank in both}
    assert len(at) == 1
    assert 0 < at.pop() < 11


def test_settling_gives_the_mean(found: tuple[Path, list[dict[str, Any]]]) -> None:
    means = []
    for rank in range(2):
        model = TINY["resnet"].seeded_model()
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.05), TINY["resnet"].batches(3, seed=rank))
        means.append(torch.tensor(ranks.parameters(model)))
    for rank in found[1]:
        assert torch.allclose(torch.tensor(rank["settled"]), sum(means) / 2, atol=1e-6)


def test_ranks_that_average_often_end_equal(found: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = found[1]
    assert first["averaged often"] == second["averaged often"]


def test_what_workers_write_during_a_round_survives(found: tuple[Path, list[dict[str, Any]]]) -> None:
    # Ranks have 0 and 1; both add 1 while the round is under way; the mean of what was there is 0.5.
    assert [rank["survives"] for rank in found[1]] == [[1.5], [1.5]]


def test_different_models_are_refused(found: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all("model must be the same on all ranks" in rank["refused"] for rank in found[1])


def test_a_hook_that_needs_cuda_is_refused_without(found: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all("comm_hook bf16 needs a CUDA device" in rank["bf16"] for rank in found[1])


def test_a_rank_that_dies_ends_the_run(tmp_path: Path) -> None:
    with command(
        "digits", "--ranks", "2", "--method", "lapsgd", "--epochs", "100000", "--out", str(tmp_path / "run")
    ) as train:
        train.read_epochs(1)
        os.kill(train.pid_of(1), signal.SIGKILL)
        assert train.read_to_the_end() == 1
    assert "rank 1 failed first" in train.lines[-1] or "rank 0: the run failed" in "".join(train.lines)


def test_ranks_that_must_all_live_are_asked_to_end(tmp_path: Path) -> None:
    with command(
        "digits", "--ranks", "2", "--method", "ddp", "--epochs", "100000", "--out", str(tmp_path / "run")
    ) as train:
        train.read_epochs(1)
        assert train.stop() == 128 + signal.SIGTERM, "".join(train.lines)
    said = "".join(train.lines)
    assert f"to go on: asyncprop train --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
