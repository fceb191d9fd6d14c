"""What the diagnostics say of tokens that are known, and of runs that are broken on purpose."""

import csv
import math

import numpy as np
import pytest
import ssl_case
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from aape_kernels import AaPE
from aape_ssl._lightning import Callback, CSVLogger, TensorBoardLogger
from aape_ssl.method import diagnostics
from aape_ssl.method.masks import Masks, MaskSampler
from aape_ssl.method.model import make_stem
from aape_ssl.training.monitor import TAG, CollapseWarning, Monitor, first_attention, picture

D = 64


def spread(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D)


COLLAPSES = {
    "none": spread(16, 20),
    "constant": spread(1, 1).expand(16, 20, D) + 1e-6 * spread(16, 20),
    "zero": torch.zeros(16, 20, D),
    "rank 1": torch.randn(16, 20, 1) * spread(1, 1),
    "places": spread(1, 20).expand(16, 20, D) + 1e-3 * spread(16, 20),
}
"""Tokens (clips, places, D)."""


def values_of(tokens: torch.Tensor) -> dict[str, float]:
    return {
        "teacher_std": float(diagnostics.token_std(tokens)),
        "teacher_content_std": float(diagnostics.content_std(tokens)),
        "teacher_rankme": float(diagnostics.rankme(tokens)),
    }


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("none", set()),
        ("constant", {"teacher_std", "teacher_content_std", "teacher_rankme"}),
        ("zero", {"teacher_std", "teacher_content_std", "teacher_rankme"}),
        ("rank 1", {"teacher_rankme"}),
        ("places", {"teacher_content_std"}),
    ],
)
def test_each_collapse_is_found_by_what_can_see_it(case, found):
    values = values_of(COLLAPSES[case])
    line = diagnostics.collapse(values, D)
    assert {name for name in values if line and f"{name} " in line} == found
    if case == "none":
        assert values["teacher_std"] == pytest.approx(1 / math.sqrt(D), rel=0.05)
        assert values["teacher_rankme"] > 0.8 * D


def test_numbers_that_are_none_are_a_collapse():
    assert "student_std nan" in diagnostics.collapse({"student_std": math.nan}, D)


