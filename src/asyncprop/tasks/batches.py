"""Batches: one epoch of a dataset, in an order fixed by seed and epoch; Dataset: what it takes them from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


class Dataset(Protocol):
    """Samples by number. `batch` augments if, and only if, it is given a generator."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """Return the samples at `indices` (long, of shape (n,)) as one batch."""


@dataclass(frozen=True)
class Split:
    """The training and the test samples of a task."""

    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class Subset:
    """The first `count` samples of a fixed permutation of `dataset`: the same ones in every run."""

    dataset: Dataset
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """Return the samples at `indices` of the subset."""
        return self.dataset.batch(self.indices[indices], generator)


def subset(name: str, dataset: Dataset, count: int | None) -> Dataset:
    """Return `count` samples of `dataset`, all of them if None; `name` is the argument that an error names."""
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise ValueError(f"{name} must be from 1 to {len(dataset)}, the samples that there are (got {count})")
    return Subset(dataset, torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count])


class Batches:
    """One epoch's batches. Iterating twice gives the same; nothing of the global random state is used.

    Args:
        dataset: where samples come from.
        batch_size: samples per batch, at most `len(dataset)`.
        seed, epoch: fix the order, and, with the batch's number, its augmentation: a resumed epoch equals the
            uninterrupted one bit for bit.
        start: batches to skip (resume).
        numbers: of the batches to make, in this order, of which there may turn out to be fewer; all by default.
        drop_last: leave out a last batch that would be smaller.
        workers: processes that make batches ahead of time; 0 makes them where they are asked for.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        numbers: Iterable[int] | None = None,
        drop_last: bool = True,
        workers: int = 0,
    ) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"batch_size must be from 1 to {len(dataset)}, the number of samples (got {batch_size})")
        self._dataset, self._batch_size = dataset, batch_size
        self._seed, self._epoch, self._start, self._workers = seed, epoch, start, workers
        self._count = len(dataset) // batch_size if drop_last else -(-len(dataset) // batch_size)
        if not 0 <= start <= self._count:
            raise ValueError(f"start must be from 0 to {self._count}, the batches of an epoch (got {start})")
        self._numbers = range(start, self._count) if numbers is None else numbers
        self._order = torch.randperm(len(dataset), generator=_generator(seed, epoch))

    def __len__(self) -> int:
        return self._count - self._start

    def __iter__(self) -> Iterator[Batch]:
        if not self._workers:
            return (self.make(number) for number in self._numbers)
        return iter(
            torch.utils.data.DataLoader(
                _ByNumber(self),
                batch_size=None,
                sampler=self._numbers,
                num_workers=self._workers,
                multiprocessing_context="spawn",  # forking a process that has threads is not safe
                worker_init_fn=_one_thread,
            )
        )

    def make(self, number: int) -> Batch:
        """Return a batch by its number in the epoch."""
        indices = self._order[number * self._batch_size : (number + 1) * self._batch_size]
        return self._dataset.batch(indices, _generator(self._seed, self._epoch, number))


class _ByNumber(torch.utils.data.Dataset[Batch]):
    def __init__(self, batches: Batches) -> None:
        self._batches = copy.copy(batches)
        self._batches._numbers = ()  # they stay with the process that hands them out

    def __getitem__(self, number: int) -> Batch:
        return self._batches.make(number)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _generator(*key: int) -> torch.Generator:
    """Return a generator whose seed mixes the numbers of `key` (a polynomial hash modulo a prime)."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(seed)


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Yield all samples in order, not augmented."""
    for indices in torch.split(torch.arange(len(dataset)), batch_size):
        yield dataset.batch(indices, None)


# ---- augmentation, batched on tensors


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels (zeros come in) and mirror half of them.

    Args:
        images: of shape (batch, channels, height, width).
        generator: decides shifts and mirrors.
        padding: largest shift, in pixels.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = torch.arange(height) + top
    columns = torch.arange(width) + left
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
