"""Starts an alignjax run as several processes on this machine, each with emulated devices, to try out a pod's run.

    python experiments/benchmarks/several.py --processes 2 --devices 4 \\
        run experiments/quickstart.py --workdir runs/two --set small=True --set mesh.data=2 --set mesh.fsdp=2 \\
        --set mesh.tensor=2

All arguments after --devices are passed to ``alignjax``, followed by the flags of several processes. Each line that a
process prints gets the number of the process in front. The exit status is the first one that is not 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading


def main() -> int:
    """Returns the exit status of the first process that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True, help="emulated devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    processes = start_processes(arguments.command, arguments.processes, arguments.devices)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in processes])
    threads = [threading.Thread(target=print_output, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((status for process in processes if (status := process.wait())), 0)


def start_processes(command: list[str], count: int, devices: int) -> list[subprocess.Popen]:
    """Starts ``alignjax command`` as ``count`` processes with ``devices`` emulated devices each; returns them."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    port, processes = free_port(), []
    for index in range(count):
        words = [sys.executable, "-m", "alignjax", *command]
        if count > 1:
            words += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process", str(index)]
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return processes


def free_port() -> int:
    """Returns a TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def print_output(index: int, process: subprocess.Popen) -> None:
    """Prints each line of the process's output with its index in front."""
    for line in process.stdout or ():
        print(f"{index}: {line.decode(errors='replace').rstrip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
