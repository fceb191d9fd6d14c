"""Files: written as a whole or not at all, and read without trust in what they hold."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ._messages import CheckpointError, why


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what replaces `path` once all of it is written; if that fails, nothing is left behind.

    It has the name of `path`, which some writers look at, in a folder of its own beside it, so that nobody else's file
    is meant and two writers do not meet. The folder of `path` is made if it is not there.

    Errors: `OSError` naming the file, which that of a full disk does not.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
            part = Path(folder) / path.name
            yield part
            os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_new_file(**arguments: Path) -> None:
    """Errors: `ValueError` naming the first argument, a file to be written, that is there or cannot be."""
    for name, path in arguments.items():
        if path.exists():
            raise ValueError(f"{name}: {path} exists already")
        if not path.parent.is_dir():
            raise ValueError(f"{name}: {path} lies in a folder that is not there")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{name}: {path} lies in a folder that cannot be written to")


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """What `torch.save` wrote, by `weights_only=True`.

    Errors: `CheckpointError` naming the file, also for what is no dict.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, got a folder") from error
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        # torch's own text tells how to load what should not be loaded
        other = isinstance(error, pickle.UnpicklingError | KeyError)
        cause = "it is none, or holds other things than tensors and plain values" if other else why(error)
        raise CheckpointError(f"{path}: the checkpoint cannot be read ({cause}); it is left as is") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: expected a checkpoint, got a {type(checkpoint).__name__}")
    return checkpoint
