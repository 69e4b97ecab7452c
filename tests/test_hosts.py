"""Several real processes: how they are found, what they agree on, and how the others end when one fails."""

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

FOURTH = Launch("host:1234", 4, 3)
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("launch", "environment", "expected"),
    [
        (Launch(), {}, None),
        (FOURTH, {}, FOURTH),
        (FOURTH, SLURM, FOURTH),  # the command line goes before the environment
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
def test_processes_are_given_by_flags_or_by_the_environment(launch, environment, expected):
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
def test_an_incomplete_launch_is_refused(launch, environment, words):
    with pytest.raises(UserError, match=words):
        resolve_launch(launch, environment)


def test_one_process_agrees_with_itself():
    hosts = Hosts()
    assert hosts.is_first and hosts.broadcast(lambda: {"a": 1}) == {"a": 1}
    hosts.barrier("nowhere")
    hosts.end_all(2, "nothing happens")


def test_missing_processes_are_read_from_a_barriers_message():
    message = "DEADLINE_EXCEEDED: ... Some timed out task names:\n3\n11\n\n\nRPC: /Barrier"
    assert missing_processes(message) == "processes 3, 11"
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
    peers = hosts.connect(hosts.Launch(f"127.0.0.1:{port}", count, me), wait, silence=8)
    print("up", flush=True)
"""


@pytest.fixture
def launch_processes(environment):
    """Returns a function that starts the given ones of ``count`` processes, each running the program."""
    running = []

    def start_processes(program, processes=(0, 1), count=2, wait=60, beat=2.0):
        port, code = free_port(), PREPARATION + program
        words = [[sys.executable, "-c", code, str(i), str(count), str(port), str(wait), str(beat)] for i in processes]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.extend(subprocess.Popen(line, env=environment(2), **pipes) for line in words)
        return running[-len(words) :]

    yield start_processes
    for process in running:
        process.kill()
        process.communicate()


def exited(process, within=60):
    """Waits; returns (exit status, stdout, the lines of stderr that alignjax printed)."""
    out, error = process.communicate(timeout=within)
    return process.returncode, out, [line for line in error.splitlines() if line.startswith("alignjax:")]


def test_process_0_decides_for_all_and_its_errors_are_raised_in_all(launch_processes):
    program = """
    def refuse():
        raise UserError("no; correct it")
    def only_the_first():
        assert me == 0
        return [me, "x" * 1000]
    assert peers.broadcast(only_the_first) == [0, "x" * 1000]
    try:
        peers.broadcast(refuse)
    except UserError as error:
        print(error)
    peers.barrier("the end")
    """
    for process in launch_processes(program):
        assert exited(process)[:2] == (0, "up\nno; correct it\n")


def test_processes_know_whether_all_of_them_came(launch_processes):
    """What both meet at, they both know; where one goes elsewhere, the other is told after its patience."""
    program = """
    print(peers.all_meet("the failure of a", 60))
    if me == 0:
        begin = time.monotonic()
        print(peers.all_meet("the failure of b", 2), time.monotonic() - begin < 30)
    """
    first, second = launch_processes(program)
    assert exited(first)[:2] == (0, "up\nTrue\nFalse True\n")
    assert exited(second)[1] == "up\nTrue\n"


def test_a_process_missing_at_a_barrier_is_named(launch_processes):
    program = """
    import dataclasses
    peers = dataclasses.replace(peers, timeout=3.0)
    if me == 0:
        try:
            peers.barrier("the end of the stage")
        except RunAgain as error:
            peers.end_all(75, str(error))
    time.sleep(60)
    """
    first, second = launch_processes(program)
    status, _, _ = exited(first)
    assert status == RUN_AGAIN
    status, _, lines = exited(second)
    assert status == RUN_AGAIN
    assert "process 0 (" in lines[0] and "process 1 did not come to the end of the stage in 3 s" in lines[0]


def test_an_error_in_one_process_ends_the_others_with_its_message(launch_processes):
    program = """
    if me == 1:
        peers.end_all(2, "row 7 is bad; correct it")
    time.sleep(60)
    """
    first, second, third = launch_processes(program, processes=(0, 1, 2), count=3)
    assert exited(second)[0] == 2
    for other in (first, third):
        status, _, lines = exited(other)
        assert status == 2 and lines[0].endswith("ended: row 7 is bad; correct it") and "process 1 (" in lines[0]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_by_the_other_within_a_minute(launch_processes, killed):
    processes = launch_processes("\n    time.sleep(200)")
    for process in processes:
        assert process.stdout.readline() == "up\n"
    processes[killed].send_signal(signal.SIGKILL)
    status, _, lines = exited(processes[1 - killed], within=60)
    assert status == RUN_AGAIN
    assert f"process {killed} of 2 (" in lines[0] and "is gone; start all processes again" in lines[0]


def test_of_three_the_others_name_the_killed_one_and_not_process_0(launch_processes):
    processes = launch_processes("\n    time.sleep(200)", processes=(0, 1, 2), count=3)
    for process in processes:
        assert process.stdout.readline() == "up\n"
    processes[1].send_signal(signal.SIGKILL)
    for other in (processes[0], processes[2]):
        status, _, lines = exited(other, within=60)
        assert status == RUN_AGAIN and lines[0].startswith("alignjax: process 1 of 3 (") and "is gone" in lines[0]


def test_a_process_missing_at_the_end_is_named(launch_processes):
    early, late = launch_processes("""
    watchdog.EXIT_WAIT = 3
    time.sleep(200 * (1 - me))
    """, processes=(1, 0))  # fmt: skip
    status, _, lines = exited(early, within=30)
    assert status == RUN_AGAIN and lines[0].startswith("alignjax: process 0 did not come to the end in 3 s")
    status, _, lines = exited(late, within=60)
    assert status == RUN_AGAIN and "process 1 of 2 (" in lines[0] and "is gone" in lines[0]


def test_a_process_that_never_connects_is_reported_in_time(launch_processes):
    (alone,) = launch_processes("", processes=(0,), wait=3)
    begin = time.monotonic()
    status, out, lines = exited(alone)
    assert status == RUN_AGAIN and "up" not in out and time.monotonic() - begin < 60
    assert "the 2 processes did not all connect" in lines[0] and "in 3 s" in lines[0]


def test_a_preemption_of_one_stops_all_at_the_same_step(launch_processes):
    program = """
    with peers.preemption() as asked:
        step = 0
        while not asked():
            step += 1
            time.sleep(0.02)
    print("stopped at", step)
    peers.barrier("the end")
    """
    processes = launch_processes(program)
    for process in processes:
        assert process.stdout.readline() == "up\n"
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)
    (a, one, _), (b, other, _) = map(exited, processes)
    assert a == b == 0 and one == other and one.startswith("stopped at")


def test_the_watchdog_thread_stops_before_python_exits(launch_processes):
    beat = 1e-5  # seconds: the thread is inside XLA most of the time
    for process in launch_processes("", processes=(0, 1, 2, 3), count=4, beat=beat):
        assert exited(process)[0] == 0


FILE = str(ROOT / "experiments" / "quickstart.py")
FEW = {"small": "True", "base.model.layers": "1", "base.loop.steps": "120", "base.loop.save_every": "10"}


@pytest.fixture
def pretrain(environment):
    """Returns a function that starts processes which pretrain the base of the small quickstart."""
    running = []

    def start_run(workdir, processes=1, devices=1, fsdp=-1):
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

    yield start_run
    for process in running:
        process.kill()
        process.communicate()


def wait_for_save(workdir, process, step):
    """Waits until a save of that step or a later one is whole."""
    while not any(int(p.name) >= step for p in (workdir / "base" / "checkpoints").glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.02)


def test_a_run_continues_with_fewer_processes_and_devices_and_loses_no_step(pretrain, tmp_path):
    """Two processes of two devices, one killed; two again, one of them preempted; one of two, preempted; one of one."""
    (undisturbed,), moved = pretrain(tmp_path / "undisturbed"), tmp_path / "moved"
    assert exited(undisturbed, 200)[0] == 0
    first, second = pretrain(moved, processes=2, devices=2)
    wait_for_save(moved, first, 10)
    second.send_signal(signal.SIGKILL)
    status, _, lines = exited(first, 60)
    assert status == RUN_AGAIN and "process 1 of 2 (" in lines[0] and "is gone" in lines[0]
    both = pretrain(moved, processes=2, devices=2)
    wait_for_save(moved, both[0], 30)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        assert exited(process, 60)[0] == RUN_AGAIN
    saved = max(int(p.name) for p in (moved / "base" / "checkpoints").glob("*") if p.name.isdigit())
    assert 30 <= saved < 120
    (alone,) = pretrain(moved, devices=2)
    wait_for_save(moved, alone, saved + 10)
    alone.send_signal(signal.SIGTERM)
    status, _, lines = exited(alone, 60)
    assert status == RUN_AGAIN and "preempted; step" in lines[0] and "is saved" in lines[0]
    step = int(lines[0].split("step ")[1].split()[0])
    assert (moved / "base" / "checkpoints" / str(step)).is_dir() and step > saved
    (last,) = pretrain(moved)
    assert exited(last, 200)[0] == 0
    expected, resumed = (
        read_metrics(folder / "base" / "metrics.jsonl") for folder in (tmp_path / "undisturbed", moved)
    )
    assert [row["step"] for row in resumed] == list(range(120))
    for a, b in zip(expected, resumed, strict=True):
        np.testing.assert_allclose(b["nll"], a["nll"], rtol=2e-3)


def test_two_processes_go_on_together_after_a_stage_that_fails(environment, tmp_path):
    """The stages of tests/test_keep_going.py, the command of two hosts: both skip, both run, both end with status 2."""
    (tmp_path / "b.error").write_text("user")
    words = ["run", str(ROOT / "tests" / "test_keep_going.py"), "--workdir", str(tmp_path), "--keep-going"]
    launch = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    argv = [sys.executable, "-m", "alignjax", *words, *launch]
    running = [subprocess.Popen([*argv, str(me)], env=environment(1), cwd=ROOT, **pipes) for me in range(2)]
    try:
        ends = [exited(process) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [status for status, *_ in ends] == [2, 2]
    assert ends[0][2][-1].startswith("alignjax: failed: b; skipped: c;")
    assert {path.parent.name for path in tmp_path.glob("*/stage.json")} == {"a", "d", "e"}
