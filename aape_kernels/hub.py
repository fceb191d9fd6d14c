"""AaPE with `from_pretrained`, `save_pretrained` and `push_to_hub`. Needs huggingface_hub: `aape-kernels[hub]`."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import stem

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
    from safetensors import SafetensorError
except ImportError as error:
    raise ImportError(f'aape_kernels.hub needs {error.name}: pip install "aape-kernels[hub]"') from error

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CARD", "AaPE", "OrdinaryFiles", "may_be_on_the_hub"]

CARD = """---
{{ card_data }}
---

{{ summary }}

```python
{{ code }}
```

Paper: <https://arxiv.org/abs/2512.03637>
"""


def may_be_on_the_hub(name: str) -> bool:
    """Whether `name` is owner/name, and not a path such as ./name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


class OrdinaryFiles(PyTorchModelHubMixin):
    """The mixin, but weights get the permissions of any new file: safetensors makes them unreadable for others."""

    no_such_folder: ClassVar[type[Exception]] = ValueError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Load what `save_pretrained` wrote into a folder, or uploaded as "owner/name".

        Errors: `no_such_folder` for a folder that is not there, before any network access; `RuntimeError` for
        parameters that are missing in it or too many, unless `strict=False`; huggingface_hub's.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(name) and not may_be_on_the_hub(name):
            raise cls.no_such_folder(f"{name}: there is no such folder, and a name on the Hub is owner/name")
        # a parameter that the file lacks would keep its random values
        return super().from_pretrained(name, **{"strict": True, **options})

    @classmethod
    def _from_pretrained(cls, **given: Any) -> Self:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints that it loads
            return super()._from_pretrained(**given)  # type: ignore[no-any-return]

    def _save_pretrained(self, save_directory: Path) -> None:
        try:
            super()._save_pretrained(save_directory)
        except SafetensorError as error:  # what it makes of a full disk, say
            raise OSError(errno.EIO, " ".join(str(error).split()), os.fspath(save_directory)) from error
        mask = os.umask(0)
        os.umask(mask)
        for path in save_directory.glob("*.safetensors"):
            path.chmod(0o666 & ~mask)


class AaPE(
    stem.AaPE,
    OrdinaryFiles,
    library_name="aape_kernels",
    tags=["audio", "patch-embedding"],
    model_card_template=CARD,
):
    """`aape_kernels.AaPE` with huggingface_hub's mixin.

    `save_pretrained(folder)` writes the weights (`model.safetensors`) and the constructor's arguments (`config.json`);
    `from_pretrained(folder or name)` builds the stem from these, and `push_to_hub(name)` uploads them. What JSON cannot
    hold is not saved: pass `norm_layer`, `device` and `dtype` to `from_pretrained` again.

    Examples:
        >>> AaPE(embed_dim=192, num_states=8).save_pretrained("stem")  # doctest: +SKIP
        >>> AaPE.from_pretrained("stem")  # doctest: +SKIP
    """

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """As for any stem; it is also the size that is saved."""
        super().set_input_size(img_size, patch_size)
        self._hub_mixin_config["img_size"] = self.img_size  # type: ignore[index]  # as it is a dict here

    def generate_model_card(self, **given: object) -> ModelCard:
        """The README.md that lies beside the weights."""
        said = {
            "summary": "An Aliasing-aware Patch Embedding, the stem of an audio transformer.",
            "code": "from aape_kernels.hub import AaPE\n\n"
            'stem = AaPE.from_pretrained("this folder, or its name on the Hub")',
        }
        return super().generate_model_card(**said | given)
