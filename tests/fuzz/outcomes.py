"""What one damaged input may lead to, and how it is told apart from all else."""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.errors import UserError

AGREED, REFUSED = "worked and agreed", "refused"
SECONDS = 30  # that one input may take
MEMORY = 6 * 2**30  # bytes of address space that one input may add
LONGEST = 1000  # characters of a refusal's line


class Disagreement(Exception):
    """The package reads an input otherwise than its referee does."""


class OutOfTime(BaseException):
    """An input takes too long. No Exception, so that no handler of the package catches it."""


class Input(NamedTuple):
    """One damaged input."""

    name: str
    words: tuple[str, ...]  # what a refusal must name: the file, the line
    attempt: Callable[[], None]
    """Reads the input and compares. Raises UserError when the package refuses it, Disagreement when results differ."""
    whole: bool = False  # it is not damaged after all, and must not be refused


def outcome(damaged: Input) -> str:
    """Returns AGREED, REFUSED, or in words what else happened."""
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("error")
            damaged.attempt()
    except UserError as error:
        return f"REFUSES what is whole: {error}" if damaged.whole else _refusal(str(error), damaged.words)
    except Disagreement as error:
        return f"DISAGREES: {error}"
    except OutOfTime:
        return f"TAKES more than {SECONDS} s"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"RAISES {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:300]}"
    return AGREED


def _refusal(line: str, words: tuple[str, ...]) -> str:
    """Returns REFUSED where the line is one line that names all words, and says what to do; else what is wrong."""
    missing = [word for word in words if word not in line]
    if missing or "\n" in line or len(line) > LONGEST or not any(part in line for part in ("; ", " must be ")):
        what = f"does not name {missing[0]!r}" if missing else "is no short line of what is wrong; what to do"
        return f"REFUSES with a line that {what}: {line[:400]!r}"
    return REFUSED


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bounds the time and the memory of the block. Raises OutOfTime, and in the block MemoryError.

    A block that does not return to Python in four times the time ends the process with a traceback.
    """

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, before)
