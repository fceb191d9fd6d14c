"""The objective against a slow, obvious implementation; the teacher; two processes against one."""

import math

import pytest
import ssl_case
import torch
import torch.distributed as dist
from torch import nn

from aape_ssl.method.masks import Masks, MaskSampler
from aape_ssl.method.model import Encoder, Predictor
from aape_ssl.method.objective import Pretraining, normalised_targets, nt_xent

GRID = (4, 4)


def pretraining(stem: str = "aape", **options) -> Pretraining:
    encoder = Encoder((16, 2, 2), stem, patch_size=4)
    return Pretraining(encoder, Predictor(16, depth=1, heads=2), projection_dim=8, **options)


def batch(size: int = 3, num_masks: int = 3) -> tuple[torch.Tensor, Masks, torch.Tensor]:
    index = torch.arange(10, 10 + size)
    x = torch.randn(size, 1, 4 * GRID[0], 4 * GRID[1])
    return x, MaskSampler(num_masks, "random")(index, GRID, step=5), index


# --- against the formulas, one number at a time ---


def standardise(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


def slow_targets(layers: list[torch.Tensor]) -> list[list[list[float]]]:
    """[clip][token][channel]"""
    clips = []
    for b in range(layers[0].shape[0]):
        channels = []
        for d in range(layers[0].shape[2]):
            columns = [standardise(layer[b, :, d].tolist()) for layer in layers]
            channels.append([sum(values) / len(layers) for values in zip(*columns, strict=True)])
        clips.append([standardise(list(token)) for token in zip(*channels, strict=True)])
    return clips


def cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.dist(a, [0] * len(a)) / math.dist(b, [0] * len(b))


def slow_nt_xent(views: list[list[list[float]]], index: list[int], temperature: float) -> tuple[float, float, float]:
    losses, cosines, hits = [], [], []
    for b, clip in enumerate(views):
        for m, anchor in enumerate(clip):
            others = [
                cosine(anchor, view) for c, c_views in enumerate(views) if index[c] != index[b] for view in c_views
            ]
            against = sum(math.exp(s / temperature) for s in others)
            own = [cosine(anchor, view) for n, view in enumerate(clip) if n != m]
            losses += [-math.log(math.exp(s / temperature) / (math.exp(s / temperature) + against)) for s in own]
            cosines += own
            hits.append(max(own) > max(others))
    return tuple(sum(values) / len(values) for values in (losses, cosines, hits))


@pytest.mark.parametrize("layers", [1, 3])
def test_targets(layers):
    outputs = [torch.randn(2, 5, 4) * 3 + 1 for _ in range(layers)]
    torch.testing.assert_close(normalised_targets(outputs), torch.tensor(slow_targets(outputs)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_masks", [2, 4])
@pytest.mark.parametrize("index", [[3, 5, 8], [3, 5, 3]])
def test_nt_xent(num_masks, index):
    """Also with a clip that is twice in the batch: its views are no negatives of one another."""
    views = torch.randn(3, num_masks, 4)
    expected = slow_nt_xent(views.tolist(), index, 0.3)
    got = nt_xent(views, torch.tensor(index), 0.3)
    torch.testing.assert_close(torch.stack(got), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_nt_xents_gradient_goes_to_all_views():
    """Also to those that others are contrasted with."""
    views = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: nt_xent(v, torch.tensor([3, 5, 3]), 0.3)[0], views)


def test_nt_xent_without_other_clips_is_zero():
    views = torch.randn(1, 2, 4, requires_grad=True)
    loss, _, _ = nt_xent(views, torch.tensor([0]), 0.1)
    loss.backward()
    assert loss == 0
    assert (views.grad == 0).all()


def test_the_loss_is_its_formula():
    """From the modules' own outputs: one clip, one mask, one token, one channel at a time."""
    model = pretraining(top_layers=2, regression_weight=0.7, contrastive_weight=0.4, temperature=0.2)
    nn.init.normal_(model.teacher.layers[0].linear1.weight)  # another than the student
    x, masks, index = batch()
    terms = model(x, masks, index)

    squares, views = [], []
    for b in range(3):
        clip = x[b : b + 1]
        targets = slow_targets(model.teacher.hidden(clip, 2))[0]
        views.append([])
        for m in range(3):
            visible, masked = masks.visible[b : b + 1, m : m + 1], masks.masked[b : b + 1, m : m + 1]
            tokens = model.student(clip, visible)
            for token, prediction in zip(
                masked[0, 0], model.predictor(tokens, visible, masked, GRID)[0, 0], strict=True
            ):
                squares += [(p - t) ** 2 for p, t in zip(prediction.tolist(), targets[token], strict=True)]
            views[b].append(model.projection(tokens[0, 0].mean(0)).tolist())
    contrastive, agreement, top1 = slow_nt_xent(views, index.tolist(), 0.2)
    regression = sum(squares) / len(squares)
    expected = [0.7 * regression + 0.4 * contrastive, regression, contrastive, agreement, top1]
    torch.testing.assert_close(torch.stack(terms[:5]), torch.tensor(expected), atol=1e-5, rtol=1e-4)


# --- what gradients reach ---


def test_gradients_reach_the_student_and_not_the_teacher():
    model = pretraining()
    model(*batch()).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("teacher.")}


@pytest.mark.parametrize("stem", ["aape", "aape-fixed", "conv", "conv+mlp"])
def test_masked_pixels_reach_the_loss_through_the_teacher_alone(stem):
    """With the teacher's targets held, the loss has exactly no gradient by a pixel that every mask hides."""
    model = pretraining(stem)
    x, masks, index = batch()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, masks, index).loss, x)
    patches = gradient.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)  # [B, N, P_f·P_t]
    for b in range(3):
        seen = torch.zeros(16, dtype=torch.bool)
        seen[masks.visible[b].flatten()] = True
        assert not seen.all()
        assert (patches[b, ~seen] == 0).all()
        assert (patches[b, seen] != 0).any(-1).all()


