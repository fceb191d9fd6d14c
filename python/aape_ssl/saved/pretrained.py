"""A pre-trained encoder on its own: log-mel in, tokens out, with all that is needed to use it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor, nn

from aape_kernels.hub import CARD, OrdinaryFiles

from .._messages import CheckpointError, at_least, one_of, why
from ..method.model import Encoder, StemName
from ..sound.audio import FRONT_ENDS, LOUDEST, SAMPLE_RATE, FrontEnd
from .reading import Part, read_pretraining

__all__ = ["AudioEncoder", "load"]

FILES = ("config.json", "model.safetensors")


class AudioEncoder(
    nn.Module,
    OrdinaryFiles,
    library_name="aape_ssl",
    tags=["audio", "self-supervised"],
    paper_url="https://arxiv.org/abs/2512.03637",
    model_card_template=CARD,
):
    """An `Encoder` with its front end and, after fine-tuning, its classifier; it behaves like a timm model.

    `save_pretrained(folder)` writes the weights (`model.safetensors`) and the arguments below (`config.json`),
    `from_pretrained(folder or name on the Hub)` reads them, and `push_to_hub(name)` uploads them.

    Args:
        size, stem, patch_size, stem_options: of the `Encoder`.
        front_end: a name in `audio.FRONT_ENDS`.
        statistics: mean and standard deviation to normalise log-mels by; the front end's own unless given.
        frames: T of the clips that it was trained on. Any other number of whole patches will do.
        labels: classes of the head, a linear layer on the pooled tokens; none by default, and no head.

    Attributes:
        embed_dim: D.
        num_features: N_f·D, of the pooled tokens.
        num_classes: of the head, or 0.
        frames: as given.
        labels: a tuple.

    Errors: `ValueError` naming the argument.

    Examples:
        >>> encoder = AudioEncoder.from_pretrained("folder")  # doctest: +SKIP
        >>> tokens = encoder.forward_features(encoder.log_mel(waveform))  # doctest: +SKIP
    """

    no_such_folder = CheckpointError

    def __init__(
        self,
        size: str | tuple[int, int, int] = "base",
        stem: StemName = "aape",
        patch_size: int | tuple[int, int] = 16,
        stem_options: dict[str, Any] | None = None,
        front_end: str = "audioset128",
        statistics: tuple[float, float] | None = None,
        frames: int = 208,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        one_of(FRONT_ENDS, front_end=front_end)
        self.front_end: FrontEnd = FRONT_ENDS[front_end]
        if statistics is not None:
            self.front_end = self.front_end.by(statistics)
        if isinstance(labels, str):  # a sequence of letters
            raise ValueError(f"labels: expected a sequence of names, got {labels!r}")
        labels = tuple(labels)
        for label, count in Counter(labels).items():
            if count > 1:
                raise ValueError(f"labels: expected each once, {label!r} is there {count} times")
        # JSON has no tuples
        size = size if isinstance(size, str) else tuple(map(int, size))  # type: ignore[assignment]
        patch_size = int(patch_size) if isinstance(patch_size, Integral) else tuple(patch_size)  # type: ignore[assignment, arg-type]
        self.encoder = Encoder(size, stem, patch_size, stem_options)
        at_least(self.encoder.patch_size[1], frames=frames)
        self.frames, self.labels = int(frames), labels
        # as JSON has it: of NumPy's numbers and tensors nothing would be written
        plain: dict[str, Any] = {"size": size, "patch_size": patch_size, "frames": self.frames, "labels": labels}
        if statistics is not None:
            plain["statistics"] = (self.front_end.mean, self.front_end.std)
        self._hub_mixin_config.update(json.loads(json.dumps(plain)))  # type: ignore[union-attr]  # a dict here
        if self.encoder.patch_size[0] > self.front_end.mel_bins:
            bins = f"the {self.front_end.mel_bins} mel bins of {front_end}"
            raise ValueError(f"patch_size: expected at most {bins}, got {self.encoder.patch_size}")
        self.embed_dim = self.encoder.size.dim
        self.num_features = self.front_end.mel_bins // self.encoder.patch_size[0] * self.embed_dim
        self.num_classes = len(self.labels)
        self.head = nn.Linear(self.num_features, self.num_classes) if labels else nn.Identity()

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], part: Part = "teacher") -> AudioEncoder:
        """The teacher (or student) of a checkpoint of `aape-ssl pretrain`, on the CPU, in evaluation mode.

        Errors: `CheckpointError`, also for a checkpoint of another origin.
        """
        weights, options, data = read_pretraining(path, part)
        if data is None:
            raise CheckpointError(f"{path}: expected to find which front end it was made with, as ClipData writes it")
        statistics = (data["mean"], data["std"])
        encoder = cls(**options, front_end=data["front_end"], statistics=statistics, frames=data["frames"])
        encoder.encoder.load_state_dict(weights)
        return encoder.eval()

    @property
    def config(self) -> Mapping[str, Any]:
        """The arguments that it was made with."""
        return self._hub_mixin_config  # type: ignore[return-value]  # as it is a dict here

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Waveforms at 16 kHz (samples) or (B, samples) -> normalised log-mel spectrograms (B, 1, F, T), float32.

        Errors: `TypeError` or `ValueError` naming the waveform: integers, another shape, less than a patch, or samples
        that are not finite or far beyond full scale.
        """
        x = self.front_end.normalise(self.front_end.log_mel(waveform))  # which refuses what is no sound at all
        if waveform.dim() > 2:
            raise ValueError(f"waveform: expected shape (samples) or (batch, samples), got {tuple(waveform.shape)}")
        if not bool((waveform.abs() <= LOUDEST).all()):
            loudest = float(waveform.abs().max())
            raise ValueError(f"waveform: expected finite samples, full scale ±1, got up to {loudest:g}")
        x = x if x.dim() == 3 else x.unsqueeze(0)
        if x.shape[-1] < self.encoder.patch_size[1]:
            needed = round(self.front_end.seconds(self.encoder.patch_size[1]) * SAMPLE_RATE)
            raise ValueError(f"waveform: expected at least {needed} samples, one patch, got {waveform.shape[-1]}")
        return x.unsqueeze(1)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised log-mel (B, 1, F, T) -> tokens as `forward_features` gives them, and their grid (N_f, N_t)."""
        return self.forward_features(x), self.encoder.grid(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised log-mel (B, 1, F, T) -> tokens (B, N_f·N_t, D), frequency-major, after the last norm.

        Errors: `ValueError` for another shape, such as (B, 1, T, F), or less than a patch.
        """
        bins = self.front_end.mel_bins
        if x.dim() != 4 or x.shape[1:3] != (1, bins):
            raise ValueError(f"x: expected shape (batch, 1, {bins} mel bins, frames), got {tuple(x.shape)}")
        return self.encoder(x)  # type: ignore[no-any-return]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N_f·N_t, D) -> logits (B, classes), or pooled tokens for `pre_logits` or without a head.

        Pooled (B, N_f·D): the mean over time of each time step's tokens, concatenated along frequency, as probes take
        it, too. Source: EVAR, M2D.
        """
        pooled = tokens.unflatten(1, (self.num_features // self.embed_dim, -1)).mean(2).flatten(1)
        return pooled if pre_logits else self.head(pooled)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised log-mel (B, 1, F, T) -> logits (B, classes), or pooled tokens (B, N_f·D) without a head."""
        return self.forward_head(self.forward_features(x))

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone besides biases and norms."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def generate_model_card(self, **given: Any) -> ModelCard:
        """The README.md that lies beside the weights."""
        size, front_end = self.encoder.size, self.config["front_end"]
        sizes = f"width {size.dim}, {size.depth} layers, {'x'.join(map(str, self.encoder.patch_size))} patches"
        head = f" and a classifier of {self.num_classes} labels" if self.labels else ""
        said = {
            "summary": f"An audio transformer{head}, pre-trained by aape_ssl: {sizes}, stem `{self.config['stem']}`; "
            f"{self.frames} frames of log-mel `{front_end}` at a time.",
            "code": "from aape_ssl.saved.pretrained import AudioEncoder\n\n"
            'encoder = AudioEncoder.from_pretrained("this folder, or its name on the Hub")\n'
            "x = encoder.log_mel(waveform)  # (samples) or (batch, samples) at 16 kHz\n"
            "tokens = encoder.forward_features(x)  # (batch, N_f N_t, D), frequency-major\n"
            + ("logits = encoder(x)" if self.labels else "embedding = encoder(x)  # (batch, N_f D): means over time"),
        }
        return super().generate_model_card(**said | given)


def load(path: str | os.PathLike[str]) -> AudioEncoder:
    """Load what `aape-ssl export` or `finetune` wrote (a folder), or the teacher of a pre-training checkpoint (a file).

    Errors: `CheckpointError` naming the path.
    """
    path = Path(path)
    if path.is_file():
        return AudioEncoder.from_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint or an exported folder, there is no such file or folder")
    for name in FILES:
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: expected a folder with {' and '.join(FILES)}, {name} is missing")
    try:
        return AudioEncoder.from_pretrained(path)
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise CheckpointError(f"{path}: cannot be loaded ({why(error)})") from error
