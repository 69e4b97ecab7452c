"""Several processes for real: who they are, what they agree on, and what the others do when one is gone."""

import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from alignjax.distributed.hosts import Hosts, Launch, resolve_launch
from alignjax.distributed.watchdog import missing_processes
from alignjax.errors import RUN_AGAIN, UserError
from alignjax.training.metrics import read_metrics
from tests.conftest import ROOT

THREE = Launch("host:1234", 4, 3)
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("launch", "environment", "expected"),
    [
        (Launch(), {}, None),
        (THREE, {}, THREE),
        (THREE, SLURM, THREE),  # what is said goes before what is found
        (Launch(count=1), SLURM, None),
        (Launch(), SLURM, Launch()),  # JAX knows the rest
        (Launch(), {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        (Launch(), {"SLURM_NTASKS": "8"}, None),  # an allocation, but not inside srun
        (Launch(), {"OMPI_COMM_WORLD_SIZE": "2"}, Launch()),
        (Launch(), {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (Launch(), {"TPU_WORKER_HOSTNAMES": "a,b"}, Launch()),
        (Launch(), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            Launch(),
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Launch("h:1", 2, 1),
        ),
        (Launch(), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_processes_are_told_by_flags_or_found_in_the_environment(launch, environment, expected):
    assert resolve_launch(launch, environment) == expected


@pytest.mark.parametrize(
    ("launch", "environment", "words"),
    [
        (Launch(count=2), {}, "all three"),
        (Launch("host:1", index=0), {}, "all three"),
        (Launch("host", 2, 0), {}, "'host' is not HOST:PORT"),
        (Launch("host:1", 2, 2), {}, "--process 2 is not one of the 2"),
        (Launch(), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
    ],
)
def test_what_is_half_said_is_refused(launch, environment, words):
    with pytest.raises(UserError, match=words):
        resolve_launch(launch, environment)


def test_one_process_agrees_with_itself():
    hosts = Hosts()
    assert hosts.is_first and hosts.broadcast(lambda: {"a": 1}) == {"a": 1}
    hosts.barrier("nowhere")
    hosts.end_all(2, "nothing happens")


def test_a_barriers_message_is_read_for_the_missing():
    said = "DEADLINE_EXCEEDED: ... Some timed out task names:\n3\n11\n\n\nRPC: /Barrier"
    assert missing_processes(said) == "processes 3, 11"
    assert missing_processes("something else") == "some process"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PREPARATION = """if True:
    import sys, time
    from alignjax.distributed import hosts, watchdog
    from alignjax.errors import RunAgain, UserError
    (me, count, port, wait), watchdog.HEARTBEAT = map(int, sys.argv[1:5]), float(sys.argv[5])
    here = hosts.connect(hosts.Launch(f"127.0.0.1:{port}", count, me), wait, silence=8)
    print("up", flush=True)
"""


@pytest.fixture
def start(environment):
    """(program, which of how many) -> those processes, each running the program as one of several."""
    running = []

    def begin(program, processes=(0, 1), count=2, wait=60, beat=2.0):
        port, code = free_port(), PREPARATION + program
        words = [[sys.executable, "-c", code, str(i), str(count), str(port), str(wait), str(beat)] for i in processes]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.extend(subprocess.Popen(line, env=environment(2), **pipes) for line in words)
        return running[-len(words) :]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def ended(process, within=60):
    """(status, stdout, the lines that are ours)."""
    out, error = process.communicate(timeout=within)
    return process.returncode, out, [line for line in error.splitlines() if line.startswith("alignjax:")]


def test_the_first_decides_for_all_and_its_refusal_is_everyones(start):
    program = """
    def refuse():
        raise UserError("no; mend it")
    def only_the_first():
        assert me == 0
        return [me, "x" * 1000]
    assert here.broadcast(only_the_first) == [0, "x" * 1000]
    try:
        here.broadcast(refuse)
    except UserError as error:
        print(error)
    here.barrier("the end")
    """
    for process in start(program):
        assert ended(process)[:2] == (0, "up\nno; mend it\n")


def test_who_does_not_come_to_a_meeting_is_named(start):
    program = """
    import dataclasses
    here = dataclasses.replace(here, timeout=3.0)
    if me == 0:
        try:
            here.barrier("the end of the stage")
        except RunAgain as error:
            here.end_all(75, str(error))
    time.sleep(60)
    """
    first, second = start(program)
    status, _, _ = ended(first)
    assert status == RUN_AGAIN
    status, _, lines = ended(second)
    assert status == RUN_AGAIN
    assert "process 0 (" in lines[0] and "process 1 did not come to the end of the stage in 3 s" in lines[0]


def test_an_error_in_one_process_ends_the_others_with_its_words(start):
    program = """
    if me == 1:
        here.end_all(2, "row 7 is bad; mend it")
    time.sleep(60)
    """
    first, second, third = start(program, processes=(0, 1, 2), count=3)
    assert ended(second)[0] == 2
    for other in (first, third):
        status, _, lines = ended(other)
        assert status == 2 and lines[0].endswith("ended: row 7 is bad; mend it") and "process 1 (" in lines[0]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_by_the_other_within_a_minute(start, killed):
    processes = start("\n    time.sleep(200)")
    for process in processes:
        assert process.stdout.readline() == "up\n"
    processes[killed].send_signal(signal.SIGKILL)
    status, _, lines = ended(processes[1 - killed], within=60)
    assert status == RUN_AGAIN
    assert f"process {killed} of 2 (" in lines[0] and "is gone; start all processes again" in lines[0]


def test_of_three_the_others_name_the_killed_one_and_not_process_0(start):
    processes = start("\n    time.sleep(200)", processes=(0, 1, 2), count=3)
    for process in processes:
        assert process.stdout.readline() == "up\n"
    processes[1].send_signal(signal.SIGKILL)
    for other in (processes[0], processes[2]):
        status, _, lines = ended(other, within=60)
        assert status == RUN_AGAIN and lines[0].startswith("alignjax: process 1 of 3 (") and "is gone" in lines[0]


def test_who_does_not_come_to_the_end_is_named(start):
    early, late = start("""
    watchdog.EXIT_WAIT = 3
    time.sleep(200 * (1 - me))
    """, processes=(1, 0))  # fmt: skip
    status, _, lines = ended(early, within=30)
    assert status == RUN_AGAIN and lines[0].startswith("alignjax: process 0 did not come to the end in 3 s")
    status, _, lines = ended(late, within=60)
    assert status == RUN_AGAIN and "process 1 of 2 (" in lines[0] and "is gone" in lines[0]


def test_a_process_that_never_comes_is_told_in_time(start):
    (alone,) = start("", processes=(0,), wait=3)
    begun = time.monotonic()
    status, out, lines = ended(alone)
    assert status == RUN_AGAIN and "up" not in out and time.monotonic() - begun < 60
    assert "the 2 processes did not all connect" in lines[0] and "in 3 s" in lines[0]


def test_a_preemption_of_one_is_known_to_all_at_the_same_step(start):
    program = """
    with here.preemption() as asked:
        step = 0
        while not asked():
            step += 1
            time.sleep(0.02)
    print("stopped at", step)
    here.barrier("the end")
    """
    processes = start(program)
    for process in processes:
        assert process.stdout.readline() == "up\n"
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)
    (a, one, _), (b, other, _) = map(ended, processes)
    assert a == b == 0 and one == other and one.startswith("stopped at")


def test_no_thread_is_taken_down_inside_xla_at_the_exit(start):
    for process in start("", processes=(0, 1, 2, 3), count=4, beat=1e-5):  # it is hardly ever elsewhere
        assert ended(process)[0] == 0


FILE = str(ROOT / "experiments" / "quickstart.py")
FEW = {"small": "True", "base.model.layers": "1", "base.loop.steps": "120", "base.loop.save_every": "10"}


@pytest.fixture
def pretrain(environment):
    """(workdir, processes, devices of each) -> the processes that pretrain the small quickstart's base."""
    running = []

    def begin(workdir, processes=1, devices=1, fsdp=-1):
        port, several = free_port(), []
        for me in range(processes):
            if processes > 1:
                several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(me)]
            sets = [f"--set={name}={value}" for name, value in {**FEW, "mesh.data": 1, "mesh.fsdp": fsdp}.items()]
            words = ["run", FILE, "--workdir", str(workdir), "--only", "base", *sets, *several]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            argv = [sys.executable, "-m", "alignjax", *words]
            running.append(subprocess.Popen(argv, env=environment(devices), **pipes))
        return running[-processes:]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_for_save(workdir, process, step):
    """Until a save of that step or a later one is whole."""
    while not any(int(p.name) >= step for p in (workdir / "base" / "checkpoints").glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.02)


def test_a_run_goes_on_with_fewer_processes_and_devices_and_loses_no_step(pretrain, tmp_path):
    """Two processes of two devices, one killed; two again, one of them preempted; one of two, preempted; one of one."""
    (undisturbed,), moved = pretrain(tmp_path / "whole"), tmp_path / "moved"
    assert ended(undisturbed, 200)[0] == 0
    first, second = pretrain(moved, processes=2, devices=2)
    wait_for_save(moved, first, 10)
    second.send_signal(signal.SIGKILL)
    status, _, lines = ended(first, 60)
    assert status == RUN_AGAIN and "process 1 of 2 (" in lines[0] and "is gone" in lines[0]
    both = pretrain(moved, processes=2, devices=2)
    wait_for_save(moved, both[0], 30)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        assert ended(process, 60)[0] == RUN_AGAIN
    saved = max(int(p.name) for p in (moved / "base" / "checkpoints").glob("*") if p.name.isdigit())
    assert 30 <= saved < 120
    (alone,) = pretrain(moved, devices=2)
    wait_for_save(moved, alone, saved + 10)
    alone.send_signal(signal.SIGTERM)
    status, _, lines = ended(alone, 60)
    assert status == RUN_AGAIN and "preempted; step" in lines[0] and "is saved" in lines[0]
    step = int(lines[0].split("step ")[1].split()[0])
    assert (moved / "base" / "checkpoints" / str(step)).is_dir() and step > saved
    (last,) = pretrain(moved)
    assert ended(last, 200)[0] == 0
    want, got = (read_metrics(folder / "base" / "metrics.jsonl") for folder in (tmp_path / "whole", moved))
    assert [row["step"] for row in got] == list(range(120))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b["nll"], a["nll"], rtol=2e-3)
