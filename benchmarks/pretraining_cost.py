"""What a pre-training run of a preset costs, from counts: FLOPs of a clip, of a step and of the run, and hours.

    python -m benchmarks.pretraining_cost --gpus 8 --steps 50000

FLOPs are counted by `torch.utils.flop_counter` over forward and backward of the preset's own model, objective and masks
(two clips, on the CPU; a multiply-add is two). Hours are those FLOPs over what the GPUs deliver: their peak, times the
share of it that training reaches, which is an assumption and not a measurement.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aape_ssl.method.masks import MaskSampler
from aape_ssl.method.model import Encoder, Predictor
from aape_ssl.method.objective import Pretraining

__all__ = ["main"]

PRESETS = Path(inspect.getfile(MaskSampler)).parents[1] / "training" / "presets"
COUNTED = 2  # clips, as the contrastive term wants two
PEAK = 989.0  # TFLOP/s of an H100's bfloat16 products, dense, by its data sheet
SHARE = 0.35  # of it
AUDIOSET = 1_900_000  # clips that can still be fetched, of 2.08 million


def flops_of_a_clip(options: dict[str, Any], frames: int, stem: str) -> tuple[float, float]:
    """Of forward and backward, and the stem's share of them: student for all masks, teacher, predictor."""
    torch.manual_seed(0)
    masks, encoder = MaskSampler(**options["masks"]), Encoder(options["size"], stem)
    sizes = (options.get("predictor_dim"), options["predictor_depth"], options["predictor_heads"])
    objective = Pretraining(encoder, Predictor(encoder.size.dim, *sizes), top_layers=options["top_layers"])
    x, index = torch.randn(COUNTED, 1, 128, frames), torch.arange(COUNTED)
    given = masks(index, objective.student.grid(x), 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # its products are counted one by one
        objective(x, given, index).loss.backward()
    counts = counter.get_flop_counts()
    stems = sum(sum(counts[name].values()) for name in counts if name.endswith(".stem"))
    return counter.get_total_flops() / COUNTED, stems / COUNTED


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def whole(text: str) -> int:
    """The same, without a fraction."""
    if not positive(text).is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}")
    return int(float(text))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(path.stem for path in PRESETS.glob("*.yaml")), default="base")
    parser.add_argument("--gpus", type=whole, default=8)
    parser.add_argument("--steps", type=whole, help="optimiser steps (default: the preset's)")
    parser.add_argument(
        "--peak", type=positive, default=PEAK, help="TFLOP/s of a GPU (default: %(default)g, an H100's)"
    )
    parser.add_argument(
        "--share", type=positive, default=SHARE, help="of the peak that is reached (default: %(default)g)"
    )
    parser.add_argument("--clips", type=whole, default=AUDIOSET, help="of the set (default: AudioSet's %(default)d)")
    given = parser.parse_args(arguments)

    preset = yaml.safe_load((PRESETS / f"{given.preset}.yaml").read_text())
    data, steps = preset["data"]["init_args"], given.steps or preset["trainer"]["max_steps"]
    batch = data["batch_size"] * given.gpus
    print(f"preset {given.preset}, {data['frames']} frames, {batch} clips a step on {given.gpus} GPUs, {steps} steps:")
    print(f"{batch * steps / 1e6:.2f} million crops, {batch * steps / given.clips:.1f} × {given.clips} clips")
    for stem in ("aape", "conv"):
        clip, own = flops_of_a_clip(preset["model"], data["frames"], stem)
        rate = given.gpus * given.peak * 1e12 * given.share / clip
        hours = batch * steps / rate / 3600
        print(
            f"{stem}: {clip / 1e9:.1f} GFLOP a clip, {own / clip:.2%} of it the stem; {clip * batch / 1e12:.2f} TFLOP "
            f"a step\n    at {given.share:.0%} of {given.peak:g} TFLOP/s a GPU: {hours:.1f} hours, if {rate:.0f} clips "
            "a second are decoded"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
