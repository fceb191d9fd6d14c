"""Complaints that name an argument or an error, worded alike everywhere."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message is one line that names the file and says why."""


def at_least(least: float, **arguments: float) -> None:
    """Errors: `ValueError` naming the first argument that is less, or not a number."""
    for name, value in arguments.items():
        if not (isinstance(value, Real) and value >= least):  # not <: NaN is no number
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def whole(least: int, **arguments: int) -> None:
    """Errors: `ValueError` naming the first argument that is less, or no whole number; True and False are none."""
    for name, value in arguments.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an int, at least {least}, got {value!r}")


def within(interval: str, **arguments: float) -> None:
    """Errors: `ValueError` naming the first argument that is no number in `interval`, written as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in arguments.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        ends = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "[]"]
        if not (number and (low < value < high or value in ends)):
            raise ValueError(f"{name}: expected a number in {interval}, got {value}")


def one_of(known: Collection[str], **arguments: str) -> None:
    """Errors: `ValueError` naming the first argument that is not among the known."""
    for name, value in arguments.items():
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def unchanged(checkpoint: Mapping[str, Any], **here: Any) -> None:
    """Errors: `ValueError` naming the first argument of which the checkpoint says something else, if it says any."""
    for name, value in here.items():
        if name in checkpoint and checkpoint[name] != value:
            raise ValueError(f"{name}: the checkpoint was made with {checkpoint[name]!r}, this run has {value!r}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(text: object) -> str:
    """A text, which may have several lines, as one line."""
    return " ".join(str(text).split())


def why(error: BaseException) -> str:
    """Type and text of an error, for a message of one line."""
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def complain(*messages: object) -> int:
    """Say on stderr what is wrong, a line each; the exit status of a command that does nothing more, 2."""
    for message in messages:
        print(f"aape-ssl: {one_line(message)}", file=sys.stderr, flush=True)
    return 2
