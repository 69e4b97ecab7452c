"""Several processes as one program: how they connect, wait for each other and agree.

JAX's coordination service does the work. Every process runs the same code over the same global arrays. Process 0 alone
writes what is not sharded, and makes the decisions that only one process can make.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from alignjax.distributed import watchdog
from alignjax.distributed.watchdog import RESTART_ADVICE, SILENCE, AbortHandler, exit_now, missing_processes
from alignjax.errors import RunAgain, UserError


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the command line says about the processes; None where the environment decides."""

    coordinator: str | None = None  # host:port on which process 0 listens
    count: int | None = None
    index: int | None = None


def resolve_launch(launch: Launch, environment: Mapping[str, str]) -> Launch | None:
    """Returns the launch of several processes, or None when there is one process.

    The command line goes first. Without it the environment's launcher decides: Slurm, Open MPI, a TPU slice, or JAX's
    own variables. A field that stays None is one that JAX finds out by itself.

    Raises UserError when the command line or the environment is incomplete or malformed.
    """
    if launch.count == 1:
        return None
    if launch == Launch():
        return _launch_from_environment(environment)
    coordinator, count, index = launch.coordinator, launch.count, launch.index
    if coordinator is None or count is None or index is None:
        raise UserError("several processes need --coordinator HOST:PORT, --processes N and --process I, all three")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT; give the address of process 0")
    if not 0 <= index < count:
        raise UserError(f"--process {index} is not one of the {count} processes 0 to {count - 1}")
    return launch


