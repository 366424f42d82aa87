"""Checkpoint: model, optimizer, random state and position. A kill at any instant leaves the last good one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim import Optimizer

from asyncprop.trace import Step


@dataclass
class Position:
    """How far a run has come. All of `samples` and `steps` have been applied to the model, and no other.

    Attributes:
        epoch, batch: the next batch's epoch, and number in it, from 0.
        steps, samples: finished since the start.
        train_s: seconds of training.
        staleness: sum over steps of their mean staleness.
        loss, epoch_steps: sum over the present epoch's steps of their losses, and their number.
        best_metric, best_epoch: the best test metric so far, and the epochs it took.
        epochs_to_target, time_to_target_s: when the target was first reached.
        peak_memory_bytes: the highest so far.
        history: the rows of `epochs.jsonl`.
        lines: of the folder's `steps.jsonl` and `epochs.jsonl` that belong to a checkpoint (see `Run`).
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    samples: int = 0
    train_s: float = 0.0
    staleness: float = 0.0
    loss: float = 0.0
    epoch_steps: int = 0
    best_metric: float = 0.0
    best_epoch: int = 0
    epochs_to_target: int | None = None
    time_to_target_s: float | None = None
    peak_memory_bytes: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] | None = None

    def add(self, step: Step) -> None:
        """Count a finished batch."""
        self.batch += 1
        self.steps += 1
        self.epoch_steps += 1
        self.samples += step.batch_size
        self.staleness += step.mean_staleness
        self.loss += step.loss

    def add_up(self, before: Position, ranks: list[Position]) -> None:
        """Count what all `ranks` have done since they were all at `before`."""
        for name in ("steps", "epoch_steps", "samples", "staleness", "loss"):
            start = getattr(before, name)
            setattr(self, name, start + sum(getattr(position, name) - start for position in ranks))

    def close_epoch(self, metric: float) -> None:
        """Go to the start of the next epoch, after a test with this result."""
        self.epoch, self.batch, self.epoch_steps, self.loss = self.epoch + 1, 0, 0, 0.0
        if metric > self.best_metric:
            self.best_metric, self.best_epoch = metric, self.epoch


def rank_state(optimizer: Optimizer, trainer: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint keeps of each rank: its optimizer, its trainer's state, and its random state.

    All of it is on the CPU: the first rank reads all ranks' states, and its GPU holds no more than its own.
    """
    return {"optimizer": _on_cpu(optimizer.state_dict()), "trainer": _on_cpu(trainer), "random": _random_state()}


def save_checkpoint(link: Path, model: nn.Module, ranks: list[dict[str, Any]], position: Position) -> None:
    """Write a checkpoint into a new folder beside `link`, then make the symbolic link `link` point to it.

    The link is replaced by one rename: at any instant it points to a whole checkpoint, the old one or the new one.

    A process that was taken for dead while it wrote, as it hung, may go on when another has written later checkpoints.
    Guarantees: no two processes write one folder, and whoever finds the link at a later checkpoint leaves it there. The
    race that is left, as nothing can wait for a process that hangs: one that hung between that look and its rename, two
    system calls, sets the link back to its own checkpoint, which may have been removed, until the next is written.

    Args:
        link: where the last checkpoint is to be found.
        model: on which all ranks agree.
        ranks: the `rank_state` of each.
        position: on which all ranks agree.
    """
    folder = _new_folder(link, position)
    try:
        _fill(folder, model, ranks, position)
        aside = folder.with_name(f".{folder.name}")
        aside.symlink_to(folder.name)
        _sync(link.parent)  # a link that outlives a power failure must have its folder there
        if not _is_passed(link, folder):
            aside.replace(link)
            _sync(link.parent)
    except Exception:  # its files may have been removed by whoever went on
        if not _is_passed(link, folder):
            raise
    _remove_old(link)


def _new_folder(link: Path, position: Position) -> Path:
    """Make a folder whose name sorts after those of earlier positions, and after what the link points to at this one.

    What a killed run left there stays: its name is not taken again.
    """
    name, current = f"{link.name}-{position.steps:09d}-{position.epoch:05d}", _current(link)
    attempt = 0
    while True:
        folder = link.with_name(f"{name}-{attempt:03d}" if attempt else name)
        attempt += 1
        if current.startswith(name) and folder.name <= current:
            continue
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _fill(folder: Path, model: nn.Module, ranks: list[dict[str, Any]], position: Position) -> None:
    save_model(model, str(folder / "model.safetensors"))
    torch.save(ranks, folder / "ranks.pt")
    (folder / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _current(link: Path) -> str:
    """Return the name of the folder that the link points to; an empty one if there is no link."""
    return os.readlink(link) if link.is_symlink() else ""


def _is_passed(link: Path, folder: Path) -> bool:
    """Tell whether the link points to a later checkpoint than this one."""
    return _current(link) > folder.name


def _remove_old(link: Path) -> None:
    """Remove what comes before the checkpoint that the link points to; what comes after may be one being written."""
    current = _current(link)
    for stale in link.parent.glob(f"{link.name}-*"):
        if stale.name < current:
            shutil.rmtree(stale, ignore_errors=True)
    for stale in link.parent.glob(f".{link.name}-*"):
        if stale.name < f".{current}":
            stale.unlink(missing_ok=True)


def load_checkpoint(
    link: Path, model: nn.Module, optimizer: Optimizer, *, rank: int = 0
) -> tuple[Position, dict[str, Any]]:
    """Bring model, optimizer and random state to where a checkpoint left them.

    A rank that the checkpoint does not know goes on with the first one's optimizer.

    Returns:
        Its position, and the state of the rank's trainer.

    Raises:
        ValueError: if there is no checkpoint, or it is of another model.
    """
    if not (link / "position.json").is_file():
        raise ValueError(f"resume must be a run with a checkpoint ({link} is none yet): start the run anew")
    try:
        load_model(model, str(link / "model.safetensors"))
        ranks = torch.load(link / "ranks.pt", map_location="cpu", weights_only=True)
        is_known = rank < len(ranks)
        state = ranks[rank if is_known else 0]
        optimizer.load_state_dict(state["optimizer"])
        position = Position(**json.loads((link / "position.json").read_text(encoding="utf-8")))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{link} must be a checkpoint of this model ({str(error).splitlines()[0]})") from error
    if not is_known:
        return position, {}
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available():  # the machine may have fewer GPUs than the one that wrote
        torch.cuda.set_rng_state_all(state["random"]["cuda"][: torch.cuda.device_count()])
    return position, state["trainer"]


def _on_cpu(state: Any) -> Any:
    """Return a state with all its tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(value) for value in state)
    return state


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
