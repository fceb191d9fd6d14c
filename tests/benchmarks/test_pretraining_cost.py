"""The cost of pre-training, from counts."""

import re

import pytest

pytest.importorskip("yaml")

from benchmarks import pretraining_cost


def test_the_stem_is_counted_once_for_the_teacher_and_twice_for_the_student():
    """Laptop: 13 × 8 patches of 256 pixels, D = 128; forward in both, and the student's weight gradient."""
    options = {"size": [128, 4, 4], "masks": {"kind": "random", "num_masks": 4}, "top_layers": 3}
    options |= {"predictor_depth": 1, "predictor_heads": 4}
    total, stem = pretraining_cost.flops_of_a_clip(options, 208, "conv")
    assert stem == 3 * 2 * 13 * 8 * 256 * 128
    assert pretraining_cost.flops_of_a_clip(options, 208, "aape")[0] > total


def test_hours_are_flops_over_what_is_delivered(capsys):
    assert pretraining_cost.main(["--preset=laptop", "--gpus=2", "--steps=3000", "--peak=1e-2", "--share=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "64 clips a step on 2 GPUs, 3000 steps" in printed
    clip, hours = (float(x) for x in re.search(r"aape: ([\d.]+) GFLOP.*?: ([\d.]+) hours", printed, re.S).groups())
    assert hours == pytest.approx(clip * 64 * 3000 / (2 * 1e-2 * 1e3 * 0.5) / 3600, rel=0.05)


@pytest.mark.parametrize("wrong", ["--gpus=0", "--steps=-3", "--share=nan", "--clips=1.5"])
def test_a_number_that_cannot_be(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        pretraining_cost.main([wrong])
    assert stopped.value.code == 2
    assert f"argument {wrong.partition('=')[0]}: expected a " in capsys.readouterr().err
