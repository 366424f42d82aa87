"""The exchange: how replicas of a model on several ranks meet."""

from asyncprop.exchange.average import Averaging
from asyncprop.exchange.gossip import LayerGossip
from asyncprop.exchange.members import LeftOut, Members
from asyncprop.exchange.world import World

__all__ = ["Averaging", "LayerGossip", "LeftOut", "Members", "World"]
