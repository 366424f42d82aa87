"""Faults: real processes that are killed, frozen, replaced and stopped. Every wait is for a line that must come."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from processes import command, place, rows


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with three ranks; kill the first and let it be replaced; freeze another, and let it go on; stop."""
    out = tmp_path_factory.mktemp("faults") / "run"
    with command(
        "digits", "--method", "layup", "--ranks", "3", "--replacements", "1", "--timeout-s", "1", "--epochs", "100000",
        "--batch-size", "8", "--lr", "0.02", "--out", str(out),
    ) as train:  # fmt: skip
        train.read_epochs(1)
        os.kill(train.pid_of(0), signal.SIGKILL)
        train.read_until(lambda line: "rank 0 was ended by SIGKILL: the others go on" in line)
        train.read_until(lambda line: "rank 1: rank 0 was ended by SIGKILL: going on without it" in line)
        train.read_epochs(2)  # of another rank, which now is the first
        train.read_until_trained_by(out, 3)
        frozen = train.pid_of(2)
        os.kill(frozen, signal.SIGSTOP)
        train.read_until(lambda line: "rank 1: rank 2 was not heard of for 1 s: going on without it" in line)
        train.read_epochs(2)
        os.kill(frozen, signal.SIGCONT)
        train.read_until_trained_by(out, 2)
        assert train.stop() == 128 + signal.SIGTERM, "".join(train.lines)
    return out


def test_the_others_go_on_and_so_does_the_run_s_folder(out: Path) -> None:
    steps, epochs = rows(out), rows(out, "epochs")
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert [row["epoch"] for row in epochs] == list(range(1, len(epochs) + 1))
    assert {row["rank"] for row in steps} == {0, 1, 2, 3}
    assert epochs[-1]["test_metric"] > 0.5  # how many epochs there were is a matter of time


def test_an_epoch_uses_each_batch_once_but_for_what_a_fault_took_with_it(out: Path) -> None:
    batches = 1437 // 8
    counts: dict[int, int] = {}
    for row in rows(out):
        counts[row["epoch"]] = counts.get(row["epoch"], 0) + 1
    done = [counts[epoch] for epoch in sorted(counts)][:-1]  # the last was stopped
    assert max(done) == batches
    assert sum(count == batches for count in done) >= len(done) - 4


def test_it_goes_on_with_another_number_of_ranks_and_ends_with_one_that_has_joined(out: Path) -> None:
    before = len(rows(out))
    with command("--resume", str(out), "--ranks", "2") as train:
        address = train.read_until(lambda line: "another joins them by" in line).split()[-1]
        train.read_epochs(2)
        assert {row["rank"] for row in rows(out)[before:]} == {0, 1}
        with command("--join", address) as guest:
            train.read_until_trained_by(out, 2)
            assert guest.stop() == 128 + signal.SIGTERM, "".join(guest.lines)
            train.read_until(lambda line: "rank 0: rank 2 leaves: going on without it" in line)
        with command("--join", address, "--quiet") as joined:
            train.read_until_trained_by(out, 3)
            assert train.stop() == 128 + signal.SIGTERM, "".join(train.lines)
            assert joined.read_to_the_end() == 128 + signal.SIGINT, "".join(joined.lines)
    steps = rows(out)
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert guest.lines[0].startswith("rank 2 has joined: digits by layup, epoch ")
    assert guest.lines[-1].endswith(" batches: the others go on\n")
    assert "rank 0: rank 2 joins\n" in train.lines
    assert joined.lines == [f"asyncprop: rank 3: stopped after {len(steps)} batches\n"]


def test_a_run_of_which_a_rank_was_killed_is_finished_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with command(
        "digits", "--method", "layup", "--ranks", "2", "--epochs", "20", "--train-samples", "512", "--lr", "0.02",
        "--out", str(out),
    ) as train:  # fmt: skip
        train.read_epochs(1)
        os.kill(train.pid_of(1), signal.SIGKILL)
        assert train.read_to_the_end() == 0, "".join(train.lines)
    assert "rank 0: rank 1 was ended by SIGKILL: going on without it\n" in train.lines
    result = json.loads((out / "result.json").read_text())
    assert (result["epochs"], result["ranks"], result["ranks_lost"]) == (20, 1, [1])


def test_a_folder_that_is_refused_is_said_once_without_a_launcher_too(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as free:
        store = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ("digits", "--method", "layup", "--quiet", "--out", str(tmp_path))
    ranks = [command(*arguments, environment=place(rank, 2, store)) for rank in range(2)]
    with ranks[0] as holder, ranks[1] as other:
        assert holder.read_to_the_end() == other.read_to_the_end() == 2
    assert "asyncprop: out must be a new or empty folder" in "".join(holder.lines)
    assert "asyncprop: " not in "".join(other.lines)
    assert "Traceback" not in "".join(holder.lines + other.lines)


def test_a_folder_that_is_refused_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with command("digits", "--method", "layup", "--ranks", "3", "--quiet", "--out", str(tmp_path)) as train:
        assert train.read_to_the_end() == 2
    said = [line for line in train.lines if "asyncprop: " in line]
    assert len(said) == 1, "".join(train.lines)
    assert said[0].startswith("asyncprop: out must be a new or empty folder")
    assert "Traceback" not in "".join(train.lines)
