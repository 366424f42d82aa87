"""The exchange: how replicas of a model on several ranks meet."""

from asyncprop.exchange.average import Averaging
from asyncprop.exchange.world import World

__all__ = ["Averaging", "World"]
