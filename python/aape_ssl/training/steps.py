"""What pre-training and fine-tuning share: accumulation, non-finite numbers, and resuming as the same run only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._lightning import LightningModule, rank_zero_warn
from .._messages import unchanged
from ..saved.reading import made_with
from .sharding import total_norm

__all__ = ["NonFiniteError", "SteppingModule"]

OVERFLOWS = 20  # in a row, each of which halves the loss's scale: by then the scale is not the reason
ON_PURPOSE = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "precision",
)
"""The trainer's options that change a run too, but may be changed on purpose."""


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite. Raised before the optimiser's step: weights and checkpoints are good."""


class SteppingModule(LightningModule):
    """A `LightningModule` that optimises in steps of accumulated micro-batches.

    Attributes:
        options: what makes a run this one, in plain values. Checkpoints hold it; loading one with others is a
            `ValueError` that names the first that differs.
        skipped: whether the gradient scaler left out the optimiser's last step, as a gradient overflowed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.options: Mapping[str, Any] = {}
        self.skipped = False
        self._overflows = 0
        self._losses: list[Tensor] = []
        self._share = 1.0

    def accumulated(self, loss: Tensor, batch_idx: int) -> Tensor:
        """The loss of a micro-batch as its share of the step's mean.

        The trainer divides by `accumulate_grad_batches` even if an epoch ends with fewer.
        """
        self._losses.append(loss.detach())
        each, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        first = batch_idx - batch_idx % each
        count = min(each, batches - first)  # ∞ where the loader has no length
        self._share = each / max(1, count)
        return loss * self._share if count < each else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop at a loss or gradient that is not finite, before it reaches the weights, and log the gradient's norm.

        With a gradient scaler (`16-mixed`), an overflow is its way of finding the scale: that step is left out. If
        fewer micro-batches came than were expected, their mean is corrected.

        Errors: `NonFiniteError`, on all processes or on none.
        """
        missing = self.trainer.accumulate_grad_batches / (len(self._losses) * self._share)
        if missing > 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(missing)
        norm = total_norm(self.parameters())
        finite = bool(torch.stack([norm, *self._losses]).isfinite().all())  # one synchronisation a step
        # all processes must stop, or those left would wait for the others
        self.skipped = not self.trainer.strategy.reduce_boolean_decision(finite)
        self._overflows = self._overflows + 1 if self.skipped else 0
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if self.skipped and not (scaled and self._overflows < OVERFLOWS):
            raise NonFiniteError(self.what_is_not_finite(norm))
        self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[-1]["lr"]})

    def on_train_start(self) -> None:
        """Take the next step at this run's rate: a resumed optimiser has the one of the schedule that it was under."""
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
                continue  # of a module that makes its own
            rates = [
                base * each(schedule.last_epoch)
                for base, each in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def check_precision(self) -> None:
        """Errors: `ValueError` for weights in 16 bits, next to which an optimiser's steps are too small to count."""
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                "precision: expected weights in float32 (bf16-mixed, 16-mixed or 32-true), as an optimiser's steps and "
                f"those of a teacher's average are too small for 16 bits, got {self.trainer.precision}"
            )

    def what_is_not_finite(self, norm: Tensor) -> str:
        """Step, losses and gradient, for a message."""
        losses = ", ".join(f"{float(loss):.4g}" for loss in self._losses)
        return f"optimiser step {self.global_step}: loss {losses}, gradient {float(norm):.4g}"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step for all accumulated micro-batches."""
        super().optimizer_step(*args, **kwargs)
        self._losses.clear()

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the options, so that a checkpoint says what it holds."""
        checkpoint["options"] = dict(self.options)
        checkpoint["trainer"] = self._of_the_trainer()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume as another run."""
        unchanged(made_with(checkpoint), **self.options)
        trainer = checkpoint.get("trainer", {})
        for name, here in self._of_the_trainer().items():
            if name in trainer and trainer[name] != here:
                rank_zero_warn(
                    f"{name}: the checkpoint was made with {trainer[name]!r}, this run has {here!r}; "
                    "what follows is not what would have followed"
                )

    def _of_the_trainer(self) -> dict[str, Any]:
        return {name: getattr(self.trainer, name) for name in ON_PURPOSE}
