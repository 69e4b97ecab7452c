"""The ``alignjax`` command, also as ``python -m alignjax``."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """The command's exit status; 130 when interrupted and 75 when told to terminate, at any moment. (A stage that
    trains saves first, see ``runtime.hosts``.)"""
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    from alignjax import commands  # takes a second or two: after the handler is there

    return commands.main()


def interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the process at once. Files are whole at any moment, as after a kill. An exception instead could be lost in
    a library's callback and the run go on, and a tidy exit would take the interpreter from under threads at work."""
    what = "interrupted" if number == signal.SIGINT else "preempted"
    os.write(2, f"\nalignjax: {what}; the same command goes on from the last save\n".encode())
    os._exit(130 if number == signal.SIGINT else 75)


if __name__ == "__main__":
    sys.exit(main())
