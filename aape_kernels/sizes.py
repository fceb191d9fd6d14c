"""A stem's input sizes and output format, under the names that timm's models ask a stem for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import PatchGrid, pair, sizes_of

__all__ = ["SizedStem", "check_flag"]

FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


def check_flag(value: object, name: str) -> bool:
    """Errors: `TypeError` for anything but a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


class SizedStem(nn.Module):
    """The part of `AaPE` that deals with sizes and formats, and nothing else."""

    layout: str
    patch_size: tuple[int, int]
    stride: tuple[int, int]
    _grid: PatchGrid

    def _mel_first(self, sizes: tuple[int, int]) -> tuple[int, int]:
        """(mel, time) from the input's order, and back: it is its own inverse."""
        return sizes if self.layout == "FT" else (sizes[1], sizes[0])

    def _set_format(self, flatten: bool, output_fmt: str | None) -> None:
        if output_fmt is not None and output_fmt not in FORMATS:
            raise ValueError(f"output_fmt: expected one of {', '.join(FORMATS)} or None, got {output_fmt!r}")
        self.flatten = check_flag(flatten, "flatten") and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else output_fmt

    def _set_sizes(self, img_size: int | Sequence[int] | None, strict: bool, pad: bool) -> None:
        self.strict_img_size = check_flag(strict, "strict_img_size")
        self.dynamic_img_pad = check_flag(pad, "dynamic_img_pad")
        self._set_img_size(img_size)

    def _size(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        size = pair(img_size, "img_size")
        if not self.dynamic_img_pad and any(s < patch for s, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: expected at least one patch, {self.patch_size}, got {size}")
        return size

    def _set_img_size(self, img_size: int | Sequence[int] | None) -> None:
        size = None if img_size is None else self._size(img_size)
        grid = None if size is None else self.dynamic_feat_size(size)
        self.img_size, self.grid_size = size, grid
        self.num_patches = None if grid is None else grid[0] * grid[1]

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Change `img_size`, and with it `grid_size` and `num_patches`.

        Args:
            img_size: as in the constructor; None keeps the current one.
            patch_size: None, or the stem's own: encoder and filters belong to it and are not resampled.

        Errors: `TypeError` or `ValueError` naming the argument. Source: timm's.
        """
        if patch_size is not None and pair(patch_size, "patch_size") != self.patch_size:
            raise ValueError(
                f"patch_size: expected {self.patch_size}, which the stem's encoder, window and band belong to, "
                f"got {patch_size!r}"
            )
        if img_size is not None:
            self._set_img_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Mel bins and frames per token step: the stride in the input's order, or its larger number as a scalar.

        Source: timm's, which notes it as the reduction of its feature maps; ours where stride and patch differ.
        """
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The token grid, in the input's order, of an input of `img_size`.

            ⌊(size − P)/S⌋ + 1 on each axis

        or, with `dynamic_img_pad`, as many as it takes to leave nothing over.

        Source: timm's; ours where stride and patch differ.
        """
        count = self._grid.covering if self.dynamic_img_pad else self._grid.tokens
        return self._mel_first(count(*self._mel_first((img_size[0], img_size[1]))))

    def token_mask(self, lengths: Tensor | Sequence[int], img_size: Sequence[int]) -> Tensor:
        """Which tokens belong to the clip, in a batch of clips of unequal length that are padded at their ends.

            N_t(length) = ⌊(length − P_t)/S_t⌋ + 1

        tokens in every row of patches are True, those that the clip would give by itself; with `dynamic_img_pad`, as
        many as it takes to leave nothing over. With the default window (K = P_t), these tokens are then exactly what
        the clip would give by itself; a longer window also sees the padding, so pad with zeros.

        Args:
            lengths: frames of each clip, (B); a length beyond the batch's counts as the batch's.
            img_size: of the padded batch, in the input's order: `x.shape[2:]`.

        Returns:
            (B, N), bool, in the order of the tokens, on the device of `lengths`: for attention, pooling or a loss.

        Errors: `TypeError` or `ValueError` naming the argument. Source: ours.

        Examples:
            >>> AaPE().token_mask([32, 20], (16, 48))
            tensor([[ True,  True, False],
                    [ True, False, False]])
        """
        if not isinstance(lengths, Tensor | Sequence | int) or isinstance(lengths, str | bytes):
            raise TypeError(f"lengths: expected a tensor or a sequence of integers (frames), got {lengths!r}")
        frames = torch.as_tensor(lengths)
        if frames.dtype.is_floating_point or frames.dtype.is_complex or frames.dtype == torch.bool:
            raise TypeError(f"lengths: expected integers (frames), got {frames.dtype}")
        if frames.dim() != 1:
            raise ValueError(f"lengths: expected shape (batch), got {tuple(frames.shape)}")
        n_f, n_t = self._mel_first(self.dynamic_feat_size(self._size(img_size)))
        patch, stride = self._grid.patch[1], self._grid.stride[1]
        # a patch is the clip's if this frame of it is: its last, or with padding its first after the previous patch
        first = torch.arange(n_t, device=frames.device) * stride
        needed = first + patch - 1
        if self.dynamic_img_pad:
            needed = torch.where(first > 0, first + max(patch - stride, 0), 0)
        own = needed < frames.unsqueeze(1)  # [B, N_t]
        grid = own.unsqueeze(1).expand(-1, n_f, -1) if self.layout == "FT" else own.unsqueeze(2).expand(-1, -1, n_f)
        return grid.flatten(1)

    def _fit(self, x: Tensor) -> Tensor:
        """x with its size checked, and padded if that is asked for; `embed` refuses what is not a spectrogram."""
        if not isinstance(x, Tensor) or x.dim() != 4:
            return x
        if self.strict_img_size and self.img_size is not None and sizes_of(x)[2:] != self.img_size:
            axes = "mel bins, frames" if self.layout == "FT" else "frames, mel bins"
            raise ValueError(f"x: expected img_size {self.img_size} ({axes}), got {tuple(x.shape[2:])}")
        if self.dynamic_img_pad:
            grid = self.dynamic_feat_size(sizes_of(x)[2:])
            height, width = self._mel_first(self._grid.extent(*self._mel_first(grid)))
            x = F.pad(x, (0, max(width - sizes_of(x)[3], 0), 0, max(height - sizes_of(x)[2], 0)))
        return x

    def _arrange(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens (B, N, D) in the format asked for; `size` is that of the input."""
        if self.flatten or self.output_fmt == "NLC":
            return tokens
        if self.output_fmt == "NCL":
            return tokens.transpose(1, 2)
        tokens = tokens.unflatten(1, self.dynamic_feat_size(size))
        return tokens if self.output_fmt == "NHWC" else tokens.permute(0, 3, 1, 2)
