"""Progress: a live line on a terminal, plain lines elsewhere, nothing if quiet."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncprop.config import TrainConfig
from asyncprop.methods.session import Session
from asyncprop.methods.train import train
from asyncprop.progress import All, Lines, Quiet, progress_on, result_line
from asyncprop.runs import create_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(stream: io.StringIO, folder: Path, *, quiet: bool = False) -> str:
    config = TrainConfig(task="digits", epochs=2, train_samples=320, test_samples=50)
    observer = progress_on(stream, quiet=quiet)
    with create_run(folder, config) as run:
        train(Session(config), run, observer)
    observer.close()
    return stream.getvalue()


def test_plain_lines(tmp_path: Path) -> None:
    lines = said(io.StringIO(), tmp_path / "run").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("digits by async-lu: MLP")
    assert lines[1].startswith("epoch 1/2  loss ")
    assert "accuracy" in lines[1]
    assert "staleness" in lines[1]
    assert "% of an estimated limit of " in lines[1]
    assert lines[2].endswith("0 s left")


def test_a_rank_that_has_joined_says_what_it_trains() -> None:
    stream, places = io.StringIO(), {"world": SimpleNamespace(rank=2), "position": SimpleNamespace(epoch=2)}
    session: Any = SimpleNamespace(config=TrainConfig(task="digits", method="layup"), epochs=20, **places)
    All(Quiet(), Lines(stream)).on_join(session)
    assert stream.getvalue() == "rank 2 has joined: digits by layup, epoch 3/20\n"


def test_a_terminal_has_a_live_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncprop.progress.REFRESH_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    text = said(Terminal(), tmp_path / "run")
    assert "\x1b[" in text
    assert "samples/s" in text
    assert "epoch 2/2" in text


def test_quiet(tmp_path: Path) -> None:
    assert said(Terminal(), tmp_path / "run", quiet=True) == ""


def test_a_result_in_one_line() -> None:
    result = {
        "metric": "accuracy", "best_metric": 0.5, "best_epoch": 2, "target": 0.9, "time_to_target_s": None,
        "train_s": 3.0, "samples_per_s": 1000.0, "mean_staleness": 0.25, "peak_memory_bytes": 2**21,
    }  # fmt: skip
    assert result_line(result) == (
        "best accuracy 0.5000 (epoch 2), target 0.9 not reached, 3.0 s of training, 1,000 samples/s, "
        "staleness 0.25, peak memory 2 MiB"
    )
