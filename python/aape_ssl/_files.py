"""Files and folders that exist as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


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
