"""The engine: asynchronous backpropagation of one model on one device."""

from asyncprop.engine.compensation import Attenuation, Compensation, Correction
from asyncprop.engine.engine import Engine
from asyncprop.engine.exchange import Exchange
from asyncprop.engine.partition import Partition
from asyncprop.engine.snapshot import Snapshot
from asyncprop.engine.turn import Turn
from asyncprop.engine.update import BlockUpdate, LayerUpdate, NonFiniteError
from asyncprop.engine.workers import Coupled, Decoupled

__all__ = [
    "Attenuation",
    "BlockUpdate",
    "Compensation",
    "Correction",
    "Coupled",
    "Decoupled",
    "Engine",
    "Exchange",
    "LayerUpdate",
    "NonFiniteError",
    "Partition",
    "Snapshot",
    "Turn",
]
