"""Pre-training as a LightningModule: optimiser, schedule, the teacher's steps, and what stops a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .._lightning import rank_zero_warn
from .._messages import at_least
from ..method.masks import MaskSampler
from ..method.model import Encoder, Predictor, StemName
from ..method.objective import Pretraining, Terms
from .optimisation import adamw, check_rates, grouped
from .sharding import ShardedStrategy, check_strategy, shard
from .steps import NonFiniteError, SteppingModule

__all__ = ["NonFiniteError", "PretrainingModule"]


SCALARS = ("loss", "regression", "contrastive", "agreement", "top1")


class PretrainingModule(SteppingModule):
    """Pre-trains an `Encoder` by the objective `Pretraining`; batches are {"log_mel": (B, 1, F, T), "index": (B)}.

    AdamW, with warm-up and cosine (`warmup_cosine`) over the trainer's `max_steps`, which must be given; no decay of
    biases, norms, the mask token or the stem's `no_weight_decay()`. Accumulation, clipping and precision are the
    trainer's. Masks are drawn from (seed, optimiser step, micro-batch, clip): only the initial weights are drawn
    from a global generator.

    Args:
        size: of the encoder: tiny, small, base, or [width, depth, heads].
        stem: aape; the controls aape-fixed (filters do not adapt to patches), conv and conv+mlp.
        patch_size: mel bins and frames of a patch, or one for both.
        stem_options: a dict of further arguments of the stem, such as {"num_states": 32}.
        predictor_dim: the predictor's width; the encoder's unless given.
        predictor_depth: the predictor's layers.
        predictor_heads: the predictor's attention heads.
        masks: `MaskSampler`.
        top_layers: the teacher's last layers whose mean is the target.
        regression_weight: of the loss's first term.
        contrastive_weight: of the loss's second term; 0 leaves it out.
        temperature: of the contrastive term.
        projection_dim: length of the contrastive term's vectors.
        ema: the teacher's decay, first and last.
        ema_steps: optimiser steps from the first decay to the last.
        lr: the highest, for the batch as it is (not scaled by its size).
        betas: AdamW's.
        weight_decay: AdamW's.
        warmup_steps: optimiser steps.
        compile: whether to run the objective through `torch.compile`; layer by layer where it is sharded.

    Errors: `ValueError` naming the argument, or the trainer's, such as weights in 16 bits; `NonFiniteError` while
    training. Loading a checkpoint with other options is a `ValueError` that names them.
    Source: M2D's optimisation (AdamW (.9, .95), 3e-4 at batch 256, weight decay .05); the rest as `Pretraining` says.
    """

    def __init__(
        self,
        size: str | tuple[int, int, int] = "base",
        stem: StemName = "aape",
        patch_size: int | tuple[int, int] = 16,
        stem_options: dict[str, Any] | None = None,
        predictor_dim: int | None = None,
        predictor_depth: int = 2,
        predictor_heads: int = 6,
        masks: MaskSampler = MaskSampler(),  # noqa: B008  # frozen
        top_layers: int = 8,
        regression_weight: float = 1.0,
        contrastive_weight: float = 0.1,
        temperature: float = 0.1,
        projection_dim: int = 128,
        ema: tuple[float, float] = (0.9998, 0.99999),
        ema_steps: int = 100_000,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup_steps: int = 1000,
        compile: bool = False,  # noqa: A002  # torch's own name
    ) -> None:
        super().__init__()
        self.options = {name: value for name, value in locals().items() if name in OPTIONS} | {"masks": asdict(masks)}
        self.masks = masks
        encoder = Encoder(size, stem, patch_size, stem_options)
        predictor = Predictor(encoder.size.dim, predictor_dim, predictor_depth, predictor_heads)
        self.objective = Pretraining(
            encoder,
            predictor,
            top_layers=top_layers,
            regression_weight=regression_weight,
            contrastive_weight=contrastive_weight,
            temperature=temperature,
            projection_dim=projection_dim,
            ema=ema,
            ema_steps=ema_steps,
        )
        check_rates(lr, betas, weight_decay)
        at_least(0, warmup_steps=warmup_steps)
        self.lr, self.betas, self.weight_decay, self.warmup_steps = lr, betas, weight_decay, warmup_steps
        self.compiled = compile
        self._micro_batches: list[tuple[Terms, Tensor]] = []

    def configure_model(self) -> None:
        """Shard and compile the objective if trainer and options say so.

        Errors: `ValueError` for strategies that shard in another way (`check_strategy`).
        """
        strategy = self.trainer.strategy
        check_strategy(strategy)
        frames = getattr(getattr(self.trainer, "datamodule", None), "frames", None)
        if frames is not None:
            self.objective.student.check_frames(frames)
        self.check_precision()
        if isinstance(strategy, ShardedStrategy):
            shard(self.objective, strategy.device_mesh["data_parallel"], strategy.root_device, self.compiled)
        elif self.compiled:
            self.objective.compile()

    # --- a step ---

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """The loss of one micro-batch, with what callbacks look at: its `Terms` and `Masks`."""
        x, index = batch["log_mel"], batch["index"]
        grid = self.objective.student.grid(x)
        masks = self.masks(index, grid, self.global_step, len(self._micro_batches)).to(x.device)
        terms: Terms = self.objective(x, masks, index)
        self._micro_batches.append((terms, index))
        loss = self.accumulated(terms.loss, batch_idx)
        values = {f"train/{name}": getattr(terms, name).detach() for name in SCALARS}
        self.log_dict(values, batch_size=len(x), sync_dist=True)
        return {"loss": loss, "terms": terms, "masks": masks}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the teacher's decay, too."""
        super().on_before_optimizer_step(optimizer)
        self.log("train/ema_decay", self.objective.decay)

    def what_is_not_finite(self, norm: Tensor) -> str:
        """The micro-batch and its clips, for a message."""
        for i, (terms, index) in enumerate(self._micro_batches):
            if not terms.loss.isfinite():
                values = ", ".join(f"{name} {float(getattr(terms, name).detach()):.4g}" for name in SCALARS[:3])
                clips = ", ".join(map(str, index.tolist()[:8])) + (", ..." if len(index) > 8 else "")
                return f"optimiser step {self.global_step}, micro-batch {i}: {values}; clips {clips}"
        if norm.isfinite():
            return f"optimiser step {self.global_step}: a loss of another process is no number"
        return f"optimiser step {self.global_step}: the norm of the gradient is {float(norm)}, with finite losses"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One real step for all accumulated micro-batches, and the teacher's step after it."""
        super().optimizer_step(*args, **kwargs)
        if not self.skipped:
            self.objective.update_teacher()
        self._micro_batches.clear()

    # --- optimiser and schedule ---

    def configure_optimizers(self) -> Any:
        """AdamW, and warm-up and cosine over the trainer's `max_steps`."""
        # not `estimated_stepping_batches`: for epochs it sets the loader up before a resumed run has its place
        steps = self.trainer.max_steps
        if steps < 1:
            raise ValueError(f"max_steps: expected at least 1, at whose end the learning rate is 0, got {steps}")
        if (self.trainer.max_epochs or -1) > 0:
            rank_zero_warn(
                f"max_epochs: the learning rate rises and falls over max_steps, {steps}, also where the "
                f"{self.trainer.max_epochs} epochs end before"
            )

        exempt = {f"student.{name}" for name in self.objective.student.no_weight_decay()}
        groups = grouped(self.objective, lambda name: self.lr, exempt, self.weight_decay)
        return adamw(groups, self.betas, self.warmup_steps, steps)


OPTIONS = frozenset(inspect.signature(PretrainingModule).parameters) - {"compile"}
"""What makes a run this one; compiling does not."""
