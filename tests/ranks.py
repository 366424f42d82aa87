"""What test_ranks starts as two ranks: trains by every method, and writes what each rank found.

Run by torch's launcher; the folder for the results is its argument.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import asyncprop as ap
from asyncprop.config import TrainConfig
from asyncprop.exchange import World
from asyncprop.methods import METHODS
from asyncprop.methods.session import Session
from asyncprop.methods.train import Interrupted, train
from asyncprop.progress import Quiet
from asyncprop.runs import create_run
from asyncprop.testing import TINY, cross_entropy

EPOCHS = 6
STOPPED = ("ddp", "post-local-sgd", "async-lu")
"""Methods that are stopped, and resumed."""
SAMPLES = 352  # 11 batches of 32: one more than two ranks can share evenly


def config(method: str, **options: Any) -> TrainConfig:
    return TrainConfig(
        task="digits", method=method, epochs=EPOCHS, train_samples=SAMPLES, test_samples=100, lr=0.1, **options
    )


def parameters(model: torch.nn.Module) -> list[float]:
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()]).tolist()


def run(out: Path, name: str, given: TrainConfig, world: World, stop: Any = lambda: False) -> dict[str, Any]:
    session = Session(given, None, world)
    folder = create_run(out / name, given) if world.is_first else None
    interrupted, result = False, None
    try:
        result = train(session, folder, Quiet(), stop)
    except Interrupted:
        interrupted = True
    resumed = None
    if interrupted:
        again = Session(given, out / name / "checkpoint", world)
        resumed = again.position.batch
        result = train(again, folder, Quiet())
        session = again
    if folder:
        folder.__exit__(None, None, None)
    return {"result": result, "parameters": parameters(session.model), "resumed_at": resumed}


def settled(averaging: ap.Averaging, world: World, batches: int) -> list[float]:
    """Train on batches of this rank's own, settle, and return the parameters."""
    model = TINY["resnet"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ap.Engine(
        model, optimizer, cross_entropy, workers=ap.Coupled(1), update="block", exchange=averaging
    ) as engine:
        list(engine.run(TINY["resnet"].batches(batches, seed=world.rank)))
        engine.settle()
        return parameters(model)


class WritesMeanwhile(ap.Averaging):
    """Averages while a worker adds one to every parameter."""

    def _mean(self, tensor: torch.Tensor) -> None:
        super()._mean(tensor)
        for parameter in self._parameters():
            parameter += 1


def survives(world: World) -> list[float]:
    """Let one round be made while parameters change under it: what was added must still be there."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, float(world.rank))
    averaging = WritesMeanwhile(period=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = ap.Engine(model, optimizer, lambda m, x: m(x).sum(), workers=ap.Coupled(1), exchange=averaging)
    with engine:
        with torch.no_grad():
            model.weight.fill_(float(world.rank))  # after the broadcast at the start
        averaging._average(exactly=False)
        return [float(model.weight)]


def refused(world: World) -> str:
    model = torch.nn.Linear(2 + world.rank, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        with ap.Engine(model, optimizer, lambda m, x: m(x).sum(), exchange=ap.Averaging()):
            return "accepted"
    except ValueError as error:
        return str(error)


def bf16(world: World) -> str:
    try:
        Session(config("ddp", comm_hook="bf16"), None, world)
    except ValueError as error:
        return str(error)
    return "accepted"


def main(out: Path) -> None:
    with World() as world:
        found: dict[str, Any] = {}
        for method, row in METHODS.items():
            if row.workers is not None or row.exchange is not None:
                found[method] = run(
                    out, method, config(method, prepass_epochs=2) if row.partition else config(method), world
                )
        found["fp16"] = run(out, "fp16", config("ddp", comm_hook="fp16"), world)
        found["powersgd"] = run(out, "powersgd", config("ddp", comm_hook="powersgd"), world)
        for method in STOPPED:
            asked = iter([False] + [True] * 1000)
            found[f"stopped {method}"] = run(out, f"stopped-{method}", config(method), world, lambda: next(asked))  # noqa: B023
        found["settled"] = settled(ap.Averaging(period=1000), world, 3)
        found["averaged often"] = settled(ap.Averaging(period=1), world, 5 + 5 * world.rank)
        found["survives"] = survives(world)
        found["bf16"] = bf16(world)
        found["refused"] = refused(world)
        (out / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
