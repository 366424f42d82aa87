"""Layer: the parameters that are stepped together. By default a module's own, and those of the norm that follows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Layer:
    """Names of the `parameters` stepped together and of the `modules` that read them; `index` counts from the input."""

    index: int
    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]


def find_layers(model: nn.Module, trainable: Iterable[str], by: str | Sequence[str] = "module") -> tuple[Layer, ...]:
    """Split the `trainable` parameters of `model` into layers, in the order in which the model defines them.

    Args:
        model: the user's model. A tied parameter belongs to the first module that owns it, and is read by all owners.
        trainable: names, as `model.named_parameters()` gives them, of the parameters that are to be stepped.
        by: `"module"` (a layer is what one module owns directly; one that owns only vectors, such as a norm, belongs
            to the layer of the module before it: a ResNet-18 has 21 layers, not 41), `"parameter"` (each is its own
            layer: the earliest updates, and the most optimizer calls), or module-name prefixes (a layer is all below
            a prefix, e.g. one per block: fewer, larger steps; what no prefix covers goes by module).

    Raises:
        ValueError: if `by` is none of these, or a prefix matches no trainable parameter.
    """
    wanted = set(trainable)
    owners = _owners(model)
    prefixes = _prefixes(by, wanted)
    home = _homes(model, wanted)
    members: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if name in wanted:
            members.setdefault(_layer_name(name, by, prefixes, home), []).append(name)
    return tuple(
        Layer(index, layer, tuple(names), tuple(dict.fromkeys(module for name in names for module in owners[name])))
        for index, (layer, names) in enumerate(members.items())
    )


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Map each parameter's first name to the names of all modules that own it."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[str, list[str]] = {name: [] for name in first_name.values()}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[first_name[id(parameter)]].append(module_name)
    return owners


def _homes(model: nn.Module, wanted: set[str]) -> dict[str, str]:
    """Map each module's name to the name of the module whose layer its parameters belong to.

    The step of a norm's scale and shift costs a call of the optimizer and moves a few bytes. Where it is called right
    after the module that is defined before it, its gradient is complete just before that one's, so waiting costs no
    staleness to speak of. (Where it is not, as in torch's TransformerEncoderLayer, the layer waits for the later two.)
    """
    home: dict[str, str] = {}
    before = None
    for name, module in model.named_modules():
        own = dict(module.named_parameters(prefix=name, recurse=False))
        if not own:
            continue
        if all(value.dim() <= 1 for value in own.values()):
            is_leaf = next(module.children(), None) is None  # a block's own scale comes before what the block holds
            home[name] = before if before is not None and is_leaf else name
        else:
            home[name] = name
            before = None if wanted.isdisjoint(own) else name
    return home


def _prefixes(by: str | Sequence[str], wanted: set[str]) -> tuple[str, ...]:
    if by in ("module", "parameter"):
        return ()
    if isinstance(by, str):
        raise ValueError(f"layers must be 'module', 'parameter' or a sequence of module-name prefixes (got {by!r})")
    for prefix in by:
        if not any(_below(name, prefix) for name in wanted):
            raise ValueError(
                f"layers: each prefix must name a module with trainable parameters (got {prefix!r}): "
                "see model.named_modules()"
            )
    return tuple(by)


def _layer_name(parameter: str, by: str | Sequence[str], prefixes: tuple[str, ...], home: dict[str, str]) -> str:
    if by == "parameter":
        return parameter
    covering = [prefix for prefix in prefixes if _below(parameter, prefix)]
    if covering:
        return max(covering, key=len)
    module = parameter.rpartition(".")[0]
    return module if any(_below(home[module], prefix) for prefix in prefixes) else home[module]


def _below(parameter: str, prefix: str) -> bool:
    return parameter == prefix or parameter.startswith(f"{prefix}.")
