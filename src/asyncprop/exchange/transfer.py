"""Transfer: a model and its optimizer's state as bytes, for a rank that joins."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def copy_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the model's state.

    The race that is harmless: layers may be copied half updated, as they may travel half updated in any message.
    """
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()
    }


def pack_state(model: dict[str, Any], optimizer: Optimizer) -> bytes:
    """Return a model's state and its optimizer's as bytes; workers step the optimizer meanwhile.

    Raises:
        RuntimeError: if a worker made a new parameter's state at that very moment.
    """
    file = io.BytesIO()
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def unpack_state(data: bytes) -> dict[str, Any]:
    """Return `model` and `optimizer` states, on the CPU."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state
