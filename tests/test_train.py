"""Train: the one loop of all methods; stopping, resuming, and what a run tells."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from asyncprop.config import TrainConfig
from asyncprop.devices import available_cores
from asyncprop.engine import NonFiniteError
from asyncprop.methods import METHODS
from asyncprop.methods.session import Session
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.methods.train import Interrupted, train
from asyncprop.progress import Quiet
from asyncprop.runs import create_run, open_run
from asyncprop.testing import TINY, cross_entropy, plain_loop, same_state, twins
from asyncprop.trace import Step, Trace


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"task": "digits", "epochs": 2, "train_samples": 320, "test_samples": 100, **options})


def run_all(path: Path, given: TrainConfig) -> tuple[dict[str, Any], Session]:
    session = Session(given)
    with create_run(path, given) as run:
        return train(session, run, Quiet()), session


EPOCHS = 8


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_reports(method: str, tmp_path: Path) -> None:
    result, session = run_all(tmp_path / "run", config(method=method, epochs=EPOCHS, lr=0.05, target=0.5))
    assert result["best_metric"] > 0.5
    assert result["epochs_to_target"] is not None
    assert (result["epochs"], result["samples"]) == (EPOCHS, EPOCHS * 320)
    workers = METHODS[method].workers
    if workers is None or workers.lanes_on(available_cores()) == 1:
        assert result["mean_staleness"] == 0.0
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(10 * EPOCHS))
    assert [row["epoch"] for row in result["history"]] == list(range(1, EPOCHS + 1))
    assert result["best_metric"] == max(row["test_metric"] for row in result["history"])
    assert session.position.samples == EPOCHS * 320


@pytest.mark.parametrize("batches", [4, 0])
def test_the_machine_s_limit_is_measured_in_the_warm_up(batches: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    result, session = run_all(tmp_path / "run", config(warm_up_batches=batches))
    assert torch.get_num_threads() == before
    assert result["limit_samples_per_s"] == session.limit_samples_per_s
    assert (session.limit_samples_per_s or 0.0) > 0 if batches else session.limit_samples_per_s is None


def test_the_loop_of_sgd_is_the_plain_loop() -> None:
    ours, theirs = twins(TINY["mlp"].seeded_model())
    batches = TINY["mlp"].batches(5)
    make = lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    with SequentialLoop(ours, make(ours), cross_entropy) as trainer:
        losses = [step.loss for step in trainer.run(batches)]
        assert trainer.statistics().batches == 5
    assert losses == plain_loop(theirs, make(theirs), batches)
    assert same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_in_lockstep_every_method_equals_sgd(method: str, tmp_path: Path) -> None:
    runs = [run_all(tmp_path / str(n), config(method=name, turn="lockstep")) for n, name in enumerate(("sgd", method))]
    assert same_state(runs[0][1].model.state_dict(), runs[1][1].model.state_dict())
    assert runs[0][0]["best_metric"] == runs[1][0]["best_metric"]


def test_warming_up_changes_nothing(tmp_path: Path) -> None:
    cold, warm = (
        run_all(tmp_path / str(n), config(turn="lockstep", warm_up_batches=n))[1].model.state_dict() for n in (0, 3)
    )
    assert same_state(cold, warm)


@pytest.mark.parametrize("stop_after", [1, 7, 10, 13])
def test_stopped_and_resumed_in_lockstep_equals_uninterrupted(tmp_path: Path, stop_after: int) -> None:
    given = config(turn="lockstep", checkpoint_every=1e-6)  # a checkpoint after every batch
    whole, uninterrupted = run_all(tmp_path / "whole", given)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * stop_after  # asked twice a batch

    with create_run(tmp_path / "part", given) as run, pytest.raises(Interrupted):
        train(Session(given), run, Quiet(), stop)
    session = Session(given, tmp_path / "part" / "checkpoint")
    assert 0 < session.position.steps < 20
    with open_run(tmp_path / "part") as run:
        resumed = train(session, run, Quiet())
    assert same_state(session.model.state_dict(), uninterrupted.model.state_dict())
    assert [row["test_loss"] for row in resumed["history"]] == [row["test_loss"] for row in whole["history"]]
    steps = [
        [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in file.read_text().splitlines()]
        for file in (tmp_path / "whole" / "steps.jsonl", tmp_path / "part" / "steps.jsonl")
    ]
    assert steps[0] == steps[1]


class Noted(Quiet):
    """Keeps the Steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_step(self, session: Session, step: Step) -> None:
        self.steps.append(step)


