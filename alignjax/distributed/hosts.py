"""Several processes as one program: how they find each other, agree, and learn that one of them is gone.

JAX's coordination service does the work. Every process runs the same code over the same global arrays; process 0 alone
writes what is not sharded, and what only one may decide it decides for all.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from alignjax.errors import RUN_AGAIN, RunAgain, UserError

BEAT = 2.0  # seconds between signs of life
SILENCE = 20.0  # seconds without one after which a process is taken for gone
PARTING = 300  # seconds that one waits at its end for the others


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the command line says of the processes; None where the environment shall say it."""

    coordinator: str | None = None  # host:port that process 0 listens at
    count: int | None = None
    index: int | None = None


def found(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes: a TPU slice's, Slurm, Open MPI, or variables of
    JAX's own."""

    def several(name: str) -> bool:
        return environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1

    slurm = "SLURM_PROCID" in environment and (several("SLURM_NTASKS") or several("SLURM_STEP_NUM_TASKS"))
    openmpi = several("OMPI_COMM_WORLD_SIZE")
    tpu = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES")
    return slurm or openmpi or tpu or "JAX_COORDINATOR_ADDRESS" in environment or is_tpu_vm(environment)


def is_tpu_vm(environment: Mapping[str, str]) -> bool:
    """A virtual machine that has TPUs: whether it is one of several only its metadata server knows, which JAX asks."""
    chips = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    return (
        chips and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and "TPU_SKIP_MDS_QUERY" not in environment
    )


def resolved(launch: Launch, environment: Mapping[str, str]) -> Launch | None:
    """The launch with what the environment adds; None: one process. Raises UserError when it is half said."""

    def number(name: str) -> int | None:
        text = environment.get(name)
        if text is not None and not text.isdigit():
            raise UserError(f"{name}={text!r} is no number; mend it or give --processes and --process")
        return None if text is None else int(text)

    if launch.count == 1:
        return None
    if launch == Launch():
        if not found(environment):
            return None
        launch = Launch(
            environment.get("JAX_COORDINATOR_ADDRESS"), number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
        )
        return None if launch.count == 1 else launch
    coordinator, count, index = launch.coordinator, launch.count, launch.index
    if coordinator is None or count is None or index is None:
        raise UserError("several processes need --coordinator HOST:PORT, --processes N and --process I, all three")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT, of process 0")
    if not 0 <= index < count:
        raise UserError(f"--process {index} is not one of the {count} processes 0 to {count - 1}")
    return launch


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run, as one of them sees them; by default there is one."""

    index: int = 0
    count: int = 1
    patience: float = 600.0  # seconds that one waits for the others where they meet
    client: Any = None
    aborts: Aborts | None = None
    meetings: Iterator[int] = dataclasses.field(default_factory=itertools.count)  # alike in every process
    steps: Iterator[int] = dataclasses.field(default_factory=itertools.count)  # and these

    @property
    def leads(self) -> bool:
        return self.index == 0

    def meet(self, where: str) -> None:
        """Returns when every process has come here. Raises RunAgain naming those that have not, in time."""
        if self.count == 1:
            return
        try:
            self.client.wait_at_barrier(f"{next(self.meetings)} {where}", int(1000 * self.patience))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE" not in str(error):
                raise RunAgain(f"the processes could not meet at {where}; {MEND}") from None
            raise RunAgain(f"{missing(str(error))} did not come to {where} in {self.patience:g} s; {MEND}") from None

    def first(self, call: Callable[[], Any]) -> Any:
        """What process 0 got from the call (a JSON value), in every process; if it raised UserError, all do."""
        if self.count == 1:
            return call()
        name = f"alignjax/first/{next(self.meetings)}"
        if self.leads:
            try:
                said = {"value": call()}
            except UserError as error:
                said = {"error": str(error)}
            self.client.key_value_set(name, json.dumps(said))
        else:
            try:
                said = json.loads(self.client.blocking_key_value_get(name, int(1000 * self.patience)))
            except jax.errors.JaxRuntimeError:
                raise RunAgain(f"process 0 decided nothing in {self.patience:g} s; {MEND}") from None
        if "error" in said:
            raise UserError(said["error"])
        return said["value"]

    @contextlib.contextmanager
    def preemption(self) -> Iterator[Callable[[], bool]]:
        """For the block, SIGTERM ends nothing: the function says, alike in every process that asks as often, whether
        one of them got it and the run shall save and end."""
        if self.count > 1:  # JAX's own handler has been there since the processes met
            yield self.preempted
            return
        asked: list[int] = []
        if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
            yield lambda: False
            return
        answered: list[bool] = []

        def answer() -> bool:
            answered.extend(bool(number) for number in asked)
            return bool(asked)

        before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        try:
            yield answer
        finally:
            signal.signal(signal.SIGTERM, before)
            if asked and not answered:  # it came when nobody asked any more
                signal.raise_signal(signal.SIGTERM)

    def preempted(self) -> bool:
        """Of several processes, whether one of them got SIGTERM and all have come to the step at which they end."""
        return self.count > 1 and multihost_utils.reached_preemption_sync_point(next(self.steps))

    def listen(self) -> None:
        """After an error that another's end may have caused, as a broken connection is: returns only where all others
        are well."""
        if self.count > 1:
            time.sleep(SILENCE + 2 * BEAT)

    def end(self, status: int, line: str) -> None:
        """Of several processes, ends this one because of an error, told to the others first: they print the line and
        end too. What all raise alike is printed by the first."""
        if self.count == 1 or self.aborts is None:
            return
        self.aborts.says(status, "" if self.leads else line)
        ended = "alignjax/ended/"
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{ended}{self.index}", f"{status} {line}")
            time.sleep(2 * BEAT)  # until all have heard it: the service ends with process 0
            if (f"{ended}0", f"{status} {line}") in self.client.key_value_dir_get(ended) and not self.leads:
                line = ""
        sys.stdout.flush()
        leave(status, line)  # a tidy exit would wait for the others


MEND = "start all processes again, they go on from the last save"


def missing(message: str) -> str:
    """The processes that a barrier's error message names."""
    names = re.search(r"timed out task names:\s*((?:\d+[,\s]*)+)", message)
    tasks = re.findall(r"\d+", names[1]) if names else []
    return f"process{'es' if len(tasks) > 1 else ''} {', '.join(tasks)}" if tasks else "some process"


def connect(launch: Launch, wait: int = 300, silence: float = SILENCE) -> Hosts:
    """Joins the processes of a run, before JAX is used; ends this one with a line where they do not come together in
    ``wait`` seconds, or when later one is silent for ``silence`` seconds. One process, unless the launch or the
    environment says otherwise. Raises UserError."""
    complete = resolved(launch, os.environ)
    if complete is None:
        return Hosts()
    coordinator, count, index = complete.coordinator, complete.count, complete.index
    aborts = Aborts(f"the {count or 'other'} processes did not all connect to "
                    f"{coordinator or 'their coordinator'} in {wait} s; start all of them")  # fmt: skip
    terminates = signal.getsignal(signal.SIGTERM)  # JAX puts its own in its place
    try:
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=wait)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the processes cannot be joined ({reason}); give --coordinator, --processes and --process, "
                        "or --processes 1") from None  # fmt: skip
    # The service's client, which JAX has no public name for (Orbax takes it from here too).
    from jax._src.distributed import global_state

    if jax.process_count() == 1:  # a slice of one host: as if nobody had joined anything
        aborts.withdraw()
        signal.signal(signal.SIGTERM, terminates)
        return Hosts()
    hosts = Hosts(jax.process_index(), jax.process_count(), client=global_state.client, aborts=aborts)
    watch(hosts, aborts, silence)
    return hosts


