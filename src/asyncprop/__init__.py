"""asyncprop: train any PyTorch model by asynchronous backpropagation.

Names are loaded when first used, so that `asyncprop --help` need not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncprop.delay import Delay
    from asyncprop.devices import keep_freed_memory
    from asyncprop.engine import (
        Attenuation,
        BlockUpdate,
        Compensation,
        Coupled,
        Decoupled,
        Engine,
        LayerUpdate,
        NonFiniteError,
        Partition,
        Snapshot,
    )
    from asyncprop.exchange import Averaging, LayerGossip
    from asyncprop.recorder import Recorder
    from asyncprop.replay import Ordered, Replay
    from asyncprop.simulate import VirtualTime
    from asyncprop.simulate.planning import Plan, plan
    from asyncprop.trace import Event, Statistics, Step, Trace

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        (
            "Attenuation",
            "BlockUpdate",
            "Compensation",
            "Coupled",
            "Decoupled",
            "Engine",
            "LayerUpdate",
            "NonFiniteError",
            "Partition",
            "Snapshot",
        ),
        "asyncprop.engine",
    ),
    **dict.fromkeys(("Event", "Statistics", "Step", "Trace"), "asyncprop.trace"),
    "Averaging": "asyncprop.exchange",
    "Recorder": "asyncprop.recorder",
    **dict.fromkeys(("Ordered", "Replay"), "asyncprop.replay"),
    "LayerGossip": "asyncprop.exchange",
    "VirtualTime": "asyncprop.simulate",
    **dict.fromkeys(("Plan", "plan"), "asyncprop.simulate.planning"),
    "Delay": "asyncprop.delay",
    "keep_freed_memory": "asyncprop.devices",
}

__all__ = [  # noqa: RUF022  # by topic
    "Engine",
    "Decoupled",
    "Coupled",
    "LayerUpdate",
    "BlockUpdate",
    "Compensation",
    "Attenuation",
    "Partition",
    "Averaging",
    "LayerGossip",
    "Delay",
    "NonFiniteError",
    "Snapshot",
    "Statistics",
    "Step",
    "Trace",
    "Event",
    "Recorder",
    "Ordered",
    "Replay",
    "VirtualTime",
    "Plan",
    "plan",
    "keep_freed_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'asyncprop' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
