"""Complaints that name an argument or an error, worded alike everywhere."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from numbers import Real


def at_least(least: float, **arguments: float) -> None:
    """Errors: `ValueError` naming the first argument that is less, or not a number."""
    for name, value in arguments.items():
        if not (isinstance(value, Real) and value >= least):  # not <: NaN is no number
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def one_of(known: Collection[str], **arguments: str) -> None:
    """Errors: `ValueError` naming the first argument that is not among the known."""
    for name, value in arguments.items():
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(text: object) -> str:
    """A text, which may have several lines, as one line."""
    return " ".join(str(text).split())
