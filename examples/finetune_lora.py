"""Fine-tune an AST with AaPE for a stem by LoRA, on the demo clips: seconds on a CPU.

    pip install --constraint constraints.txt ".[demo]" transformers peft
    python examples/finetune_lora.py --steps 60

What was there before stays frozen: attention gets adapters of low rank, and what is new, the stem's branch and the
head, is trained and saved whole. Each clip is a class of its own, and the model learns from crops of it. It is small
and has random weights, so that nothing has to be downloaded, unless `--model` names a trained one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aape_kernels import replace_stem
from aape_ssl.demo.command import bundled_clips
from aape_ssl.libraries import mend
from aape_ssl.sound.audio import AUDIOSET128, load

ADAPTED = ["q_proj", "v_proj"]  # of attention; "query" and "value" in older transformers
# AaPE's own parameters, which the base model's checkpoint lacks; the convolution beside them stays as it is
WHOLE = ["projection.encoder", "projection.sblu", "projection.fusion", "classifier"]


def base(name: str | None, classes: int, seed: int) -> Any:
    """The model that is adapted, its stem not yet replaced; the same weights for the same seed."""
    mend()  # transformers imports torchaudio and torchvision, which may be built for another torch
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(seed)
    if name is None:
        config = ASTConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_mel_bins=AUDIOSET128.mel_bins,
            max_length=96,  # frames, 10 ms each
            num_labels=classes,
        )
        return ASTForAudioClassification(config)
    # the head of another task has another size
    return ASTForAudioClassification.from_pretrained(name, num_labels=classes, ignore_mismatched_sizes=True)


def crop(log_mel: Tensor, frames: int) -> Tensor:
    """A random (frames, mel bins) of a clip (mel bins, T), as AST takes it: time first; silence behind short ones."""
    start = random.randint(0, max(log_mel.shape[1] - frames, 0))
    part = log_mel[:, start : start + frames]
    part = nn.functional.pad(part, (0, frames - part.shape[1]), value=AUDIOSET128.floor)
    return AUDIOSET128.normalise(part).T


def main() -> None:
    """Train, save the adapter, load it into a fresh model, merge it; print what changes at each step, and how much."""
    parser = argparse.ArgumentParser(
        description="Fine-tune an AST with AaPE for a stem by LoRA (peft), on the clips that come with the demo.",
        epilog="Without --model nothing is downloaded, and nearly all of the default's time is imports.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="an AST on the Hugging Face Hub or in a folder, such as MIT/ast-finetuned-audioset-10-10-0.4593 "
        "(default: a small one with random weights)",
    )
    parser.add_argument("--steps", type=int, default=60, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder that the adapter is kept in (default: a temporary one)"
    )
    options = parser.parse_args()
    random.seed(options.seed)
    mend()  # peft imports transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    clips = [AUDIOSET128.log_mel(load(path)) for path in bundled_clips()]
    labels = torch.arange(len(clips)).repeat(2)
    model = base(options.model, len(clips), options.seed)
    frames = model.config.max_length

    def batch() -> Tensor:
        return torch.stack([crop(clips[label], frames) for label in labels])

    def logits(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model.eval()(x).logits

    x = batch()
    before = logits(model, x)
    # first the stem, then the adapters, then the optimiser
    replace_stem(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=ADAPTED, modules_to_save=WHOLE))
    print(f"stem replaced, adapters added: the logits change by {(logits(model, x) - before).abs().max().item():.1g}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    print(f"trained: {count:,} parameters, beside a model of {whole:,}")

    optimiser = torch.optim.AdamW(trained, lr=options.lr)
    model.train()
    for step in range(options.steps):
        loss = model(input_values=batch(), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    tuned = logits(model, x)
    fresh = batch()
    right = (logits(model, fresh).argmax(1) == labels).float().mean().item()
    print(f"accuracy on fresh crops {right:.0%}; guessing has {1 / len(clips):.0%}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        model.save_pretrained(folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        print(f"saved: adapter_model.safetensors, {size / 1e3:,.0f} kB: adapters, the stem's branch and the head")
        # to use it: the same model, its stem replaced with the same options, and then the adapter
        again = PeftModel.from_pretrained(replace_stem(base(options.model, len(clips), options.seed)), folder)
    print(f"loaded into a fresh model: the logits change by {(logits(again, x) - tuned).abs().max().item():.1g}")
    # without peft around its parts, the stem is one fused call again
    merged = again.merge_and_unload()
    print(f"merged: the logits change by {(logits(merged, x) - tuned).abs().max().item():.1g}")


if __name__ == "__main__":
    main()
