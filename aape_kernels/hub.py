"""AaPE with `from_pretrained`, `save_pretrained` and `push_to_hub`. Needs huggingface_hub: `aape-kernels[hub]`."""

from __future__ import annotations

from . import stem

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError('aape_kernels.hub needs huggingface_hub: pip install "aape-kernels[hub]"') from error

__all__ = ["AaPE"]


class AaPE(stem.AaPE, PyTorchModelHubMixin, library_name="aape_kernels", tags=["audio", "patch-embedding"]):
    """`aape_kernels.AaPE` with huggingface_hub's mixin.

    `save_pretrained(folder)` writes the weights (`model.safetensors`) and the constructor's arguments (`config.json`);
    `from_pretrained(folder or name)` builds the stem from these, and `push_to_hub(name)` uploads them. What JSON cannot
    hold is not saved: give `norm_layer`, `device` and `dtype` to `from_pretrained` again.

    Examples:
        >>> AaPE(embed_dim=192, num_states=8).save_pretrained("stem")  # doctest: +SKIP
        >>> AaPE.from_pretrained("stem")  # doctest: +SKIP
    """
