"""The models that `replace_stem` knows, small, with random weights; one row each, as the tests take them.

timm, transformers and torchvision are the libraries themselves. The others are no packages: these are modules with the
surface that their public code has around the patch embedding (class names, attribute paths, input and output shapes).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from libraries import timm, transformers, vision_transformer
from torch import Tensor, nn

DIM = 32


class Encoder(nn.Module):
    """Positions, one transformer layer and a head, on tokens (B, N, D)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, DIM))
        self.block = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True)
        self.head = nn.Linear(DIM, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(tokens + self.pos_embed).mean(1))


class PatchEmbed(nn.Module):
    """The stem that AST, SSAST, M2D and PaSST each define: timm's of old, without its check of the size."""

    def __init__(self, patch, stride, flatten=True):
        super().__init__()
        self.flatten = flatten
        self.proj = nn.Conv2d(1, DIM, patch, stride)

    def forward(self, x):
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else x


class PatchEmbed_new(nn.Module):  # noqa: N801  # the name it goes by
    """AudioMAE's and EAT's stem, on (B, 1, T, F)."""

    def __init__(self, img_size, patch_size, stride):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(1, DIM, patch_size, stride)
        self.patch_hw = tuple(self.proj(torch.zeros(1, 1, *img_size)).shape[2:])
        self.num_patches = self.patch_hw[0] * self.patch_hw[1]

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ASTModel(nn.Module):
    """AST and SSAST, (B, T, F): a DeiT as `v`, whose stem has overlapping patches."""

    def __init__(self, patch, stride, tokens):
        super().__init__()
        self.v = nn.Module()
        self.v.patch_embed = PatchEmbed(patch, stride)
        self.v.encoder = Encoder(tokens)

    def forward(self, x):
        return self.v.encoder(self.v.patch_embed(x.unsqueeze(1).transpose(2, 3)))


class AudioMAE(nn.Module):
    """(B, 1, T, F)."""

    def __init__(self, patch, stride):
        super().__init__()
        self.patch_embed = PatchEmbed_new((64, 32), patch, stride)
        self.encoder = Encoder(self.patch_embed.num_patches)

    def forward(self, x):
        return self.encoder(self.patch_embed(x))


class ImageEncoder(nn.Module):
    """EAT's modality encoder in fairseq, (B, 1, T, F)."""

    def __init__(self, patch):
        super().__init__()
        self.local_encoder = PatchEmbed(patch, patch)
        self.encoder = Encoder(64 // patch[0] * (32 // patch[1]))

    def forward(self, x):
        return self.encoder(self.local_encoder(x))


class LocalViT(nn.Module):
    """M2D, (B, 1, F, T) with 80 mel bins."""

    def __init__(self, patch):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, patch)
        self.encoder = Encoder(80 // patch[0] * (64 // patch[1]))

    def forward(self, x):
        return self.encoder(self.patch_embed(x))


class BEATs(nn.Module):
    """(B, T, F): a bare convolution without bias, (B, D, t, f)."""

    def __init__(self, patch):
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, DIM, patch, patch, bias=False)
        self.layer_norm = nn.LayerNorm(DIM)
        self.encoder = Encoder(64 // patch[0] * (32 // patch[1]))

    def forward(self, x):
        x = self.patch_embedding(x.unsqueeze(1))
        return self.encoder(self.layer_norm(x.reshape(*x.shape[:2], -1).transpose(1, 2)))


class PaSST(nn.Module):
    """(B, 1, F, T): a stem with `flatten=False`, whose (B, D, f, t) gets positions of time and of mel apart."""

    def __init__(self, stride):
        super().__init__()
        self.patch_embed = PatchEmbed(16, stride, flatten=False)
        grid = (32 - 16) // stride + 1, (64 - 16) // stride + 1
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, DIM, 1, grid[1]))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, DIM, grid[0], 1))
        self.encoder = Encoder(grid[0] * grid[1])

    def forward(self, x):
        x = self.patch_embed(x) + self.time_new_pos_embed + self.freq_new_pos_embed
        return self.encoder(x.flatten(2).transpose(1, 2))


def hf_ast(patch=16, **strides):
    config = transformers.ASTConfig(
        hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=patch,
        max_length=64, num_mel_bins=32, num_labels=5, **strides,
    )  # fmt: skip
    return transformers.ASTForAudioClassification(config)


def hf_vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=(32, 64),
            patch_size=16, num_channels=1, num_labels=5,
        )
    )  # fmt: skip


def torchvision_vit():
    return vision_transformer.VisionTransformer(64, 16, 1, 2, DIM, 64, num_classes=5)


def timm_vit(name="vit_tiny_patch16_224", **options):
    sizes = {"img_size": (32, 64), "in_chans": 1, "depth": 1, "embed_dim": DIM, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **sizes | options)


