"""Checkpoint: model, optimizer, random state and position. A kill at any instant leaves the last good one."""

from __future__ import annotations

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


@dataclass
class Position:
    """How far a run has come. All of `samples` and `steps` have been applied to the model, and no other.

    Attributes:
        epoch, batch: the next batch's epoch, and number in it, from 0.
        steps, samples: finished since the start.
        train_s: seconds of training.
        staleness: sum over steps of their mean staleness.
        loss: sum over the present epoch's steps of their losses.
        best_metric, best_epoch: the best test metric so far, and the epochs it took.
        epochs_to_target, time_to_target_s: when the target was first reached.
        peak_memory_bytes: the highest so far.
        history: the rows of `epochs.jsonl`.
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    samples: int = 0
    train_s: float = 0.0
    staleness: float = 0.0
    loss: float = 0.0
    best_metric: float = 0.0
    best_epoch: int = 0
    epochs_to_target: int | None = None
    time_to_target_s: float | None = None
    peak_memory_bytes: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(link: Path, model: nn.Module, optimizer: Optimizer, position: Position) -> None:
    """Write a checkpoint into a new folder beside `link`, then make the symbolic link `link` point to it.

    The link is replaced by one rename: at any instant it points to a whole checkpoint, the old one or the new one.
    """
    folder = link.with_name(f"{link.name}-{position.steps:09d}-{position.epoch:05d}")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left there, which no link points to
    folder.mkdir()
    save_model(model, str(folder / "model.safetensors"))
    state = {"optimizer": optimizer.state_dict(), "random": _random_state()}
    torch.save(state, folder / "optimizer.pt")
    (folder / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)
    aside = link.with_name(f".{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    aside.replace(link)
    _sync(link.parent)
    for stale in link.parent.glob(f"{link.name}-*"):
        if stale.name != folder.name:
            shutil.rmtree(stale, ignore_errors=True)


def load_checkpoint(link: Path, model: nn.Module, optimizer: Optimizer) -> Position:
    """Bring model, optimizer and random state to where a checkpoint left them; return its position.

    Raises:
        ValueError: if there is no checkpoint, or it is of another model.
    """
    if not (link / "position.json").is_file():
        raise ValueError(f"resume must be a run with a checkpoint ({link} is none yet): start the run anew")
    try:
        load_model(model, str(link / "model.safetensors"))
        state = torch.load(link / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        position = Position(**json.loads((link / "position.json").read_text(encoding="utf-8")))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{link} must be a checkpoint of this model ({str(error).splitlines()[0]})") from error
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return position


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
