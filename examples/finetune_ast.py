"""Fine-tune transformers' AST with AaPE for a stem, on the demo clips: seconds on a CPU.

    pip install --constraint constraints.txt ".[demo]" transformers
    python examples/finetune_ast.py --steps 60

Each clip is a class of its own, and the model learns from crops of it. It is small and has random weights, so that
nothing has to be downloaded; a trained one would be loaded where `small_ast` is called:

    model = ASTForAudioClassification.from_pretrained("MIT/ast-finetuned-audioset-10-10-0.4593", ...)
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor, nn

from aape_kernels import replace_stem
from aape_ssl.demo.command import bundled_clips
from aape_ssl.libraries import mend
from aape_ssl.sound.audio import AUDIOSET128, load

FRAMES = 96  # of a crop; 10 ms each


def small_ast(classes: int) -> Any:
    """An AST of two layers; its stem cuts patches of 16 × 16 with a stride of 10 × 10."""
    mend()  # transformers imports torchaudio and torchvision, which may be built for another torch
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_mel_bins=AUDIOSET128.mel_bins,
        max_length=FRAMES,
        num_labels=classes,
    )
    return ASTForAudioClassification(config)


def crop(log_mel: Tensor) -> Tensor:
    """A random (FRAMES, mel bins) of a clip (mel bins, T), as AST takes it: time first; silence behind short ones."""
    start = random.randint(0, max(log_mel.shape[1] - FRAMES, 0))
    part = log_mel[:, start : start + FRAMES]
    part = nn.functional.pad(part, (0, FRAMES - part.shape[1]), value=AUDIOSET128.floor)
    return AUDIOSET128.normalise(part).T


def main() -> None:
    """Train, and print the loss as it goes and the accuracy on fresh crops."""
    parser = argparse.ArgumentParser(description="Fine-tune an AST with AaPE for a stem on the demo clips.")
    parser.add_argument("--steps", type=int, default=60, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops (default: %(default)s)")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)

    clips = [AUDIOSET128.log_mel(load(path)) for path in bundled_clips()]
    labels = torch.arange(len(clips)).repeat(2)

    def batch() -> Tensor:
        return torch.stack([crop(clips[label]) for label in labels])

    model = small_ast(len(clips))
    x = batch()
    before = model.eval()(x).logits
    replace_stem(model)
    change = (model(x).logits - before).abs().max().item()
    print(f"stem replaced: the logits change by {change:.1g}")

    # after replace_stem, so that the optimiser gets AaPE's own weights too
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for step in range(options.steps):
        loss = model(input_values=batch(), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    with torch.no_grad():
        right = (model.eval()(batch()).logits.argmax(1) == labels).float().mean().item()
    fusion = model.audio_spectrogram_transformer.embeddings.patch_embeddings.projection.fusion.weight
    print(f"accuracy on fresh crops {right:.0%}; fusion weights, zero at first, have norm {fusion.norm().item():.3f}")


if __name__ == "__main__":
    main()
