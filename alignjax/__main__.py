"""The ``alignjax`` command, also as ``python -m alignjax``."""

import os
import signal
import sys
from types import FrameType


def entry_point() -> int:
    """Returns the command's exit status. SIGINT ends the process with status 130 and SIGTERM with 75, at any moment;
    a stage that trains handles SIGTERM itself and saves first, see ``Hosts.preemption``."""
    signal.signal(signal.SIGINT, _exit_on_signal)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    from alignjax import cli  # imported after the handlers are set: it takes a second or two

    return cli.main()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Ends the process at once. Every file is whole at any moment, so this is as safe as a kill.

    An exception could get lost in a library's callback, and the run would continue. A normal exit would stop the
    interpreter while threads are at work.
    """
    cause = "interrupted" if number == signal.SIGINT else "preempted"
    advice = "; the same command goes on from the last save" if sys.argv[1:2] == ["run"] else ""
    os.write(2, f"\nalignjax: {cause}{advice}\n".encode())
    os._exit(130 if number == signal.SIGINT else 75)


if __name__ == "__main__":
    sys.exit(entry_point())