class Aborts:
    """What is said when XLA's runtime aborts the process, as it does at once when process 0 is gone or the processes
    do not come together. Nothing else hears of it: it happens in a thread of its own, behind Python's back."""

    def __init__(self, line: str):
        self.status, self.line, self.ending = RUN_AGAIN, line, threading.Event()
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: leave(self.status, self.line))
        ctypes.CDLL(None).signal(signal.SIGABRT, self.handler)

    def withdraw(self) -> None:
        ctypes.CDLL(None).signal(signal.SIGABRT, None)

    def says(self, status: int, line: str) -> None:
        """From now on this process is ending by itself."""
        self.status, self.line = status, line
        self.ending.set()


def leave(status: int, line: str) -> None:
    os.write(2, f"\nalignjax: {line}\n".encode() if line else b"")
    os._exit(status)


def watch(hosts: Hosts, aborts: Aborts, silence: float) -> None:
    """A thread that gives signs of life and ends the process when another gives none, or has ended."""
    client, me = hosts.client, hosts.index
    client.key_value_set(f"alignjax/host/{me}", socket.gethostname())
    hosts.meet("the start")
    names = {name.rsplit("/", 1)[1]: host for name, host in client.key_value_dir_get("alignjax/host/")}

    def gone(which: Iterator[str] | list[str]) -> str:
        return ", ".join(f"process {i} of {hosts.count} ({names[i]})" for i in which) + f" is gone; {MEND}"

    why = "see above" if hosts.leads else f"most often because process 0 of {hosts.count} ({names['0']}) is gone"
    aborts.line = f"process {me} was aborted, {why}; {MEND}"
    seen: dict[str, tuple[str, float]] = {i: ("", time.monotonic()) for i in names}

    def beat(number: int) -> None:
        client.key_value_set(f"alignjax/alive/{me}", str(number), allow_overwrite=True)
        for name, what in client.key_value_dir_get("alignjax/ended/"):
            status, line = what.split(" ", 1)
            other = name.rsplit("/", 1)[1]
            if other != str(me):
                go(int(status), f"process {other} ({names[other]}) ended: {line}")
        for name, value in client.key_value_dir_get("alignjax/alive/"):
            i = name.rsplit("/", 1)[1]
            if seen[i][0] != value:
                seen[i] = (value, time.monotonic())
        if silent := [i for i, (_, when) in seen.items() if time.monotonic() - when > silence]:
            go(RUN_AGAIN, gone(silent))

    def go(status: int, line: str) -> None:
        if hosts.leads:
            time.sleep(3 * BEAT)  # the service ends with this process: the others shall see for themselves before
        leave(status, line)

    def forever() -> None:
        failures = 0
        for number in itertools.count():
            try:
                beat(number)
                failures = 0
            except jax.errors.JaxRuntimeError:
                failures += 1
            # So many failures: the service is gone, and the abort says so.
            if failures > silence / BEAT or aborts.ending.wait(BEAT):
                return

    def part() -> None:
        """At a tidy exit, all at one time. Python takes threads down where they stand, and one that stands in XLA
        aborts the process: this one is ended before."""
        try:
            client.wait_at_barrier("alignjax/exit", 1000 * PARTING)
        except jax.errors.JaxRuntimeError as error:
            leave(RUN_AGAIN, f"{missing(str(error))} did not come to the end in {PARTING} s; {MEND}")
        aborts.ending.set()
        thread.join()
        aborts.withdraw()

    thread = threading.Thread(target=forever, daemon=True, name="alignjax-watch")
    thread.start()
    atexit.register(part)
