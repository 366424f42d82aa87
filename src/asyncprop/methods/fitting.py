"""Fitting: whether a run's options fit its method, asked before anything is loaded."""

from __future__ import annotations

from asyncprop.config import NOT_MODELLED, SimulateConfig, TrainConfig
from asyncprop.delay import parse_delays, refuse_nobody
from asyncprop.methods import Method, get_method, meeting_of
from asyncprop.methods.trainer import refuse_factors_of_waits, refuse_what_it_lacks


def refuse_misfits(config: TrainConfig) -> None:
    """Refuse what the run's trainer would, when its turn comes.

    Raises:
        ValueError: naming the first option that does not fit.
    """
    row, meeting = get_method(config.method), meeting_of(config.method, config.exchange)
    ranks, are_real = config.ranks or 1, True
    if isinstance(config, SimulateConfig):
        refuse_what_is_not_modelled(config)
        ranks, are_real = replicas(config, row), False
    refuse_what_it_lacks(config, row, meeting, ranks)
    delays = parse_delays(config.delay)
    may_be_joined = are_real and ranks > 1 and meeting == "gossip"
    refuse_nobody(delays, ranks=None if may_be_joined else ranks, workers=None if row.workers else 1)
    if are_real and ranks > 1 and row.workers is None:
        refuse_factors_of_waits(delays, row)


def refuse_what_is_not_modelled(config: SimulateConfig) -> None:
    """Refuse options that a simulation would not look at; a ValueError names the first."""
    for name in NOT_MODELLED:
        if getattr(config, name) != SimulateConfig.model_fields[name].default:
            raise ValueError(f"{name} must be left out of a simulation, which does not model it: see docs/simulate.md")
    if config.device != "cpu":
        raise ValueError(f"device must be left out of a simulation, which has devices of its own (got {config.device})")


def replicas(config: SimulateConfig, row: Method) -> int:
    """Return how many replicas a simulation has: of a method whose ranks meet, one per device.

    Raises:
        ValueError: if the method has no several, or the devices cannot be shared out.
    """
    ranks = config.ranks or (config.devices if row.exchange else 1)
    if row.workers is None and row.exchange is None and ranks > 1:
        raise ValueError(f"ranks must be 1 for method {row.name} (got {ranks}): ddp is its like on several")
    if config.devices % ranks:
        raise ValueError(f"devices must be a multiple of ranks (got {config.devices}, ranks={ranks})")
    return ranks