@dataclass(frozen=True)
class Row:
    """`stem` is the path of what holds the convolution `conv`, "" being the model; `x` and `tokens` are the shapes of
    the model's input and of the stem's output."""

    build: Callable[[], nn.Module]
    x: tuple[int, ...]
    stem: str
    conv: str
    tokens: tuple[int, ...]
    layout: str
    stride: tuple[int, int]


SQUARE = (16, 16)
IN_TIMM = {"stem": "patch_embed", "conv": "patch_embed.proj", "layout": "FT", "stride": SQUARE}
HF_AST = "audio_spectrogram_transformer.embeddings.patch_embeddings"
HF_VIT = "vit.embeddings.patch_embeddings"

# fmt: off
ROWS = {
    "timm": Row(timm_vit, (2, 1, 32, 64), tokens=(2, 8, DIM), **IN_TIMM),
    "timm-dynamic": Row(
        lambda: timm_vit(dynamic_img_size=True, dynamic_img_pad=True),
        (2, 1, 40, 56), tokens=(2, 3, 4, DIM), **IN_TIMM,
    ),
    "timm-eva": Row(
        lambda: timm_vit("eva02_tiny_patch14_224", patch_size=16), (2, 1, 32, 64), tokens=(2, 8, DIM), **IN_TIMM,
    ),
    "timm-non-square": Row(
        lambda: timm_vit(patch_size=(16, 4)), (2, 1, 32, 64), tokens=(2, 32, DIM), **IN_TIMM | {"stride": (16, 4)},
    ),
    "hf-ast": Row(hf_ast, (2, 64, 32), HF_AST, f"{HF_AST}.projection", (2, 10, DIM), "FT", (10, 10)),
    "hf-ast-strides": Row(
        lambda: hf_ast(8, frequency_stride=8, time_stride=4),
        (2, 64, 32), HF_AST, f"{HF_AST}.projection", (2, 60, DIM), "FT", (8, 4),
    ),
    "hf-vit": Row(hf_vit, (2, 1, 32, 64), HF_VIT, f"{HF_VIT}.projection", (2, 8, DIM), "FT", SQUARE),
    "torchvision": Row(torchvision_vit, (2, 3, 64, 64), "conv_proj", "conv_proj", (2, DIM, 4, 4), "FT", SQUARE),
    "ast": Row(
        lambda: ASTModel(16, 10, 10), (2, 64, 32), "v.patch_embed", "v.patch_embed.proj", (2, 10, DIM), "FT", (10, 10),
    ),
    "ssast-frames": Row(
        lambda: ASTModel((32, 2), (32, 2), 32),
        (2, 64, 32), "v.patch_embed", "v.patch_embed.proj", (2, 32, DIM), "FT", (32, 2),
    ),
    "audiomae": Row(
        lambda: AudioMAE(16, 10), (2, 1, 64, 32), "patch_embed", "patch_embed.proj", (2, 10, DIM), "TF", (10, 10),
    ),
    "audiomae-non-square": Row(
        lambda: AudioMAE((4, 16), (4, 8)),
        (2, 1, 64, 32), "patch_embed", "patch_embed.proj", (2, 48, DIM), "TF", (4, 8),
    ),
    "eat": Row(
        lambda: ImageEncoder(SQUARE), (2, 1, 64, 32), "local_encoder", "local_encoder.proj", (2, 8, DIM), "TF", SQUARE,
    ),
    "eat-non-square": Row(
        lambda: ImageEncoder((8, 16)),
        (2, 1, 64, 32), "local_encoder", "local_encoder.proj", (2, 16, DIM), "TF", (8, 16),
    ),
    "m2d": Row(
        lambda: LocalViT(SQUARE), (2, 1, 80, 64), "patch_embed", "patch_embed.proj", (2, 20, DIM), "FT", SQUARE,
    ),
    "m2d-16x4": Row(
        lambda: LocalViT((16, 4)), (2, 1, 80, 64), "patch_embed", "patch_embed.proj", (2, 80, DIM), "FT", (16, 4),
    ),
    "beats": Row(
        lambda: BEATs(SQUARE), (2, 64, 32), "patch_embedding", "patch_embedding", (2, DIM, 4, 2), "TF", SQUARE,
    ),
    "beats-non-square": Row(
        lambda: BEATs((4, 16)), (2, 64, 32), "patch_embedding", "patch_embedding", (2, DIM, 16, 2), "TF", (4, 16),
    ),
    "passt": Row(
        lambda: PaSST(10), (2, 1, 32, 64), "patch_embed", "patch_embed.proj", (2, DIM, 2, 5), "FT", (10, 10),
    ),
}
# fmt: on


def randomised(model: nn.Module) -> nn.Module:
    """Positions, heads and class tokens often start at zero: nothing may rest on that."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits
