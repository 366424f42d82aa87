"""Tasks: every row trains on what it promises, recipes are the paper's, batches are those of seed and epoch."""

import math
from pathlib import Path

import pytest
import torch

from asyncprop.tasks import TASKS, Batches, get_task, recipes
from asyncprop.tasks.batches import crop_and_flip, subset
from asyncprop.tasks.memory import Sequences, Tensors, synthetic_vectors

HERE = ["digits", "synthetic-images", "synthetic-text", "synthetic-characters", "synthetic-vectors"]


@pytest.mark.parametrize("name", HERE)
def test_every_task_that_needs_no_download_trains(name: str) -> None:
    task = get_task(name)
    split = task.load(train_samples=16, test_samples=8)
    model = task.build(width=8)
    loss = task.loss(model, next(iter(Batches(split.train, 8, seed=0, epoch=0))))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    score = task.evaluate(model, split.test)
    assert score.samples == 8
    assert 0 <= score.metric <= 1
    assert math.isfinite(score.loss)
    assert model.training


@pytest.mark.parametrize("name", TASKS)
def test_every_task_builds_the_same_model_for_a_seed(name: str) -> None:
    task = TASKS[name]
    before = torch.get_rng_state()
    first, again, other = (task.build(width=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert 0 < task.target <= 1


def test_evaluation_counts_right_predictions() -> None:
    class Echo(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    score = TASKS["digits"].evaluate(Echo(), Tensors((logits, torch.tensor([0, 1, 2, 0, 1]))), batch_size=2)
    assert (score.metric, score.samples) == (0.6, 5)


def test_unknown_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="task must be one of digits"):
        get_task("mnist")
    with pytest.raises(ValueError, match="asyncprop data fetch rotten-tomatoes"):
        get_task("rotten-tomatoes").load()
    with pytest.raises(ValueError, match="data-dir must be given for cifar10"):
        get_task("cifar10").load()
    with pytest.raises(ValueError, match="data-dir must be a folder"):
        get_task("cifar10").load(data_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="train_samples must be from 1 to 1437"):
        get_task("digits").load(train_samples=5000)


# ---- recipes


def test_table_10_of_the_paper() -> None:
    rows = {name: TASKS[name].recipe for name in ("cifar10", "cifar100", "cifar100-resnet50", "imagenet", "imdb")}
    assert [(r.lr, r.batch_size, r.t_max, r.warmup_epochs, r.warmup_lr, r.weight_decay) for r in rows.values()] == [
        (0.015, 128, 105, 3, 0.005, 0.005),
        (0.015, 128, 100, 5, 0.005, 0.005),
        (0.015, 128, 120, 5, 0.005, 0.005),
        (0.015, 250, 250, 5, 0.0035, 0.0035),
        (0.001, 75, 150, 0, 0.0, 0.0),
    ]
    assert all(recipe.early_stopping_epochs == 30 for recipe in rows.values())
    assert rows["imdb"].optimizer == "adam"


def test_the_learning_rate_is_a_function_of_samples() -> None:
    recipe = recipes.Recipe(10, 5, "sgd", lr=0.4, warmup_epochs=2, warmup_lr=0.1)
    at = lambda epoch, **options: recipe.lr_at(int(epoch * 100), samples_per_epoch=100, epochs=10, **options)  # noqa: E731
    assert [at(0), at(1), at(2)] == pytest.approx([0.1, 0.25, 0.4])
    assert at(6) == pytest.approx(0.2)
    assert at(10) == pytest.approx(0.0)
    assert at(1, lr=0.8) == pytest.approx(0.5)
    constant = recipes.Recipe(10, 5, "sgd", lr=0.4, warmup_epochs=2, warmup_lr=0.1, warmup="constant")
    assert constant.lr_at(199, samples_per_epoch=100, epochs=10) == pytest.approx(0.1)


# ---- batches


def test_an_epoch_uses_every_sample_once_and_resumes_where_it_stopped() -> None:
    data = Tensors((torch.arange(23.0), torch.arange(23)))
    whole = list(Batches(data, 5, seed=1, epoch=2))
    assert len(whole) == 4
    assert len({int(label) for _, labels in whole for label in labels}) == 20
    assert sum(len(labels) for _, labels in Batches(data, 5, seed=1, epoch=2, drop_last=False)) == 23
    rest = list(Batches(data, 5, seed=1, epoch=2, start=3))
    assert all(torch.equal(a, b) for a, b in zip(rest[0], whole[3], strict=True))
    other = next(iter(Batches(data, 5, seed=1, epoch=3)))
    assert not torch.equal(other[1], whole[0][1])


def test_augmentation_does_not_depend_on_where_an_epoch_was_resumed() -> None:
    data = Tensors((torch.randn(12, 1, 8, 8), torch.arange(12)), augment=True)
    whole = list(Batches(data, 4, seed=0, epoch=0))
    rest = list(Batches(data, 4, seed=0, epoch=0, start=1))
    assert torch.equal(rest[0][0], whole[1][0])
    assert not torch.equal(whole[0][0], data.batch(whole[0][1], None)[0])


def test_batches_made_in_processes_are_the_same() -> None:
    data = synthetic_vectors(20, 1, size=3, classes=2).train
    here, there = (list(Batches(data, 5, seed=0, epoch=0, workers=workers)) for workers in (0, 1))
    assert all(torch.equal(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))


def slow_crop_and_flip(images, generator, padding=4):
    """One image after the other, with the same draws."""
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    out = torch.empty_like(images)
    for index in range(count):
        padded = torch.nn.functional.pad(images[index], (padding,) * 4)
        row, column = int(top[index]), int(left[index])
        crop = padded[:, row : row + height, column : column + width]
        out[index] = crop.flip(2) if flipped[index] else crop
    return out


def test_augmentation_equals_its_slow_twin() -> None:
    images = torch.randn(16, 3, 9, 7)
    fast = crop_and_flip(images, torch.Generator().manual_seed(5))
    assert torch.equal(fast, slow_crop_and_flip(images, torch.Generator().manual_seed(5)))


def test_sequences_are_padded_to_the_longest_of_their_batch() -> None:
    data = Sequences([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])], torch.tensor([0, 1, 0]))
    tokens, lengths, labels = data.batch(torch.tensor([1, 0]), None)
    assert (tokens.tolist(), lengths.tolist(), labels.tolist()) == ([[3, 0], [1, 2]], [1, 2], [1, 0])


def test_a_subset_is_the_same_in_every_run() -> None:
    data = Tensors((torch.arange(50),))
    first, again = (subset("train_samples", data, 7).batch(torch.arange(7), None)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 7


@pytest.mark.parametrize(("size", "start"), [(0, 0), (30, 0), (5, 9)])
def test_batches_that_cannot_be(size: int, start: int) -> None:
    with pytest.raises(ValueError, match="must be from"):
        Batches(Tensors((torch.arange(20),)), size, seed=0, epoch=0, start=start)
