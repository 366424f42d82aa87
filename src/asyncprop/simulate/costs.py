"""Costs: how long each layer's forward pass, backward pass, update and transfer take, on a device of speed 1."""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

PASSES = ("forward_s", "backward_s")
KINDS = (*PASSES, "update_s", "transfer_s")
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds by layer, in the order of the model's layers.

    Attributes:
        forward_s, backward_s: of the layer's passes, with what is computed between it and its neighbours.
        update_s: of its step.
        transfer_s: until its parameters have reached another device.
        variation: by which the times of whole passes vary: standard deviation over mean. 0: all take equally long.
        launch_s: of `forward_s`, what a worker takes from one pass to the next: to fetch a batch, and begin. None if it
            was not measured.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: tuple[float, ...]
    transfer_s: tuple[float, ...]
    variation: float = 0.0
    launch_s: float | None = None

    @property
    def backward_forward_ratio(self) -> float:
        """How much longer a backward pass takes, with its updates."""
        return (sum(self.backward_s) + sum(self.update_s)) / sum(self.forward_s)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a file of costs says: seconds by layer, or of whole passes, which are then spread over the layers.

    The rule of spreading: equally, as the paper's analysis of staleness assumes (Sec. 3.4).

    Attributes:
        name, source: of the figures.
        whole: seconds of each of KINDS, of all layers together; used if `layers` is empty.
        layers: for each layer's name the seconds of each of KINDS.
        variation: of passes, see `LayerCosts`.
    """

    name: str
    source: str
    whole: dict[str, float]
    layers: dict[str, dict[str, float]]
    variation: float = 0.0

    def of(self, layers: Sequence[str]) -> LayerCosts:
        """Return the costs of a model with these layers.

        Raises:
            ValueError: if the file gives costs by layer, of other layers, or passes that take no time.
        """
        if not self.layers:
            spread = {kind: (self.whole[kind] / len(layers),) * len(layers) for kind in KINDS}
            return LayerCosts(**spread, variation=self.variation, launch_s=None)
        if missing := [name for name in layers if name not in self.layers]:
            raise ValueError(f"costs must be of this model ({self.name} has none for its layer {missing[0]!r})")
        by_layer = {kind: tuple(self.layers[name][kind] for name in layers) for kind in KINDS}
        for kind in PASSES:
            if not sum(by_layer[kind]):
                raise ValueError(f"costs: {kind} must be > 0 of one layer at least ({self.name} has 0 of all)")
        return LayerCosts(**by_layer, variation=self.variation, launch_s=None)


def read_costs(name: str) -> Costs:
    """Read the costs that ship under `name`, or a TOML file, as `asyncprop plan --costs FILE` writes it.

    Raises:
        ValueError: if there are none, or they are not of this form.
    """
    path = HERE / f"{name}.toml" if name in shipped() else Path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"costs must be a readable file, or one of {', '.join(shipped())} (got {name})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"costs must be TOML ({path}: {error})") from None
    layers = content.get("layers", {})
    if not isinstance(layers, dict):
        raise ValueError(f"costs: layers must be tables, one for each layer ({path} has {layers!r})")
    for where, given in layers.items() if layers else [("the whole", content)]:
        _check(f"{path}: {where}", given, whole=not layers)
    variation = content.get("variation", 0.0)
    if not _is_number(variation) or not 0 <= variation < 1:
        raise ValueError(f"costs: variation must be a number from 0 to 1 ({path} has {variation!r})")
    whole = {kind: float(content.get(kind, 0.0)) for kind in KINDS}
    return Costs(
        str(content.get("name", path.stem)),
        str(content.get("source", "")),
        whole,
        {name: {kind: float(given.get(kind, 0.0)) for kind in KINDS} for name, given in layers.items()},
        float(variation),
    )


def write_costs(path: Path, name: str, source: str, layers: Iterable[str], costs: LayerCosts) -> None:
    """Write costs by layer, so that `read_costs` reads them."""
    lines = [f"name = {_quoted(name)}", f"source = {_quoted(source)}", f"variation = {costs.variation:.3e}"]
    for layer, *values in zip(layers, *(getattr(costs, kind) for kind in KINDS), strict=True):
        lines.append(f"\n[layers.{_quoted(layer)}]")
        lines += [f"{kind} = {value:.3e}" for kind, value in zip(KINDS, values, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Draws:
    """By how much longer each pass takes than in the mean: factors of mean 1, drawn from a seed.

    Lognormal, as a pass never takes no time, and sometimes far longer.

    Args:
        variation: standard deviation of the factors.
        seed: of what is drawn, batch by batch: who comes first does not matter.
    """

    def __init__(self, variation: float, seed: int) -> None:
        self._sigma = math.sqrt(math.log1p(variation**2))
        self._seed = seed

    def of(self, batch: int) -> float:
        """Return a batch's factor."""
        if not self._sigma:
            return 1.0
        return random.Random(f"{self._seed} {batch}").lognormvariate(-(self._sigma**2) / 2, self._sigma)


def shipped() -> list[str]:
    """Return the names of the costs that come with the package."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def _check(where: str, given: Any, *, whole: bool) -> None:
    for kind in KINDS:
        value = given.get(kind, 0.0) if isinstance(given, dict) else None
        positive = whole and kind in PASSES
        if not _is_number(value) or not 0 <= value < math.inf or (positive and not value):
            rule = "> 0" if positive else ">= 0"
            raise ValueError(f"costs: {kind} must be a number {rule} ({where} has {value!r})")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
