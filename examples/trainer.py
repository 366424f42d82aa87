"""transformers' Trainer, trained asynchronously, on a toy language: pip install transformers accelerate.

Its data, loss, optimizer, schedule, callbacks, log and evaluation are the Trainer's own. Only its loop is replaced.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

import asyncprop as ap


class AsyncTrainer(Trainer):
    """A Trainer whose batches are trained by an Engine. It evaluates and saves by epoch, and logs by step or epoch."""

    def train(self, **options: Any) -> TrainOutput:
        """Train for `num_train_epochs`; `options` are the Engine's, such as `update="block"`."""
        loader = self.get_train_dataloader()
        epochs = int(self.args.num_train_epochs)
        self.state.max_steps = epochs * len(loader)
        self.state.compute_steps(self.args, self.state.max_steps)
        self.create_optimizer_and_scheduler(self.state.max_steps)
        self._tell("on_train_begin")
        with ap.Engine(self.model, self.optimizer, self._loss, **options) as engine:
            for epoch in range(epochs):
                self.model.train()
                self._train_epoch(engine, loader)
                self.state.epoch = epoch + 1
                self._tell("on_epoch_end")  # nothing is in flight here: the model is an ordinary one
                if self.control.should_evaluate:
                    self.evaluate()
                if self.control.should_save:
                    self.save_model()
        self._tell("on_train_end")
        return TrainOutput(self.state.global_step, self.state.log_history[-1].get("loss", float("nan")), {})

    def _train_epoch(self, engine: ap.Engine, loader: Any) -> None:
        steps: list[ap.Step] = []
        for step in engine.run(loader):
            steps.append(step)
            self.lr_scheduler.step()
            self.state.global_step += 1
            self._tell("on_step_end")
            if self.control.should_log:
                self.control.should_log = False
                losses = [step.loss for step in steps[-self.state.logging_steps :]]
                self.log({"loss": sum(losses) / len(losses), "staleness": step.mean_staleness,
                          "learning_rate": self.lr_scheduler.get_last_lr()[0]})  # fmt: skip

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.compute_loss(model, self._prepare_inputs(batch))

    def _tell(self, event: str) -> None:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control)


def make(folder: str) -> AsyncTrainer:
    """Return a Trainer of a tiny GPT-2, made from its configuration, that is to count modulo 16."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    counted = [{"input_ids": (start + torch.arange(16)) % 16} for start in torch.randint(16, (480, 1))]
    examples = [{**tokens, "labels": tokens["input_ids"]} for tokens in counted]
    args = TrainingArguments(
        folder, num_train_epochs=3, per_device_train_batch_size=16, learning_rate=3e-3, lr_scheduler_type="cosine",
        logging_steps=10, eval_strategy="epoch", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return AsyncTrainer(GPT2LMHeadModel(config), args, train_dataset=examples[:400], eval_dataset=examples[400:])


def main() -> tuple[float, float]:
    """Train; return the loss on what was not trained on, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.state.log_history[-1]["eval_loss"]


if __name__ == "__main__":
    print("loss on the held-out examples, before and after: {:.3f} {:.3f}".format(*main()))
