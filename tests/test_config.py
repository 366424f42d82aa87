"""Configuration: the command line over the file over the defaults; what is wrong is said in one line."""

from pathlib import Path

import pytest

from asyncprop.config import CompareConfig, SimulateConfig, TrainConfig, resolve, to_toml


def test_given_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('task = "digits"\nepochs = 3\nbatch-size = 16\n')
    config = resolve(TrainConfig, {"epochs": 5}, file)
    assert (config.task, config.epochs, config.batch_size, config.seed, config.lr) == ("digits", 5, 16, 0, None)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig(task='a"b\\c\n', lr=1e-7, data_dir=Path("/x y"), turn="lockstep", epochs=2)
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert resolve(TrainConfig, {}, tmp_path / "c.toml") == config


def test_ranks_of_a_simulation_are_described_as_replicas() -> None:
    described = {kind: str(kind.model_fields["ranks"].description) for kind in (TrainConfig, SimulateConfig)}
    assert described[TrainConfig].startswith("Processes on this machine")
    assert described[SimulateConfig].startswith("Replicas that train together")
    assert "Default: one on each device" in described[SimulateConfig]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "task must be given"),
        ({"task": "digits", "epochs": 0}, r"epochs must be >= 1 \(got 0\)"),
        ({"task": "digits", "lr": -1}, r"lr must be > 0 \(got -1\)"),
        ({"task": "digits", "lr": "nan"}, "lr must be a finite number"),
        ({"task": "digits", "momentum": 1.0}, r"momentum must be < 1 \(got 1.0\)"),
        ({"task": "digits", "device": "tpu"}, "device must be of the form"),
        ({"task": "digits", "turn": "x"}, "turn must be 'free', 'lockstep' or 'ordered'"),
        ({"task": "digits", "epoch": 3}, "epoch is no option here: the options are epochs"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(TrainConfig, given, None)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config must be a readable file"):
        resolve(TrainConfig, {}, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(ValueError, match="config must be TOML"):
        resolve(CompareConfig, {}, tmp_path / "bad.toml")
