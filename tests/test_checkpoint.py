"""Checkpoint: whole or not at all, whenever the process dies."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import asyncprop.checkpoint as module
from asyncprop.checkpoint import Position, load_checkpoint, rank_state, save_checkpoint
from asyncprop.testing import TINY, plain_loop, same_state
from asyncprop.trace import Step


def trained(batches: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = TINY["resnet"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain_loop(model, optimizer, TINY["resnet"].batches(batches))
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    position = Position(epoch=1, batch=2, steps=3, samples=12, history=[{"epoch": 1, "test_metric": 0.5}])
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "checkpoint", model, [rank_state(optimizer, {"blocks": [["a"]]})], position)
    expected = torch.rand(3)
    other, its_optimizer = trained(1)
    assert load_checkpoint(tmp_path / "checkpoint", other, its_optimizer) == (position, {"blocks": [["a"]]})
    assert same_state(other.state_dict(), model.state_dict())
    assert same_state(its_optimizer.state_dict(), optimizer.state_dict())
    assert torch.equal(torch.rand(3), expected)


def test_only_the_last_one_is_kept(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for steps in range(3):
        save_checkpoint(tmp_path / "checkpoint", model, [rank_state(optimizer, {})], Position(steps=steps))
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
    save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=1))
    home, _, name = stage.rpartition(".")
    owner = {"": module, "torch": torch, "Path": Path, "shutil": module.shutil}[home]
    # Old folders are removed last of all: by then the new checkpoint stands.
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        if stage == "shutil.rmtree":
            patch.setattr(owner, name, lambda path, **_: die() if Path(path).exists() else None)
        with pytest.raises(Killed):
            save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=2))
    found, _ = load_checkpoint(link, *trained(2))
    assert found.steps == (2 if stage == "shutil.rmtree" else 1)
    save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=2))
    assert load_checkpoint(link, *trained(1))[0].steps == 2


def test_dying_at_the_same_position_again_leaves_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a run is stopped right after it was resumed."""
    model, optimizer = trained(1)
    link = tmp_path / "checkpoint"
    save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=1))

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_model", die)
        save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=1))
    assert load_checkpoint(link, *trained(2))[0].steps == 1
    for samples in (4, 5):
        save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=1, samples=samples))
        assert load_checkpoint(link, *trained(2))[0].samples == samples
    assert len(list(tmp_path.iterdir())) == 2


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


@pytest.mark.parametrize("stage", ["save_model", "torch.save", "Path.symlink_to", "_sync"])
@pytest.mark.parametrize("steps", [1, 2])
def test_who_hung_while_it_wrote_leaves_what_others_wrote_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, steps: int
) -> None:
    """The other writes the same position as the one that hangs, and perhaps a later one, and goes on with a next."""
    model, optimizer = trained(1)
    states, link = [rank_state(optimizer, {})], tmp_path / "checkpoint"
    home, _, name = stage.rpartition(".")
    owner = {"": module, "torch": torch, "Path": Path}[home]
    original = getattr(owner, name)

    def hang(*args: object, **kwargs: object) -> object:
        monkeypatch.setattr(owner, name, original)
        for step in range(1, steps + 1):
            save_checkpoint(link, model, states, Position(steps=step))
        (tmp_path / "checkpoint-000000003-00000").mkdir()  # and is at the next
        return original(*args, **kwargs)

    save_checkpoint(link, model, states, Position(steps=0))
    monkeypatch.setattr(owner, name, hang)
    save_checkpoint(link, model, states, Position(steps=1))
    assert load_checkpoint(link, *trained(2))[0].steps == steps
    current = link.resolve().name
    assert current > "checkpoint-000000001-00000"
    assert folders(tmp_path) == [current, "checkpoint-000000003-00000"]
    assert [path.name for path in tmp_path.iterdir() if path.is_symlink()] == ["checkpoint"]


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(1)
    link = tmp_path / "checkpoint"
    save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=1))

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(link, model, [rank_state(optimizer, {})], Position(steps=2))
    assert load_checkpoint(link, *trained(2))[0].steps == 1


def test_the_folder_s_name_is_on_the_disk_before_the_link_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace_link = module._sync, Path.replace
    monkeypatch.setattr(module, "_sync", lambda path: (done.append(path.name), sync(path))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append("the link"), replace_link(path, to))[1])
    model, optimizer = trained(1)
    save_checkpoint(tmp_path / "checkpoint", model, [rank_state(optimizer, {})], Position())
    assert done[-4:] == ["checkpoint-000000000-00000", tmp_path.name, "the link", tmp_path.name]


def test_of_another_model_or_none_at_all(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    with pytest.raises(ValueError, match="resume must be a run with a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    save_checkpoint(tmp_path / "checkpoint", model, [rank_state(optimizer, {})], Position())
    other = TINY["mlp"].model()
    with pytest.raises(ValueError, match="must be a checkpoint of this model"):
        load_checkpoint(tmp_path / "checkpoint", other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_each_rank_has_its_own_optimizer_back(tmp_path: Path) -> None:
    first, second = trained(1), trained(3)
    states = [rank_state(first[1], {}), rank_state(second[1], {"blocks": []})]
    save_checkpoint(tmp_path / "checkpoint", first[0], states, Position())
    for rank, expected in ((0, first), (1, second), (2, first)):  # a rank that was not there begins as the first
        model, optimizer = trained(2)
        _, state = load_checkpoint(tmp_path / "checkpoint", model, optimizer, rank=rank)
        assert same_state(optimizer.state_dict(), expected[1].state_dict())
        assert same_state(model.state_dict(), first[0].state_dict())
        assert state == ({"blocks": []} if rank == 1 else {})


class OnDevice(torch.Tensor):
    """A tensor of another device."""

    def cpu(self) -> torch.Tensor:
        return torch.zeros(1)


def test_what_is_kept_of_a_rank_is_on_the_cpu() -> None:
    """The first rank reads all ranks' states: its GPU has no room for them."""
    model, optimizer = trained(1)
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].as_subclass(OnDevice)
    kept = rank_state(optimizer, {"private": [{"momentum": torch.ones(1).as_subclass(OnDevice)}], "blocks": (("a",),)})
    assert {type(state["momentum_buffer"]) for state in kept["optimizer"]["state"].values()} == {torch.Tensor}
    assert type(kept["trainer"]["private"][0]["momentum"]) is torch.Tensor
    assert kept["trainer"]["blocks"] == (("a",),)
    assert len(kept["optimizer"]["state"]) == len(list(model.parameters()))


def test_a_machine_with_fewer_gpus_restores_those_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(1)
    state = rank_state(optimizer, {})
    state["random"]["cuda"] = [torch.full((2,), gpu, dtype=torch.uint8) for gpu in range(3)]
    save_checkpoint(tmp_path / "checkpoint", model, [state], Position())
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    assert [int(state[0]) for state in restored] == [0, 1]


def test_positions_of_ranks_are_added_up() -> None:
    before = Position(epoch=1, batch=3, steps=10, samples=100, staleness=5.0, loss=2.0, epoch_steps=4)
    ranks = [replace(before) for _ in range(2)]
    for position, batches in zip(ranks, (1, 3), strict=True):
        for index in range(batches):
            position.add(Step(index=index, loss=0.5, batch_size=8, staleness=(1, 1)))
    ranks[0].add_up(before, ranks)
    assert (ranks[0].steps, ranks[0].samples, ranks[0].staleness, ranks[0].loss) == (14, 132, 9.0, 4.0)