def test_rankme_of_known_spectra():
    assert diagnostics.rankme(3 * torch.eye(5)) == pytest.approx(5)
    assert diagnostics.rankme(torch.ones(7, 4)) == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert diagnostics.rankme(torch.diag(8 * p)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    many = torch.randn(3 * diagnostics.MAX_TOKENS, 4)
    assert diagnostics.rankme(many) == pytest.approx(float(diagnostics.rankme(many[::3])))


def test_filter_positions():
    stem, x = AaPE(patch_size=4, embed_dim=8, num_states=4), torch.randn(3, 1, 16, 16)
    untouched = diagnostics.filter_positions(stem, x)
    assert [diagnostics.at_bounds(positions) for positions in untouched.values()] == [0, 0]
    decay, frequency = stem.analyse(x)
    low, high = stem.decay
    torch.testing.assert_close(untouched["decay"].view_as(decay), torch.log(decay / low) / math.log(high / low))
    assert len(untouched["frequency"]) == frequency.numel()
    with torch.no_grad():
        stem.encoder.b2[0], stem.encoder.b2[4], stem.encoder.b2[5] = -50, 50, -50
    moved = diagnostics.filter_positions(stem, x)
    assert {name: diagnostics.at_bounds(positions) for name, positions in moved.items()} == {
        "decay": 0.25,
        "frequency": 0.5,
    }


@pytest.mark.parametrize("name", ["aape", "aape-fixed", "conv+mlp"])
def test_branch_ratio(name):
    """Doubles with the branch, and is that of its own output."""
    stem, x = make_stem(name, 4, 8, {"num_states": 4}), torch.randn(3, 1, 16, 16)
    last = stem.fusion.weight if name.startswith("aape") else stem.branch[-1].weight
    ratio = diagnostics.branch_ratio(stem, x)
    with torch.no_grad():
        whole = stem(x)
        last.mul_(2)
        assert diagnostics.branch_ratio(stem, x) == pytest.approx(2 * ratio, rel=1e-4)
        branch = stem(x) - whole
        last.zero_()
        plain = stem(x) - stem.proj.bias
    assert ratio == pytest.approx(float(branch.norm() / plain.norm()), rel=1e-4)


def test_the_plain_stem_has_no_branch():
    assert diagnostics.branch_ratio(make_stem("conv", 4, 8), torch.randn(1, 1, 8, 8)) is None


# --- while training ---


class NoStopGradient(Callback):
    """The teacher is the student itself, and learns to be predicted."""

    def on_fit_start(self, trainer, pl_module):
        objective = pl_module.objective
        objective.teacher_layers = lambda x: objective.student.hidden(x, objective.top_layers)


class ConstantTeacher(Callback):
    def on_fit_start(self, trainer, pl_module):
        for parameter in pl_module.objective.teacher.parameters():
            parameter.data.zero_()
        pl_module.objective.ema = (1.0, 1.0)


def fit(folder, steps: int, *callbacks: Callback, **options) -> None:
    of_trainer = {"logger": options.pop("logger", False), "precision": options.pop("precision", None)}
    module = ssl_case.module(**options)
    trainer = ssl_case.trainer(folder, steps=steps, every=steps, callbacks=[Monitor(10), *callbacks], **of_trainer)
    trainer.fit(module, ssl_case.Tensors())


@pytest.mark.parametrize(("broken", "steps"), [(ConstantTeacher(), 10), (NoStopGradient(), 150)])
def test_a_broken_teacher_trips_the_warning(tmp_path, broken, steps):
    with pytest.warns(CollapseWarning, match=r"optimiser step \d+0: the representation collapses: .*content_std"):
        fit(tmp_path, steps, broken, contrastive_weight=0.0)


def test_a_sound_run_does_not(tmp_path):
    fit(tmp_path, 150)


def test_what_is_logged(tmp_path):
    loggers = [CSVLogger(tmp_path, "csv", 0), TensorBoardLogger(tmp_path, "board", 0)]
    fit(tmp_path, 20, logger=loggers)
    with open(tmp_path / "csv" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = {int(row["step"]): row for row in rows if row["tokens/teacher_rankme"]}
    assert steps.keys() == {10, 20}
    expected = {"stem/branch_ratio", "stem/decay_at_bounds", "stem/frequency_at_bounds", "stem/encoder_grad_norm"}
    expected |= {"tokens/agreement", "tokens/top1", "tokens/student_std", "tokens/teacher_content_std"}
    assert all(math.isfinite(float(row[name])) for row in steps.values() for name in expected)
    assert all(float(row["train/grad_norm"]) > 0 for row in rows if row["train/grad_norm"])

    board = EventAccumulator(
        str(tmp_path / "board" / "version_0"), {"images": 0, "histograms": 0, "scalars": 0}
    ).Reload()
    assert [event.step for event in board.Histograms("stem/decay")] == [10, 20]
    assert [event.step for event in board.Histograms("stem/frequency")] == [10, 20]
    image = board.Images(TAG)[0]
    assert min(image.width, image.height) > 500
    assert {"train/loss", "train/lr", "train/ema_decay", "tokens/student_rankme"} <= set(board.Tags()["scalars"])


def test_the_picture_hides_what_the_student_does_not_see():
    """Bins and frames behind the last patch are in no token; axes and colours have names."""
    masks = Masks(torch.tensor([[[0, 3]]]), torch.tensor([[[1, 2]]]))  # of 2 × 2
    x = torch.rand(9, 11)
    whole, seen, attention, *bars = picture(x, masks, (4, 5), torch.tensor([0.2, 0.8])).axes
    assert np.array_equal(whole.images[0].get_array(), x)
    clip, hidden = seen.images
    assert np.array_equal(clip.get_array(), x)
    assert np.array_equal(hidden.get_array().mask, [[True, False], [False, True]])  # nothing over visible patches
    assert list(hidden.get_extent()) == list(attention.images[0].get_extent()) == [0, 10, 0, 8]
    got = attention.images[0].get_array()
    assert np.array_equal(got.mask, [[False, True], [True, False]])
    np.testing.assert_allclose(got.compressed(), [10 * math.log10(0.25), 0.0], rtol=1e-5)
    assert [text.get_text() for text in seen.get_legend().get_texts()] == ["masked"]
    assert all(axes.get_ylabel() for axes in (whole, seen, attention, *bars))
    assert attention.get_xlabel() == "frame"


@pytest.mark.parametrize("stem", ["aape", "aape-fixed", "conv", "conv+mlp"])
def test_the_attention_is_the_first_clips_under_its_first_mask(stem):
    objective, x = ssl_case.module(stem=stem).objective, torch.randn(3, 1, 16, 16)
    masks = MaskSampler(2, "random")(torch.arange(3), (4, 4), 0)
    every = objective.predictor.attention(objective.student(x, masks.visible), *masks, (4, 4))
    got = first_attention(objective, x, masks)
    assert not got.requires_grad
    torch.testing.assert_close(got, every[0, 0])
    assert not torch.allclose(every[0, 0], every[0, 1])


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"compile": True}], ids=["bfloat16", "compiled"])
def test_the_picture_of_other_runs(tmp_path, monkeypatch, options):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    fit(tmp_path, 10, logger=[TensorBoardLogger(tmp_path, "board", 0)], **options)
    board = EventAccumulator(str(tmp_path / "board" / "version_0"), {"images": 0}).Reload()
    assert [event.step for event in board.Images(TAG)] == [10]