def test_without_the_contrastive_term_there_is_no_projection():
    model = pretraining(contrastive_weight=0.0)
    x, masks, index = batch(num_masks=1)
    terms = model(x, masks, index)
    assert terms.loss == terms.regression
    assert not any(name.startswith("projection") for name in model.state_dict())


def test_bfloat16_autocast_computes_the_loss_in_float32():
    model, given = pretraining(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(*given)
    assert all(term.dtype == torch.float32 for term in terms[:5])
    torch.testing.assert_close(terms.loss, model(*given).loss, rtol=0.05, atol=0)


# --- the teacher ---


def test_the_teacher_follows_its_schedule():
    model = pretraining(ema=(0.5, 0.9), ema_steps=4)
    expected = [parameter.detach().clone() for parameter in model.teacher.parameters()]
    for decay in (0.5, 0.6, 0.7, 0.8, 0.9, 0.9):
        assert model.decay == pytest.approx(decay)
        for parameter in model.student.parameters():
            nn.init.normal_(parameter)
        expected = [decay * e + (1 - decay) * s for e, s in zip(expected, model.student.parameters(), strict=True)]
        model.update_teacher()
    assert int(model.updates) == 6
    for got, parameter in zip(model.teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(got, parameter)


def test_the_schedule_is_in_the_state_dict():
    model, other = pretraining(), pretraining()
    for _ in range(3):
        model.update_teacher()
    other.load_state_dict(model.state_dict())
    assert int(other.updates) == 3


# --- several processes ---


def _loss_and_gradients(model: nn.Module, given: tuple) -> tuple[torch.Tensor, list[torch.Tensor]]:
    terms = model(*given)
    terms.loss.backward()
    return terms.loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def _of_a_half(model: nn.Module, x: torch.Tensor, masks: Masks, index: torch.Tensor) -> tuple:
    mine = [tensor.chunk(2)[dist.get_rank()] for tensor in (x, *masks, index)]
    loss, gradients = _loss_and_gradients(
        nn.parallel.DistributedDataParallel(model), (mine[0], Masks(*mine[1:3]), mine[3])
    )
    dist.all_reduce(loss)
    return loss / 2, gradients


def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    """Loss and every gradient, to 1e-5; a loss without the other rank's negatives is far off."""
    model, given = pretraining(contrastive_weight=1.0), batch(4)
    (loss, gradients), _ = ssl_case.in_processes(tmp_path / "processes", _of_a_half, model, *given)
    expected_loss, expected = _loss_and_gradients(model, given)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for got, gradient in zip(gradients, expected, strict=True):
        assert (got - gradient).norm() <= 1e-5 * gradient.norm()
    x, masks, index = given
    halves = [model(x[half], Masks(*(m[half] for m in masks)), index[half]).loss for half in (slice(2), slice(2, 4))]
    assert abs(sum(halves) / 2 - loss) > 1e-2 * loss


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature: expected a number in \(0, inf\), got 0.0"),
        ({"temperature": math.nan}, r"temperature: expected a number in \(0, inf\), got nan"),
        ({"temperature": math.inf}, r"temperature: expected a number in \(0, inf\), got inf"),
        ({"regression_weight": math.nan}, r"regression_weight: expected a number in \[0, inf\), got nan"),
        ({"contrastive_weight": math.inf}, r"contrastive_weight: expected a number in \[0, inf\), got inf"),
        ({"ema": (0.9,)}, r"ema: expected two decays in \[0, 1\], got \(0.9,\)"),
        ({"top_layers": 1.5}, "top_layers: expected an int, at least 1, got 1.5"),
        ({"top_layers": True}, "top_layers: expected an int, at least 1, got True"),
        ({"top_layers": None}, "top_layers: expected an int, at least 1, got None"),
        ({"ema": (0.9, 1.1)}, r"ema: expected two decays in \[0, 1\], got \(0.9, 1.1\)"),
        ({"ema_steps": 0}, "ema_steps: expected an int, at least 1, got 0"),
        ({"top_layers": 0}, "top_layers: expected an int, at least 1, got 0"),
        ({"regression_weight": 0.0, "contrastive_weight": 0.0}, "expected one of them above 0, got 0 and 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pretraining(**options)


def test_bad_combinations():
    with pytest.raises(ValueError, match="predictor: expected encoder_dim 16, the encoder's, got 8"):
        Pretraining(Encoder((16, 1, 2), patch_size=4), Predictor(8, heads=2))
    with pytest.raises(ValueError, match="masks: expected at least 2 a clip for the contrastive term, got 1"):
        pretraining()(*batch(num_masks=1))
