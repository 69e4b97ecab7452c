"""What a command reads from a terminal and writes to it."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

from alignjax.errors import UserError, one_line


def prepare_terminal() -> None:
    """Makes output that the terminal cannot show readable, and a warning one line. A closed output is no output."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"alignjax: warning: {one_line(str(message))}\n"


def require_encodable(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments. Raises UserError on one that is not valid text in the terminal's encoding."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode("ascii", "replace").decode()
            raise UserError(f"the argument {shown!r} is not valid UTF-8; write it in UTF-8")
    return list(arguments)
