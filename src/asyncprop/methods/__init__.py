"""The table of axes: what separates any two methods is a row here, and nothing else in the code knows their names.

workers     who computes: one loop, coupled workers, or forward and backward threads
update      when gradients land, and whose the optimizer's state is
partition   which layers a worker writes
exchange    how ranks meet: gradients all-reduced in step, parameters averaged or gossiped beside the workers, or never
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncprop.engine import BlockUpdate, Compensation, Coupled, Decoupled, LayerUpdate
from asyncprop.engine.update import Update

Cut = Literal["own block", "all, own block in turn"]
Meeting = Literal["gradients in step", "parameters in step", "buckets in step", "averaging", "gossip"]


@dataclass(frozen=True, slots=True)
class Method:
    """One row. A method without workers is one loop per rank, all layers stepped in turn with it."""

    name: str
    workers: Decoupled | Coupled | None
    update: Update | None
    partition: Cut | None
    exchange: Meeting | None
    summary: str


HOGWILD = BlockUpdate()
PRIVATE = BlockUpdate(state="private")
COMPENSATED = BlockUpdate(compensate=Compensation())

# An asynchronous method whose exchange is None averages, if it is asked to run on several ranks.
_ROWS = (
    Method("sgd", None, None, None, None, "the plain PyTorch loop, all cores in each operation"),
    Method("ddp", None, None, None, "gradients in step", "torch's DistributedDataParallel, untouched"),
    Method("post-local-sgd", None, None, None, "parameters in step", "torch's own: local steps, averaged now and then"),
    Method("decent-dp", None, None, None, "buckets in step", "the peer decent-dp, untouched: buckets mixed meanwhile"),
    Method("hogwild", Coupled(2), HOGWILD, None, None, "workers share the parameters, no locks"),
    Method("passm", Coupled(2), HOGWILD, "own block", None, "Hogwild!, then each worker writes its block (PASSM+)"),
    Method("lapsgd", Coupled(1), PRIVATE, None, "averaging", "Hogwild! per rank, averaged beside the workers"),
    Method("lppsgd", Coupled(1), PRIVATE, "all, own block in turn", "averaging", "LAPSGD, every other pass partial"),
    Method("dc-asgd", Coupled(2), COMPENSATED, None, None, "Hogwild! with compensated gradients"),
    Method("async-bu", Decoupled(), BlockUpdate(), None, None, "forward and backward threads, stepped per pass"),
    Method("async-lu", Decoupled(), LayerUpdate(), None, None, "forward and backward threads, stepped per layer"),
    Method("layup", Decoupled(), LayerUpdate(), None, "gossip", "async-lu, each layer gossiped as it is updated"),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def meeting_of(name: str, asked: Literal["averaging", "gossip"] | None) -> Meeting | None:
    """Return how the ranks of a method meet, if there are several: as `asked`, or as its row has it."""
    method = get_method(name)
    return asked or method.exchange or ("averaging" if method.workers else None)


def get_method(name: str) -> Method:
    """Return the method called `name`; a ValueError lists the known ones."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} (got {name!r})")
    return METHODS[name]
