"""Task: data, model, loss, metric, target and recipe in one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from asyncprop.tasks.batches import Batch, Dataset, Split, evaluation_batches, subset
from asyncprop.tasks.fetch import SOURCES, cache_folder, fetch, is_cached
from asyncprop.tasks.recipes import Recipe

Load = Callable[[Path | None], Split]
"""Reads the data from a folder: the task's own place if None."""
Build = Callable[[int | None], nn.Module]
"""Makes the model, of a given width or of its own."""


@dataclass(frozen=True)
class Score:
    """A model on a test set: mean loss, metric (share of right predictions, 0..1), and the number of samples."""

    loss: float
    metric: float
    samples: int


@dataclass(frozen=True)
class Task:
    """Something to train on.

    Args:
        name, summary: for the table of tasks.
        dataset: the data set's name; one in `SOURCES` can be fetched, `synthetic` is made, others need `--data-dir`.
        reads: turns a folder into a Split.
        builds: makes the model.
        recipe: how it is trained.
        target: test metric that counts as trained.
        metric: what is told of a test set: `accuracy`, the share of right predictions.
        stands_in_for: the paper's task of the same shape, if it is one that can be had instead. Its figures are never
            called by that name.
        workers: processes that make batches ahead of time.
        large_tensors: whether a pass makes tensors of more than 64 MiB (see `devices.keep_freed_memory`).
    """

    name: str
    summary: str
    dataset: str
    reads: Load
    builds: Build
    recipe: Recipe
    target: float
    metric: str = "accuracy"
    stands_in_for: str | None = None
    workers: int = 0
    large_tensors: bool = False

    def load(
        self, *, data_dir: Path | None = None, train_samples: int | None = None, test_samples: int | None = None
    ) -> Split:
        """Read the data, or as many samples as asked for, the same ones in every run.

        Raises:
            ValueError: if the data are not there, are damaged, or have fewer samples.
        """
        split = self.reads(self._folder(data_dir))
        return Split(
            subset("train_samples", split.train, train_samples), subset("test_samples", split.test, test_samples)
        )

    def build(self, *, width: int | None = None, seed: int = 0) -> nn.Module:
        """Return the model; its weights depend on `seed` alone, and the global random state is left as it was."""
        if width is not None and width < 1:
            raise ValueError(f"width must be >= 1 (got {width})")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.builds(width)

    def optimizer(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
    ) -> torch.optim.Optimizer:
        """Return the recipe's optimizer; what is given overrides the recipe."""
        return self.recipe.make_optimizer(model, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy: the batch's last tensor is what the model is to predict from the others."""
        *inputs, target = batch
        return nn.functional.cross_entropy(model(*inputs).flatten(0, -2), target.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, test: Dataset, *, batch_size: int = 500) -> Score:
        """Score the model on all of `test`, in eval mode; its mode is put back."""
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        loss, right, count = 0.0, 0, 0
        for batch in evaluation_batches(test, batch_size):
            *inputs, target = (tensor.to(device) for tensor in batch)
            logits = model(*inputs).flatten(0, -2)
            loss += float(nn.functional.cross_entropy(logits, target.flatten(), reduction="sum"))
            right += int((logits.argmax(1) == target.flatten()).sum())
            count += target.numel()
        model.train(training)
        return Score(loss / count, right / count, len(test))

    def available(self, data_dir: Path | None = None) -> bool:
        """Tell whether the data are on this machine."""
        if self.dataset in ("synthetic", "digits"):
            return True
        if self.dataset in SOURCES:
            return self._installed() is not None or is_cached(self.dataset, cache_folder())
        return data_dir is not None and data_dir.is_dir()

    def status(self, data_dir: Path | None = None) -> str:
        """Say where the data are, or what to do about it."""
        if self.dataset == "synthetic":
            return "made on the spot"
        if self.dataset == "digits":
            return "in the scikit-learn package"
        if self.dataset in SOURCES:
            here = self._installed() or cache_folder() / self.dataset
            return str(here) if self.available() else f"asyncprop data fetch {self.dataset}"
        return str(data_dir) if self.available(data_dir) else "needs --data-dir"

    def _folder(self, data_dir: Path | None) -> Path | None:
        if data_dir is not None:
            if not data_dir.is_dir():
                raise ValueError(f"data-dir must be a folder ({data_dir} is not)")
            return data_dir
        if self.dataset in ("synthetic", "digits"):
            return None
        if self.dataset not in SOURCES:
            raise ValueError(f"data-dir must be given for {self.name}: the folder that holds {self.dataset}")
        if installed := self._installed():
            return installed
        if not is_cached(self.dataset, cache_folder()):
            raise ValueError(
                f"the data of {self.name} are not on this machine: run asyncprop data fetch {self.dataset}, "
                "or give their folder as --data-dir"
            )
        return fetch(self.dataset)

    def _installed(self) -> Path | None:
        place = Path("/usr/share/datasets") / self.dataset  # where Debian's packages put data sets
        return place if place.is_dir() else None
