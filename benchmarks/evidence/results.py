"""Finished pieces of an experiment, a JSON object a line, so that nothing that is done is done again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Record", "Results", "identity"]

Record = dict[str, Any]


def identity(key: Mapping[str, Any]) -> str:
    """A name for a key: all that a piece depends on, as JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


class Results:
    """A file of records, each with the `id` of its key; several processes may add to it at once.

    A line that was cut short, by a full disk or SIGKILL, is no piece; the next one stands on a line of its own.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[Record]:
        """All whole ones, in the order in which they were finished; of one id the first."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found: dict[str, Record] = {}
        for line in text.split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "id" in record:
                found.setdefault(record["id"], record)
        return list(found.values())

    def add(self, key: Mapping[str, Any], found: Mapping[str, Any]) -> Record:
        """Append a piece: its key, and what was found."""
        record = {"id": identity(key), "key": dict(key), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # one write, so that lines of two processes do not mix; begun by a line break in case the last one was cut short
        line = b"\n" + json.dumps(record, ensure_ascii=False).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        return record
