"""Checkpoint: whole or not at all, whenever the process dies."""

from pathlib import Path

import pytest
import torch

import asyncprop.checkpoint as module
from asyncprop.checkpoint import Position, load_checkpoint, save_checkpoint
from asyncprop.testing import TINY, plain_loop, same_state


def trained(batches: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = TINY["resnet"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain_loop(model, optimizer, TINY["resnet"].batches(batches))
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    position = Position(epoch=1, batch=2, steps=3, samples=12, history=[{"epoch": 1, "test_metric": 0.5}])
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, position)
    expected = torch.rand(3)
    other, its_optimizer = trained(1)
    assert load_checkpoint(tmp_path / "checkpoint", other, its_optimizer) == position
    assert same_state(other.state_dict(), model.state_dict())
    assert same_state(its_optimizer.state_dict(), optimizer.state_dict())
    assert torch.equal(torch.rand(3), expected)


def test_only_the_last_one_is_kept(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for steps in range(3):
        save_checkpoint(tmp_path / "checkpoint", model, optimizer, Position(steps=steps))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint-000000002-00000"]


STAGES = ["save_model", "torch.save", "_sync", "Path.symlink_to", "Path.replace", "shutil.rmtree"]


@pytest.mark.parametrize("stage", STAGES)
def test_dying_at_any_stage_leaves_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    class Killed(BaseException):
        pass

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    model, optimizer = trained(1)
    link = tmp_path / "checkpoint"
    save_checkpoint(link, model, optimizer, Position(steps=1))
    home, _, name = stage.rpartition(".")
    owner = {"": module, "torch": torch, "Path": Path, "shutil": module.shutil}[home]
    # Old folders are removed last of all: by then the new checkpoint stands.
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        if stage == "shutil.rmtree":
            patch.setattr(owner, name, lambda path, **_: die() if Path(path).exists() else None)
        with pytest.raises(Killed):
            save_checkpoint(link, model, optimizer, Position(steps=2))
    found = load_checkpoint(link, *trained(2))
    assert found.steps == (2 if stage == "shutil.rmtree" else 1)
    save_checkpoint(link, model, optimizer, Position(steps=2))
    assert load_checkpoint(link, *trained(1)).steps == 2


def test_of_another_model_or_none_at_all(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    with pytest.raises(ValueError, match="resume must be a run with a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Position())
    other = TINY["mlp"].model()
    with pytest.raises(ValueError, match="must be a checkpoint of this model"):
        load_checkpoint(tmp_path / "checkpoint", other, torch.optim.SGD(other.parameters(), lr=0.1))