def test_a_resumed_run_goes_on_in_the_phase_that_it_was_in(tmp_path: Path) -> None:
    """Of a pass that writes one worker's block only, the other worker's layers have no staleness."""
    given = config(method="passm", workers=2, prepass_epochs=1, epochs=3)
    session, first, second = Session(given), Noted(), Noted()
    with create_run(tmp_path / "run", given) as run, pytest.raises(Interrupted):
        train(session, run, first, lambda: session.position.epoch == 1)
    with open_run(tmp_path / "run") as run:
        train(Session(given, tmp_path / "run" / "checkpoint"), run, second)
    assert 10 < len(first.steps) < 20
    assert len(first.steps) + len(second.steps) == 30
    assert not any(-1 in step.staleness for step in first.steps[:10])
    assert all(-1 in step.staleness for step in [*first.steps[10:], *second.steps])


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "asyncprop", "train", "digits", "--out", str(folder), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_lines(process: subprocess.Popen[str], count: int) -> None:
    """Read the process's progress: a line at its start, then one per epoch, each after a checkpoint."""
    assert process.stderr
    for _ in range(count):
        assert process.stderr.readline()


@pytest.mark.parametrize("turn", ["lockstep", "free"])
def test_killed_and_resumed(tmp_path: Path, turn: str) -> None:
    options = ("--turn", turn, "--epochs", "150", "--train-samples", "64", "--test-samples", "20")
    process = start(tmp_path / "run", *options)
    wait_for_lines(process, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, "-m", "asyncprop", "train", "--resume", str(tmp_path / "run"), "--quiet"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "best accuracy" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(300))
    epochs = [row["epoch"] for row in steps]
    assert all(epochs.count(epoch) == 2 for epoch in range(150))
    if turn == "lockstep":
        whole = start(tmp_path / "whole", *options)
        whole.communicate()
        ours, theirs = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("run", "whole"))
        assert same_state(ours, theirs)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--epochs", "100000")
    wait_for_lines(process, 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"to go on: asyncprop train --resume {tmp_path / 'run'}" in errors
    position = json.loads((tmp_path / "run" / "checkpoint" / "position.json").read_text())
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert position["steps"] == len(lines) > 0


def test_a_failing_run_ends_with_its_cause(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--lr", "1e30", "--epochs", "3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in errors
    assert errors.strip().splitlines()[-1].startswith("asyncprop: the run failed: NonFiniteError: the loss of batch")


@pytest.mark.parametrize("method", ["sgd", "async-lu"])
def test_a_failed_run_leaves_the_trace_of_what_led_to_it(method: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        run_all(tmp_path / "run", config(method=method, lr=1e30, trace=True, warm_up_batches=0))
    assert "forward" in {event.kind for event in Trace.load(tmp_path / "run" / "trace.jsonl").events}


def test_a_trace_that_cannot_be_saved_hides_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(trace: Trace, path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Trace, "save", full)
    with pytest.raises(NonFiniteError) as failure:
        run_all(tmp_path / "run", config(lr=1e30, trace=True, warm_up_batches=0))
    assert failure.value.__notes__ == ["the trace could not be saved: no space left on device"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mnist"}, "task must be one of"),
        ({"method": "adam"}, "method must be one of"),
        ({"method": "sgd", "lanes": 2}, "lanes must not be given for method sgd"),
        ({"batch_size": 1000}, "batch_size must be from 1 to 320"),
        ({"device": "cuda"}, "device must be one that this machine has"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match=message):
        Session(config(**options))


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from asyncprop.tasks import TASKS

    task = TASKS["digits"]
    monkeypatch.setitem(TASKS, "digits", replace(task, recipe=replace(task.recipe, early_stopping_epochs=2)))
    result, _ = run_all(tmp_path / "run", config(epochs=50, lr=1e-12))
    assert result["epochs"] == result["best_epoch"] + 2 < 50
