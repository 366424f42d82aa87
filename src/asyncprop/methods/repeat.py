"""Repeat: reads what a recorded run was, and where a repeated run differs from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from asyncprop.config import TrainConfig
from asyncprop.runs import read_config, read_result
from asyncprop.trace import Trace

NEVER_S = 1e9
"""Seconds between checkpoints within an epoch: draining for one would hold up what the trace has at once."""


def read_recorded(path: Path) -> tuple[TrainConfig, Trace]:
    """Return configuration and trace of a finished run that can be trained again.

    Raises:
        ValueError: if it was not recorded with `turn="ordered"` from its beginning to its end.
    """
    if not (path / "config.toml").is_file():
        raise ValueError(f"path must be the folder of a run ({path} has no config.toml)")
    config = read_config(path)
    if config.turn != "ordered":
        raise ValueError(f"path must be a run with --turn ordered (that of {path} is {config.turn}): train one")
    if read_result(path) is None:
        raise ValueError(f"path must be a finished run ({path} is not): asyncprop train --resume {path}")
    trace = Trace.load(path / "trace.jsonl")
    if len(_losses(path)) != sum(event.kind == "forward" for event in trace.events):
        raise ValueError(f"path must be a run in one piece (the trace of {path} begins where it was resumed)")
    return config.model_copy(update={"checkpoint_every": NEVER_S}), trace


def first_difference(recorded: Path, repeated: Path) -> str | None:
    """Say where two runs differ first, at the loss of a batch, or at last in the model; and by how much.

    None if they are equal. Where arithmetic rounds otherwise, as on another machine, differences begin at about 1e-7.
    """
    losses = [_losses(path) for path in (recorded, repeated)]
    if losses[0].keys() != losses[1].keys():
        return f"{len(losses[1])} batches, where {len(losses[0])} were recorded"
    pairs = {batch: (loss, losses[1][batch]) for batch, loss in losses[0].items()}
    if shares := {batch: abs(a - b) / max(abs(a), abs(b)) for batch, (a, b) in pairs.items() if a != b}:
        first, most = min(shares), max(shares, key=shares.__getitem__)
        return (
            f"the loss of batch {first} is {pairs[first][1]!r}, where {pairs[first][0]!r} was recorded; "
            f"the largest difference is {shares[most]:.1e} of a loss, at batch {most}"
        )
    files = [path / "checkpoint" / "model.safetensors" for path in (recorded, repeated)]
    return None if files[0].read_bytes() == files[1].read_bytes() else _model_difference(*files)


def _model_difference(recorded: Path, repeated: Path) -> str:
    before, after = load_file(recorded), load_file(repeated)
    differences = {name: float((after[name].double() - tensor.double()).abs().max()) for name, tensor in before.items()}
    most = max(differences, key=differences.__getitem__)
    return f"the model at the end, by {differences[most]:.1e} at most, in {most}"


def _losses(path: Path) -> dict[int, float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    return {row["batch"]: row["loss"] for row in rows}
