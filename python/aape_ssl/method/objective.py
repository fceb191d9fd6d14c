"""The objective: masked prediction of a teacher's tokens, and consistency across masks. Pure torch."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .._messages import whole, within
from .masks import Masks
from .model import Encoder, Predictor, gather_tokens

__all__ = ["Pretraining", "Terms", "normalised_targets", "nt_xent"]


class Terms(NamedTuple):
    """What one batch gives; all but `loss` are detached.

    Attributes:
        loss: regression_weight · regression + contrastive_weight · contrastive.
        regression, contrastive: the two terms; contrastive is 0 where its weight is.
        agreement: mean cosine between the views of one clip.
        top1: share of views whose nearest view, other clips' included, is of their own clip.
        student: visible tokens (B, M, N_v, D).
        teacher: tokens of the whole clip (B, N, D), before any normalisation of targets.
    """

    loss: Tensor
    regression: Tensor
    contrastive: Tensor
    agreement: Tensor
    top1: Tensor
    student: Tensor
    teacher: Tensor


def normalised_targets(layers: list[Tensor]) -> Tensor:
    """Layers' outputs (B, N, D) each -> targets (B, N, D), in float32.

        LayerNorm_D( mean over layers of InstanceNorm_N(layer) ),   both without learned weights, ε = 1e-5

    Instance norm standardises every channel over the clip's tokens, so that no layer outweighs the others and a
    constant teacher leaves nothing to predict. Source: data2vec 2.0, EAT.
    """
    total = sum(F.instance_norm(layer.float().mT) for layer in layers)
    mean = torch.as_tensor(total).mT / len(layers)
    return F.layer_norm(mean, mean.shape[-1:])


class _Gather(torch.autograd.Function):
    """The batches of all ranks, one after the other. Every rank's loss depends on all of them: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        everyone = local.new_empty(dist.get_world_size() * len(local), *local.shape[1:])
        dist.all_gather(list(everyone.chunk(dist.get_world_size())), local.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(local: Tensor) -> Tensor:
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _Gather.apply(local) if several else local  # type: ignore[no-untyped-call]


def nt_xent(views: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """NT-Xent between the M views of each clip, against the views of all other clips on all ranks.

        −log( e^{s⁺/τ} / (e^{s⁺/τ} + Σ e^{s⁻/τ}) ),   mean over ordered pairs of views of one clip

    s is the cosine; s⁺ that of the pair, s⁻ those with every view of other clips. The clip's remaining views are not
    negatives, nor are views of the same clip elsewhere in the batch. For M = 2 this is SimCLR's. Without other clips
    it is 0.

    Args:
        views: (B, M, P), M ≥ 2. Every rank must have the same B.
        index: (B), which clip.
        temperature: τ.

    Returns: the loss, the mean cosine of a pair and the share of views whose nearest view is a positive; the latter
    two without gradient. With several ranks, the loss is that of this rank's views: DDP's mean is the global batch's.
    Source: SimCLR (arXiv 2002.05709); more than two views, ours.
    """
    views = F.normalize(views, dim=-1)
    count = views.shape[1]
    others = _gather(views)
    same = index[:, None] == _gather(index)  # [B, B of all ranks]
    # a finite number instead of −∞: where there are no other clips the gradient of logsumexp stays 0
    negative = torch.einsum("bmp,cnp->bmcn", views, others) / temperature
    negative = negative.masked_fill(same[:, None, :, None], -1e30).flatten(2)  # [B, M, all views]
    cosine = torch.einsum("bmp,bnp->bmn", views, views)
    # off the diagonal, without a mask, whose number of elements torch.compile cannot know: in row-major order, after
    # the first element, every (M + 1)-th is on the diagonal
    pairs = cosine.flatten(1)[:, 1:].unflatten(1, (count - 1, count + 1))[..., :-1]
    positive = pairs.reshape(-1, count, count - 1) / temperature  # [B, M, M − 1]
    loss = F.softplus(negative.logsumexp(-1, keepdim=True) - positive).mean()
    top1 = positive.amax(-1) > negative.amax(-1)
    return loss, positive.detach().mean() * temperature, top1.float().mean()


class Pretraining(nn.Module):
    """Masked teacher–student pre-training with several masks a clip and a contrastive objective across them.

        L = w_r · mean (prediction − target)² + w_c · NT-Xent(views)

    The student encodes the visible tokens of each mask; a predictor regresses the normalised mean of the teacher's
    top layers (`normalised_targets`) at the masked tokens; the mean of a mask's visible tokens, through a two-layer
    projection, is the clip's view under that mask (`nt_xent`). The teacher, an exponential moving average of stem and
    encoder, sees the whole clip, once for all masks, and gets no gradient.

    Args:
        encoder: the student; the teacher starts as its copy.
        predictor: of the same D.
        top_layers: K, how many of the teacher's last layers the target averages; all if it has fewer.
        regression_weight, contrastive_weight: w_r and w_c; with w_c = 0 there is no projection.
        temperature: τ.
        projection_dim: of the views.
        ema: decay of the teacher at first, and from optimiser step `ema_steps` on; linear in between.
        ema_steps: optimiser steps.

    Errors: `ValueError` naming the argument.
    Source: the paper for teacher–student, several masks and contrastive term; K, schedule and targets are data2vec
    2.0's and EAT's, τ and `projection_dim` AudioMosaic's. The paper's weights are not public; 1 and 0.1, with which
    both terms are below 1 at first, and everything else are ours.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        *,
        top_layers: int = 8,
        regression_weight: float = 1.0,
        contrastive_weight: float = 0.1,
        temperature: float = 0.1,
        projection_dim: int = 128,
        ema: tuple[float, float] = (0.9998, 0.99999),
        ema_steps: int = 100_000,
    ) -> None:
        super().__init__()
        dim = encoder.size.dim
        if predictor.head.out_features != dim:
            raise ValueError(f"predictor: expected encoder_dim {dim}, the encoder's, got {predictor.head.out_features}")
        whole(1, top_layers=top_layers, ema_steps=ema_steps, projection_dim=projection_dim)
        if len(ema) != 2 or not all(0 <= decay <= 1 for decay in ema):
            raise ValueError(f"ema: expected two decays in [0, 1], got {ema}")
        within("(0, inf)", temperature=temperature)
        within("[0, inf)", regression_weight=regression_weight, contrastive_weight=contrastive_weight)
        if not (regression_weight or contrastive_weight):
            raise ValueError("regression_weight, contrastive_weight: expected one of them above 0, got 0 and 0")
        self.top_layers, self.temperature = top_layers, temperature
        self.regression_weight, self.contrastive_weight = regression_weight, contrastive_weight
        self.ema, self.ema_steps = ema, ema_steps
        self.student, self.predictor = encoder, predictor
        self.projection = (
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, projection_dim))
            if contrastive_weight
            else None
        )
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, masks: Masks, index: Tensor) -> Terms:
        """The terms for log-mel clips x (B, 1, F, T), their masks and indices (B).

        Errors: `ValueError` for a contrastive term with one mask a clip.
        """
        visible, masked = masks
        if self.projection is not None and visible.shape[1] < 2:
            raise ValueError("masks: expected at least 2 a clip for the contrastive term, got 1")
        layers = self.teacher_layers(x)
        student = self.student(x, visible)
        predictions = self.predictor(student, visible, masked, self.student.grid(x))
        views = self.projection(student.mean(2)) if self.projection is not None else None

        with torch.autocast(x.device.type, enabled=False):
            targets = gather_tokens(normalised_targets(layers), masked)
            regression = F.mse_loss(predictions.float(), targets)
            contrastive = agreement = top1 = torch.zeros_like(regression)
            if views is not None:
                contrastive, agreement, top1 = nt_xent(views.float(), index, self.temperature)
            loss = self.regression_weight * regression + self.contrastive_weight * contrastive
        return Terms(loss, *(t.detach() for t in (regression, contrastive, agreement, top1, student, layers[-1])))

    @torch.no_grad()
    def teacher_layers(self, x: Tensor) -> list[Tensor]:
        """Outputs (B, N, D) of the teacher's top layers for whole clips."""
        return self.teacher.hidden(x, self.top_layers)

    @property
    def decay(self) -> float:
        """The teacher's decay at its next update."""
        start, end = self.ema
        return start + (end - start) * min(int(self.updates) / self.ema_steps, 1.0)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """teacher ← decay · teacher + (1 − decay) · student; to be called after every optimiser step, and only then."""
        average = get_ema_multi_avg_fn(self.decay)
        average(tuple(self.teacher.parameters()), tuple(self.student.parameters()), None)
        self.updates += 1