def _launch_from_environment(environment: Mapping[str, str]) -> Launch | None:
    if not _has_launcher(environment):
        return None
    count, index = (_integer_variable(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    return None if count == 1 else Launch(environment.get("JAX_COORDINATOR_ADDRESS"), count, index)


def _integer_variable(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is not None and not text.isdigit():
        raise UserError(f"{name}={text!r} is not a number; correct it or give --processes and --process")
    return None if text is None else int(text)


def _has_launcher(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher that JAX knows has started several processes, or may have."""

    def several(name: str) -> bool:
        return environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1

    slurm = "SLURM_PROCID" in environment and (several("SLURM_NTASKS") or several("SLURM_STEP_NUM_TASKS"))
    openmpi = several("OMPI_COMM_WORLD_SIZE")
    tpu = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES")
    return slurm or openmpi or tpu or "JAX_COORDINATOR_ADDRESS" in environment or _is_tpu_vm(environment)


def _is_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Returns whether this is a virtual machine with TPUs. It may be one of several: JAX asks its metadata server."""
    has_chips = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    uses_tpu = environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return has_chips and uses_tpu and "TPU_SKIP_MDS_QUERY" not in environment


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run, as one of them sees them. ``Hosts()`` is a run of one process."""

    index: int = 0
    count: int = 1
    timeout: float = 600.0  # seconds that a process waits for the others in ``barrier`` and ``broadcast``
    client: Any = None  # of the coordination service
    aborts: AbortHandler | None = None
    # Each call takes the next number, which is the same in every process because all make the same calls.
    call_numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    sync_steps: Iterator[int] = dataclasses.field(default_factory=itertools.count)  # of ``preempted``

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes what is not sharded."""
        return self.index == 0

    def barrier(self, where: str) -> None:
        """Returns when every process has called this. ``where`` names the point for error messages.

        Raises RunAgain that names the missing processes when they do not come within ``timeout`` seconds.
        """
        if self.count == 1:
            return
        try:
            self.client.wait_at_barrier(f"{next(self.call_numbers)} {where}", int(1000 * self.timeout))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE" not in str(error):
                raise RunAgain(f"the processes could not meet at {where}; {RESTART_ADVICE}") from None
            missing = missing_processes(str(error))
            raise RunAgain(f"{missing} did not come to {where} in {self.timeout:g} s; {RESTART_ADVICE}") from None

    def all_meet(self, where: str, seconds: float) -> bool:
        """Returns whether every process calls this within ``seconds``: whether what happened to this one, happened to
        all. The answer is the same in all that call it."""
        try:
            dataclasses.replace(self, timeout=seconds).barrier(where)
        except RunAgain:
            return False
        return True

    def broadcast(self, call: Callable[[], Any]) -> Any:
        """Calls ``call`` in process 0 alone and returns its result, a JSON value, in every process.

        Raises UserError in every process when the call raises it in process 0, and RunAgain when process 0 sends no
        result within ``timeout`` seconds.
        """
        if self.count == 1:
            return call()
        key = f"alignjax/broadcast/{next(self.call_numbers)}"
        message = self._send(key, call) if self.is_first else self._receive(key)
        if "error" in message:
            raise UserError(message["error"])
        return message["value"]

    def _send(self, key: str, call: Callable[[], Any]) -> dict[str, Any]:
        try:
            message = {"value": call()}
        except UserError as error:
            message = {"error": str(error)}
        self.client.key_value_set(key, json.dumps(message))
        return message

    def _receive(self, key: str) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads(self.client.blocking_key_value_get(key, int(1000 * self.timeout)))
        except jax.errors.JaxRuntimeError:
            raise RunAgain(f"process 0 decided nothing in {self.timeout:g} s; {RESTART_ADVICE}") from None
        return message

    @contextlib.contextmanager
    def preemption(self) -> Iterator[Callable[[], bool]]:
        """Keeps SIGTERM from ending the process inside the block. Yields a function that returns whether the run has
        been preempted, so that it must save and end.

        Every process must call the function equally often; it gives all of them the same answer when any of them has
        received SIGTERM.
        """
        if self.count > 1:  # JAX has handled SIGTERM since the processes connected
            yield self.preempted
        elif threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
            yield lambda: False
        else:
            with _deferred_sigterm() as received:
                yield received

    def preempted(self) -> bool:
        """Returns whether one of several processes has received SIGTERM and all have reached the step at which they
        end. Every process must call this equally often. Always False in a run of one process."""
        return self.count > 1 and multihost_utils.reached_preemption_sync_point(next(self.sync_steps))

    def confirm_others_alive(self) -> None:
        """Call this after an error that the end of another process may have caused, such as a broken connection.

        Waits as long as the watchdog needs to notice that another process is gone, and then end this one with the
        right message. So it returns only when all other processes are alive.
        """
        if self.count > 1:
            time.sleep(SILENCE + 2 * watchdog.HEARTBEAT)

    def end_all(self, status: int, line: str) -> None:
        """Ends every one of several processes because of an error in this one: the others print the line and end with
        the same status. An error that all raise alike is printed by process 0 alone. In a run of one process nothing
        happens."""
        if self.count == 1 or self.aborts is None:
            return
        self.aborts.announce_exit(status, "" if self.is_first else line)
        with contextlib.suppress(Exception):
            shared = watchdog.announce_error(self.client, self.index, status, line)
            if shared and not self.is_first:
                line = ""
        sys.stdout.flush()
        exit_now(status, line)


@contextlib.contextmanager
def _deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM has come. If it came after the last call of that function, it is
    raised again at the end of the block."""
    signals: list[int] = []
    reported: list[int] = []  # the signals that the last call of ``received`` knew of

    def received() -> bool:
        reported[:] = signals
        return bool(reported)

    previous = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
        if signals and not reported:
            signal.raise_signal(signal.SIGTERM)


def connect(launch: Launch, wait: int = 300, silence: float = SILENCE) -> Hosts:
    """Connects the processes of a run; call it before JAX is used. Returns ``Hosts()`` when there is one process.

    Ends this process with one line when the others do not connect within ``wait`` seconds, and later when another
    process gives no heartbeat for ``silence`` seconds. Raises UserError when the launch is incomplete or wrong.
    """
    complete = resolve_launch(launch, os.environ)
    if complete is None:
        return Hosts()
    aborts = AbortHandler(f"the {complete.count or 'other'} processes did not all connect to "
                          f"{complete.coordinator or 'their coordinator'} in {wait} s; start all of them")  # fmt: skip
    previous = signal.getsignal(signal.SIGTERM)  # JAX replaces it
    client = _initialize_jax(complete, wait)
    if jax.process_count() == 1:  # a TPU slice of one host
        aborts.uninstall()
        signal.signal(signal.SIGTERM, previous)
        return Hosts()
    hosts = Hosts(jax.process_index(), jax.process_count(), client=client, aborts=aborts)
    watchdog.publish_host_name(client, hosts.index)
    hosts.barrier("the start")
    watchdog.start_watchdog(client, hosts.index, aborts, silence)
    return hosts


def _initialize_jax(launch: Launch, wait: int) -> Any:
    """Connects to JAX's coordination service and returns its client. Raises UserError when JAX refuses the launch."""
    try:
        jax.distributed.initialize(launch.coordinator, launch.count, launch.index, initialization_timeout=wait)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the processes cannot connect ({reason}); give --coordinator, --processes and --process, "
                        "or --processes 1") from None  # fmt: skip
    from jax._src.distributed import global_state  # JAX has no public name for the client; Orbax takes it here too

    return global_state.client
