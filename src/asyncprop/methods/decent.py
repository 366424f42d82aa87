"""DecentLoop: the peer decent-dp (ICLR 2025), with the face of a trainer: buckets are mixed while backward goes on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from asyncprop.delay import Delays
from asyncprop.engine.optimizer import OptimizerView
from asyncprop.engine.passes import LossFn
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.recorder import Recorder


class DecentLoop(SequentialLoop):
    """The plain loop over decent-dp's own wrapper, its default topology and buckets: it steps and mixes in hooks.

    Args:
        model, optimizer, loss_fn, delays, trace: as for the plain loop.

    Raises:
        ValueError: if decent-dp is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        delays: Delays,
        trace: Recorder | None = None,
    ) -> None:
        try:
            from decent_dp.ddp import DecentralizedDataParallel  # type: ignore[import-untyped]
            from loguru import logger
        except ImportError:
            raise ValueError("method decent-dp must be installed: pip install 'asyncprop[peers]'") from None
        logger.disable("decent_dp")

        def bucket_optimizer(named: list[tuple[str, nn.Parameter]]) -> Any:
            return BucketOptimizer(optimizer, [parameter for _, parameter in named])

        self._wrapped: Any = DecentralizedDataParallel(
            model,
            bucket_optimizer,
            param_as_bucket_view=False,  # checkpoints of parameters that are views of one storage are refused
            sync_buffer_in_global_avg=True,
        )
        super().__init__(self._wrapped, optimizer, loss_fn, delays=delays, trace=trace)

    def settle(self) -> None:
        """Average parameters and buffers, by the wrapper's own means once it has buckets."""
        if self._wrapped._initialized:
            self._wrapped.global_avg(will_revert=False)
            return
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if tensor.is_floating_point():
                distributed.all_reduce(tensor.data)
                tensor.data /= distributed.get_world_size()

    def _begin(self) -> None:
        """Leave gradients alone: the wrapper's first step happens at the beginning of its second."""

    def _step(self) -> float:
        """Do nothing: the wrapper has stepped in its hooks."""
        return 0.0


class BucketOptimizer:
    """The user's optimizer for the parameters of one bucket, as the wrapper wants it: one object per bucket."""

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self._view = OptimizerView(optimizer, [(parameter, parameter) for parameter in parameters], whole=False)

    def step(self) -> None:
        """Step them."""
        self._view.step()

    def zero_grad(self) -> None:
        """Forget their gradients."""
        for parameter in self._parameters:
            parameter.grad = None
