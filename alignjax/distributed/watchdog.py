"""How each of several processes notices that another one has failed, and ends too.

Every process writes a heartbeat to the key-value store of JAX's coordination service, and reads those of the others. A
process that ends because of an error writes its message there first. The service runs in process 0.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

import jax

from alignjax.errors import RUN_AGAIN

HEARTBEAT = 2.0  # seconds between two heartbeats of a process
SILENCE = 20.0  # seconds without a heartbeat after which a process counts as gone
EXIT_WAIT = 300  # seconds that a process which has finished waits for the others

RESTART_ADVICE = "start all processes again, they go on from the last save"

_HOST, _ALIVE, _ENDED = "alignjax/host/", "alignjax/alive/", "alignjax/ended/"  # keys of the store, before the index


def exit_now(status: int, line: str) -> None:
    """Prints ``alignjax: line`` to stderr, unless the line is empty, and ends the process without any cleaning up.

    A normal exit would wait for threads that wait for other processes.
    """
    os.write(2, f"\nalignjax: {line}\n".encode() if line else b"")
    os._exit(status)


def missing_processes(message: str) -> str:
    """Returns the processes that the error message of a barrier lists as missing, as "processes 3, 11"."""
    listed = re.search(r"timed out task names:\s*((?:\d+[,\s]*)+)", message)
    numbers = re.findall(r"\d+", listed[1]) if listed else []
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}" if numbers else "some process"


class AbortHandler:
    """Decides what is printed, and with which status the process ends, when XLA's runtime aborts the process.

    XLA aborts at once when process 0 is gone or when the processes do not connect. That happens in a thread of XLA's
    own, so that no Python exception tells of it; the handler is one for the signal SIGABRT, set through libc.
    """

    def __init__(self, line: str):
        """Installs the handler, which prints ``line`` and ends with RUN_AGAIN."""
        self.line = line
        self.exiting = threading.Event()  # set when this process ends by itself, and the watchdog must stop
        self._status = RUN_AGAIN
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: exit_now(self._status, self.line))
        ctypes.CDLL(None).signal(signal.SIGABRT, self._callback)

    def announce_exit(self, status: int, line: str) -> None:
        """Stops the watchdog: this process ends by itself. An abort from now on prints this line, with this status."""
        self._status, self.line = status, line
        self.exiting.set()

    def uninstall(self) -> None:
        """Restores the default handler of SIGABRT."""
        ctypes.CDLL(None).signal(signal.SIGABRT, None)


@dataclasses.dataclass(frozen=True)
class _Watch:
    """What the watchdog of one process knows. Keys are the indices of the processes, as text."""

    client: Any  # of the coordination service
    index: int
    silence: float  # seconds
    hosts: dict[str, str]  # the name of each process's machine
    heartbeats: dict[str, tuple[str, float]]  # the last heartbeat of each process, and when it was first read


def publish_host_name(client: Any, index: int) -> None:
    """Writes the name of this machine to the store, for the messages of the other processes."""
    client.key_value_set(f"{_HOST}{index}", socket.gethostname())


def start_watchdog(client: Any, index: int, aborts: AbortHandler, silence: float) -> None:
    """Starts a thread that writes heartbeats and ends this process when another one ends with an error or is silent.

    Every process must have called ``publish_host_name`` before. At a normal exit this process waits for the others.
    """
    hosts = _read_by_index(client, _HOST)
    watch = _Watch(client, index, silence, hosts, {other: ("", time.monotonic()) for other in hosts})
    cause = "see above" if index == 0 else f"most often because {_describe(watch, ['0'])} is gone"
    aborts.line = f"process {index} was aborted, {cause}; {RESTART_ADVICE}"
    thread = threading.Thread(target=_watch_forever, args=(watch, aborts), daemon=True, name="alignjax-watch")
    thread.start()
    atexit.register(_exit_together, client, aborts, thread)


def announce_error(client: Any, index: int, status: int, line: str) -> bool:
    """Writes to the store that this process ends with that status and message, and waits until the others have read it.

    Returns whether process 0 ends with the same status and message.
    """
    client.key_value_set(f"{_ENDED}{index}", f"{status} {line}")
    time.sleep(2 * HEARTBEAT)  # the store is gone when process 0 ends
    return _read_by_index(client, _ENDED).get("0") == f"{status} {line}"


def _read_by_index(client: Any, prefix: str) -> dict[str, str]:
    """Returns the values that the processes have written under a prefix, by the processes' indices."""
    return {key.rsplit("/", 1)[1]: value for key, value in client.key_value_dir_get(prefix)}


def _describe(watch: _Watch, indices: Iterable[str]) -> str:
    return ", ".join(f"process {i} of {len(watch.hosts)} ({watch.hosts[i]})" for i in indices)


def _watch_forever(watch: _Watch, aborts: AbortHandler) -> None:
    failures = 0
    for number in itertools.count():
        try:
            _exchange_heartbeats(watch, number)
            failures = 0
        except jax.errors.JaxRuntimeError:
            failures += 1
        # After that many failures in a row the service is gone; XLA aborts the process, and the handler prints why.
        if failures > watch.silence / HEARTBEAT or aborts.exiting.wait(HEARTBEAT):
            return


def _exchange_heartbeats(watch: _Watch, number: int) -> None:
    """Writes this process's heartbeat and reads those of the others. Ends this process when another one has failed."""
    watch.client.key_value_set(f"{_ALIVE}{watch.index}", str(number), allow_overwrite=True)
    for other, status_and_line in _read_by_index(watch.client, _ENDED).items():
        status, line = status_and_line.split(" ", 1)
        if other != str(watch.index):
            _follow(watch, int(status), f"process {other} ({watch.hosts[other]}) ended: {line}")
    for other, heartbeat in _read_by_index(watch.client, _ALIVE).items():
        if watch.heartbeats[other][0] != heartbeat:
            watch.heartbeats[other] = (heartbeat, time.monotonic())
    silent = [other for other, (_, when) in watch.heartbeats.items() if time.monotonic() - when > watch.silence]
    if silent:
        _follow(watch, RUN_AGAIN, f"{_describe(watch, silent)} is gone; {RESTART_ADVICE}")


def _follow(watch: _Watch, status: int, line: str) -> None:
    """Ends this process because another one has failed."""
    if watch.index == 0:
        time.sleep(3 * HEARTBEAT)  # the service ends with process 0: the others must read the cause first
    exit_now(status, line)


def _exit_together(client: Any, aborts: AbortHandler, thread: threading.Thread) -> None:
    """At a normal exit: waits for the other processes, then stops the watchdog's thread.

    Python would stop the thread wherever it is, and a thread that is stopped inside XLA aborts the process.
    """
    try:
        client.wait_at_barrier("alignjax/exit", 1000 * EXIT_WAIT)
    except jax.errors.JaxRuntimeError as error:
        missing = missing_processes(str(error))
        exit_now(RUN_AGAIN, f"{missing} did not come to the end in {EXIT_WAIT} s; {RESTART_ADVICE}")
    aborts.exiting.set()
    thread.join()
    aborts.uninstall()
