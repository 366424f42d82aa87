"""Simulate: training in virtual time, on machines that one need not have."""

from asyncprop.simulate.costs import Costs, LayerCosts, read_costs
from asyncprop.simulate.pace import Machine, Pace, SimulatedDevice
from asyncprop.simulate.virtual_time import StandstillError, VirtualTime

__all__ = ["Costs", "LayerCosts", "Machine", "Pace", "SimulatedDevice", "StandstillError", "VirtualTime", "read_costs"]
