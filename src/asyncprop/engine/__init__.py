"""The engine: asynchronous backpropagation of one model on one device."""

from asyncprop.engine.engine import Engine, Snapshot
from asyncprop.engine.turn import Turn
from asyncprop.engine.update import BlockUpdate, LayerUpdate, NonFiniteError
from asyncprop.engine.workers import Coupled, Decoupled

__all__ = ["BlockUpdate", "Coupled", "Decoupled", "Engine", "LayerUpdate", "NonFiniteError", "Snapshot", "Turn"]
