"""Transfer: a model and its optimizer's state as bytes, for a rank that joins."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def pack_state(model: nn.Module, optimizer: Optimizer) -> bytes:
    """Return both as bytes, of a training that goes on meanwhile.

    The race that is harmless: layers may be copied half updated, as they may travel half updated in any message.

    Raises:
        RuntimeError: if a worker made a new parameter's state at that very moment.
    """
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def unpack_state(data: bytes) -> dict[str, Any]:
    """Return `model` and `optimizer` states, on the CPU."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state
