"""Checks: what cannot work is refused when the engine is made, with the way out."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from asyncprop.devices import Device
from asyncprop.engine.exchange import Exchange
from asyncprop.engine.turn import Turn


def check_model(model: object) -> None:
    """Refuse modules that cannot be copied over their own storage."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module (got {type(model).__name__})")
    for name, module in model.named_modules():
        where = f"{type(module).__name__}{f' at {name!r}' if name else ''}"
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise ValueError(f"model must not be wrapped (got {where}): pass the inner model, {name or 'model'}.module")
        if _is_a(module, "FullyShardedDataParallel", "FSDPModule"):
            raise ValueError(f"model must not be sharded (got {where}): pass the model before FSDP wraps it")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must not be a ScriptModule (got {where}): pass the Python module")
        if module._compiled_call_impl is not None:
            raise ValueError(f"model must not be compiled in place (got {where}): use model = torch.compile(model)")
    _check_parameters(model)


def _is_a(value: object, *names: str) -> bool:
    """Tell by name whether `value` is of a class whose module takes seconds to import, and may never be needed."""
    return any(base.__name__ in names for base in type(value).__mro__)


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"model must be initialised ({name!r} is lazy): run one forward pass on a batch before")
        if parameter.is_meta:
            raise ValueError(f"model must hold data ({name!r} is on the meta device): materialise it before")
        if _is_a(parameter.data, "DTensor"):
            raise ValueError(f"model must not be sharded ({name!r} is a DTensor): pass the model before sharding it")
        if parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"model must have no post-accumulate-grad hooks ({name!r} has one): the engine steps each layer itself"
            )


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse optimizers that need a closure, or that step parameters of another model."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer (got {type(optimizer).__name__})")
    kind = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer must step without a closure (got {kind}): use SGD, Adam or another first-order one"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"optimizer must step without a closure (got {kind}): use SGD, Adam or another first-order one"
        )
    known = {id(parameter) for parameter in model.parameters()}
    steps = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := sum(id(parameter) not in known for parameter in steps):
        raise ValueError(
            f"optimizer must step parameters of the model only ({foreign} of its {len(steps)} are not the model's): "
            "make it from model.parameters()"
        )
    if not any(parameter.requires_grad for parameter in steps):
        raise ValueError("optimizer must have a parameter that requires a gradient (all are frozen)")


def check_turn(turn: Turn | None, exchange: Exchange | None, device: Device) -> None:
    """Refuse a turn that orders every read and write where some of them are out of its reach."""
    if turn is None or not turn.watches_all:
        return
    if exchange:
        raise ValueError("turn must be 'free' with an exchange: what comes from other ranks is not in the trace")
    if not device.results_are_ready:
        raise ValueError(
            "turn must be 'free' or 'lockstep' on a GPU: it orders when reads and writes are queued, not when they "
            "happen; record and replay with the model on the CPU"
        )


def check_loss_fn(loss_fn: Callable[..., Any]) -> None:
    """Refuse a `loss_fn` that does not use the module it is handed, or that scales its loss by a GradScaler."""
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be callable as loss_fn(model, batch) (got {type(loss_fn).__name__})")
    try:
        inspect.signature(loss_fn).bind(None, None)
    except TypeError as error:
        raise ValueError(f"loss_fn must be callable as loss_fn(model, batch) ({error})") from error
    except ValueError:
        return  # a builtin without a signature
    if not isinstance(loss_fn, FunctionType):
        return
    first = next(iter(inspect.signature(loss_fn).parameters.values()))
    if first.kind is not inspect.Parameter.VAR_POSITIONAL and first.name not in _names_read(loss_fn):
        raise ValueError(
            f"loss_fn must use the model that it is handed (its argument {first.name!r} is never read): "
            "each pass has a copy of its own"
        )
    variables = inspect.getclosurevars(loss_fn)
    for name, value in {**variables.globals, **variables.nonlocals}.items():
        if isinstance(value, torch.amp.GradScaler) and value.is_enabled():
            raise ValueError(
                f"loss_fn must not scale its loss (it uses the GradScaler {name!r}): use bfloat16 autocast, "
                "which needs no scaling"
            )


def _names_read(function: FunctionType) -> set[Any]:
    code = function.__code__
    read = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")}
    pairs = {name for value in read if isinstance(value, tuple) for name in value}  # 3.13: LOAD_FAST_LOAD_FAST
    return read | pairs | set(code.co_cellvars)


def check_graph(losses: Sequence[Tensor], model: nn.Module) -> None:
    """Refuse losses that were computed by the user's model itself, or by no model at all."""
    users = {id(parameter): name for name, parameter in model.named_parameters()}
    for loss in losses:
        if not loss.requires_grad:
            raise ValueError(
                "loss_fn must return a loss that depends on the model that it is handed (it requires no gradient)"
            )
        for leaf in _leaves_of(loss):
            if id(leaf) in users:
                raise ValueError(
                    f"loss_fn must use the model that it is handed (it used {users[id(leaf)]!r} of the engine's own "
                    "model): write loss_fn(model, batch) in terms of its argument"
                )


def _leaves_of(loss: Tensor) -> list[Tensor]:
    seen, leaves, todo = set(), [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo.extend(inner for inner, _ in node.next_functions)
    return leaves


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """Return the parts of the model that torch.compile has wrapped."""
    return [module for module in model.modules() if _is_a(module, "OptimizedModule")]
