"""Lane: the model again, over the same storage, with autograd leaves, gradients and a stream of its own.

A lane carries one batch at a time. Two passes through *one* module would mix their gradients; two lanes cannot, and
yet each sees what the other writes, since `parameter.data` shares the storage but not the version counter that would
make autograd refuse a backward pass whose weights have moved on.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from asyncprop.devices import Device, tensors_in
from asyncprop.engine.checks import compiled_parts
from asyncprop.engine.layers import Layer
from asyncprop.engine.turn import NOTHING, Moment, Turn
from asyncprop.engine.versions import Versions
from asyncprop.recorder import Recorder


class Lane:
    """One copy of the model over the user's storage, and what the pass in it has read.

    Attributes:
        device, stream: where its passes are queued.
        module: what `loss_fn` is handed.
        leaves: the lane's parameter for each name of `model.named_parameters()`.
        read: the version of each layer that the current pass read.
        values_read: the values of each parameter that it read, if `keep_values` was called.
    """

    def __init__(
        self, index: int, model: nn.Module, layers: tuple[Layer, ...], versions: Versions, device: Device
    ) -> None:
        self.index = index
        self.layers = layers
        self.device = device
        self.stream = device.stream(index)
        with device.use(self.stream):  # a leaf remembers the stream that was current at its creation
            self.module = share_storage(model, {name for layer in layers for name in layer.parameters})
        self.leaves = dict(self.module.named_parameters())
        self.read = [0] * len(layers)
        self._unread = bytearray(len(layers))
        self.values_read: dict[str, Tensor] = {}
        self._never_called = set(range(len(layers)))  # whose read is noted when a pass begins, for want of better
        self._batch = 0
        self._versions = versions
        self._turn: Turn | None = None
        self._recorder: Recorder | None = None
        self._handles: list[Any] = []
        self._buffers = [
            (module, name, buffer)
            for module in self.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def watch_reads(self, turn: Turn | None, recorder: Recorder | None = None) -> None:
        """Note each layer's version when the pass first calls one of its modules, not when the pass begins.

        A compiled module is left alone (a hook that counts would be traced into it): its layers count as read when
        the pass begins, and so do layers whose modules are never called (a tied weight used as a plain tensor).
        """
        self._turn, self._recorder = turn, recorder
        compiled = {inner for outer in compiled_parts(self.module) for inner in outer.modules()}
        for layer in self.layers:
            for name in layer.modules:
                module = self.module.get_submodule(name)
                if module not in compiled:
                    self._handles.append(module.register_forward_pre_hook(self._noting(layer.index)))
                    if turn and turn.watches_all:
                        self._handles.append(module.register_forward_hook(self._leaving(layer.index, turn)))
        if turn and turn.watches_all:
            self._watch_buffers(turn, compiled)

    def _watch_buffers(self, turn: Turn, compiled: set[nn.Module]) -> None:
        """Ask the turn before calls of modules that have buffers and no layer: frozen ones, or without parameters."""
        known = {name for layer in self.layers for name in layer.modules}

        def note(module: nn.Module, args: Any) -> None:
            with self._at("read again", -1):
                self._record_read(-1, "again")

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if self._batch >= 0:
                turn.left(self._batch, -1)

        for name, module in self.module.named_modules():
            if name not in known and module not in compiled and next(module.buffers(recurse=False), None) is not None:
                self._handles.append(module.register_forward_pre_hook(note))
                self._handles.append(module.register_forward_hook(left))

    def keep_values(self) -> None:
        """Copy each layer's parameters from now on as they are read."""
        self.values_read = {
            name: self.leaves[name].detach().clone() for layer in self.layers for name in layer.parameters
        }

    def begin(self, batch: int) -> None:
        """Start a pass: every layer counts as read now, until its module is called."""
        self._batch = batch
        self.read = self._versions.all()
        self._unread = bytearray(b"\1") * len(self.layers)
        if self.values_read:
            for layer in self._never_called:
                self._copy(layer)

    @torch.no_grad()
    def _copy(self, layer: int) -> None:
        for name in self.layers[layer].parameters:
            self.values_read[name].copy_(self.leaves[name])

    def keep_buffers_shared(self) -> None:
        """Write a buffer that the pass replaced (`self.b = new`) into the shared storage, and share it again."""
        for module, name, buffer in self._buffers:
            now = module._buffers[name]
            if now is not buffer:
                if now is not None:
                    buffer.copy_(now.detach())
                module._buffers[name] = buffer

    def close(self) -> None:
        """Take the hooks off and drop what gradients are left, so that nothing refers to the lane any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for leaf in self.leaves.values():
            leaf.grad = None

    def _noting(self, layer: int) -> Any:
        turn = self._turn

        def note(module: nn.Module, args: Any) -> None:
            if not self._unread[layer]:
                if turn and turn.watches_all:
                    with self._at("read again", layer):
                        self._record_read(layer, "again")
                return
            self._unread[layer] = 0
            with self._at("read", layer):
                self._record_read(layer)
                self.read[layer] = self._versions.of(layer)
                if self.values_read:
                    self._never_called.discard(layer)
                    self._copy(layer)

        return note

    def _leaving(self, layer: int, turn: Turn) -> Any:
        """Return a hook that tells the turn when a module has returned, and when the backward pass comes to it."""

        def read_back(gradients: Any) -> None:
            with self._at("read back", layer):
                self._record_read(layer, "back")

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if self._batch < 0:
                return
            turn.left(self._batch, layer)
            for node in {tensor.grad_fn for tensor in tensors_in(output)}:
                if node is not None:
                    node.register_prehook(read_back)

        return left

    def _at(self, moment: Moment, layer: int) -> AbstractContextManager[None]:
        """Ask the turn, unless the pass is one that only warms a compiled part up."""
        return self._turn.at(self._batch, moment, layer) if self._turn and self._batch >= 0 else NOTHING

    def _record_read(self, layer: int, detail: str = "") -> None:
        if self._recorder and self._batch >= 0:
            now = self._recorder.now()
            self._recorder.add("read", now, now, self.index, self._batch, layer, detail)


def share_storage(model: nn.Module, trainable: set[str]) -> nn.Module:
    """Copy `model` so that parameters and buffers keep their storage, and tied ones stay tied.

    Args:
        model: any module that `copy.deepcopy` can copy.
        trainable: names of the parameters that get gradients in the copy; the others are frozen there.

    Raises:
        ValueError: if the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = _leaf_over(parameter, requires_grad=name in trainable)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.data
    for module in compiled_parts(model):  # the compiler's context is shared: each lane is compiled by it
        memo[id(module.dynamo_ctx)] = module.dynamo_ctx
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"model must be one that copy.deepcopy can copy ({type(model).__name__}: {str(error).splitlines()[0]}): "
            "keep only parameters, buffers and plain values as its attributes"
        ) from error


def _leaf_over(parameter: nn.Parameter, *, requires_grad: bool) -> nn.Parameter:
    leaf = nn.Parameter(parameter.data, requires_grad=requires_grad)
    leaf.__dict__.update(parameter.__dict__)
    if requires_grad:
        for hook in (parameter._backward_hooks or {}).values():
            leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    return leaf


def shares_storage(model: nn.Module, lane: Lane) -> bool:
    """Tell whether the lane still lies over the model's storage and has its modes (train/eval, requires_grad)."""
    trainable = {name for layer in lane.layers for name in layer.parameters}
    pairs = zip(model.named_parameters(), lane.module.parameters(), strict=False)
    buffers = zip(model.buffers(), lane.module.buffers(), strict=False)
    modes = zip(model.modules(), lane.module.modules(), strict=False)
    return (
        all(p.data_ptr() == leaf.data_ptr() and leaf.requires_grad == (n in trainable) for (n, p), leaf in pairs)
        and all(theirs.data_ptr() == ours.data_ptr() for theirs, ours in buffers)
        and all(theirs.training == ours.training for theirs, ours in modes)
    )
