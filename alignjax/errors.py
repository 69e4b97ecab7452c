"""Errors that a user can act on, and the checks that raise them."""

from __future__ import annotations

import math
import numbers
import reprlib
from typing import Any


class UserError(ValueError):
    """An error that the user can correct. Its message is one line: what is wrong, and what to do."""


RUN_AGAIN = 75  # exit status: "try again" (sysexits.h)


class RunAgain(Exception):
    """The run ended early through no fault of its input: the same command goes on where it was. One line says why."""


def check_range(node: Any, low: float, high: float, *names: str) -> None:
    """Raises UserError when one of the node's fields, or a part of a tuple, is no finite number in [low, high]."""

    def fits(part: Any) -> bool:
        return isinstance(part, numbers.Real) and math.isfinite(part) and low <= float(part) <= high

    for name in names:
        value = getattr(node, name)
        if value == () or not all(map(fits, value if isinstance(value, tuple) else (value,))):
            end = ")" if math.isinf(high) else "]"
            raise UserError(f"{type(node).__name__}.{name}={value!r} must be in [{low:g}, {high:g}{end}")


POSITIVE = 1e-12  # the least of what must be positive


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short_repr(value: Any) -> str:
    """Returns a value as Python writes it, without most of what is long or deeply nested: for an error's message."""
    return _SHORT.repr(value)


def one_line(error: BaseException | str) -> str:
    """Returns an error's message on one line; without a message, the name of its type."""
    return " ".join(str(error).split()) or type(error).__name__
