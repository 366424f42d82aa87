"""Snapshot: the model at one instant, while training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from asyncprop.devices import Device
from asyncprop.engine.lanes import Lanes
from asyncprop.engine.passes import Gate


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model at one instant between backward passes: a copy of its `state_dict`, and each layer's version."""

    model: dict[str, Tensor]
    versions: dict[str, int]


def take_snapshot(model: nn.Module, lanes: Lanes, gate: Gate, device: Device) -> Snapshot:
    """Copy the model with the gate of backward passes shut, until the copy is made and not only queued."""
    with gate.shut():
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        versions = lanes.versions.all()
        device.finish(device.current_stream())
    names = [layer.name for layer in lanes.layers]
    return Snapshot(state, dict(zip(names, versions, strict=True)))
