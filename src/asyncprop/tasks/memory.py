"""Datasets that lie in memory: images, padded token sequences, windows of a text, and synthetic ones of every shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncprop.tasks.batches import Batch, Split, crop_and_flip


@dataclass(frozen=True)
class Tensors:
    """Tensors whose first dimension counts samples; the last is the label. `augment` crops and flips the first."""

    tensors: Batch
    augment: bool = False

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """Return the rows at `indices`; images are augmented if a generator is given and `augment` is set."""
        first, *others = (tensor.index_select(0, indices) for tensor in self.tensors)
        if self.augment and generator is not None:
            first = crop_and_flip(first, generator)
        return (first, *others)


@dataclass(frozen=True)
class Sequences:
    """Token sequences of many lengths, with labels of shape (n,). Batches are padded with 0 to their longest."""

    sequences: Sequence[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """Return (tokens of shape (batch, longest), lengths, labels)."""
        rows = [self.sequences[index] for index in indices.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, self.labels[indices]


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of one long sequence of tokens; each is to predict its successor at every place."""

    tokens: Tensor
    length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """Return (tokens, next tokens), each of shape (batch, length)."""
        places = indices[:, None] * self.length + torch.arange(self.length)
        return self.tokens[places].long(), self.tokens[places + 1].long()


def synthetic_images(train: int, test: int, *, channels: int, size: int, classes: int, augment: bool) -> Split:
    """Return noisy copies of one random image per class, of shape (channels, size, size)."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(classes, channels, size, size, generator=generator)
    labels = torch.randint(classes, (train + test,), generator=generator)
    images = prototypes[labels] + torch.randn(train + test, channels, size, size, generator=generator)
    return Split(Tensors((images[:train], labels[:train]), augment), Tensors((images[train:], labels[train:])))


def synthetic_vectors(train: int, test: int, *, size: int, classes: int) -> Split:
    """Return random vectors labelled by the largest of `classes` fixed random projections."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(train + test, size, generator=generator)
    labels = (vectors @ torch.randn(size, classes, generator=generator)).argmax(1)
    return Split(Tensors((vectors[:train], labels[:train])), Tensors((vectors[train:], labels[train:])))


def synthetic_text(train: int, test: int, *, vocabulary: int, length: int) -> Split:
    """Return random token sequences, labelled by whether tokens of the upper half of the vocabulary prevail."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary, (train + test, length), generator=generator)
    labels = ((tokens >= vocabulary / 2).float().mean(1) > 0.5).long()
    rows = list(tokens)
    return Split(Sequences(rows[:train], labels[:train]), Sequences(rows[train:], labels[train:]))


def synthetic_characters(train: int, test: int, *, vocabulary: int, length: int) -> Split:
    """Return a text in which the next character is, nine times in ten, a fixed function of the present one."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(vocabulary, generator=generator).tolist()
    count = (train + test) * length + 2
    surprise = (torch.rand(count, generator=generator) < 0.1).tolist()
    random = torch.randint(vocabulary, (count,), generator=generator).tolist()
    text = [0]
    for place in range(1, count):
        text.append(random[place] if surprise[place] else successor[text[-1]])
    tokens = torch.tensor(text)
    return Split(Windows(tokens[: train * length + 1], length), Windows(tokens[train * length + 1 :], length))
