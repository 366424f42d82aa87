"""torch's own ways to train on several ranks, with the face of a trainer: DistributedDataParallel, post-local SGD."""

from __future__ import annotations

from typing import Any, Literal

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from asyncprop.delay import Delays
from asyncprop.engine.passes import LossFn
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.recorder import Recorder

CommHook = Literal["none", "fp16", "bf16", "powersgd"]


class DdpLoop(SequentialLoop):
    """The plain loop over DistributedDataParallel: gradients are all-reduced in each backward pass.

    Args:
        model, optimizer, loss_fn, delays, trace: as for the plain loop.
        comm_hook: torch's compression of gradients: none, to float16, to bfloat16 (CUDA only), or to low rank
            (PowerSGD).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        delays: Delays,
        trace: Recorder | None = None,
        comm_hook: CommHook = "none",
    ) -> None:
        wrapped = DistributedDataParallel(model)
        super().__init__(wrapped, optimizer, loss_fn, delays=delays, trace=trace)
        if comm_hook in ("fp16", "bf16"):
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            if comm_hook == "bf16" and next(model.parameters()).device.type != "cuda":
                raise ValueError(
                    "comm_hook bf16 needs a CUDA device, as torch's hook does: take fp16, or --device cuda"
                )
            hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
            wrapped.register_comm_hook(None, hooks[comm_hook])
        elif comm_hook == "powersgd":
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

            state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=10)
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def settle(self) -> None:
        """Copy the first rank's buffers: parameters have been equal after every step."""
        for buffer in self._model.buffers():
            distributed.broadcast(buffer, src=0)


class PostLocalSgdLoop(SequentialLoop):
    """torch's post-local SGD: gradients all-reduced at first, then local steps with parameters averaged periodically.

    Args:
        model, optimizer, loss_fn, delays, trace: as for the plain loop.
        period: local steps between two averages.
        warm_up_batches: steps with all-reduced gradients at first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        delays: Delays,
        trace: Recorder | None = None,
        period: int,
        warm_up_batches: int,
    ) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hooks
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        wrapped = DistributedDataParallel(model)
        alone, _ = distributed.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
        state = hooks.PostLocalSGDState(None, alone, warm_up_batches, False)  # type: ignore[no-untyped-call]
        wrapped.register_comm_hook(state, hooks.post_localSGD_hook)
        super().__init__(wrapped, optimizer, loss_fn, delays=delays, trace=trace)
        self._averager = PeriodicModelAverager(period=period, warmup_steps=warm_up_batches)

    def settle(self) -> None:
        """Average parameters and buffers."""
        for parameter in self._model.parameters():  # torch's averager leaves views of one storage behind
            parameter.data = parameter.data.clone()
        tensors: list[Any] = [*self._model.parameters(), *self._model.buffers()]
        for tensor in tensors:
            distributed.all_reduce(tensor.data)
            if tensor.is_floating_point():
                tensor.data /= distributed.get_world_size()
            else:
                tensor.data //= distributed.get_world_size()

    def _step(self) -> float:
        met = super()._step()
        self._averager.average_parameters(self._optimizer.param_groups)
        return met
