"""An alignjax run as several processes on this machine, each with emulated devices: what a pod does, for trying it out.

    python experiments/benchmarks/several.py --processes 2 --devices 4 \\
        run experiments/quickstart.py --workdir runs/two --set small=True --set mesh.data=2 --set mesh.fsdp=2 \\
        --set mesh.tensor=2

Whatever follows is given to ``alignjax`` as it is, and the flags of several processes behind it. What the processes
say is prefixed with their numbers; the exit status is the first one that is not 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True, help="emulated ones, of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for index in range(arguments.processes):
        words = [sys.executable, "-m", "alignjax", *arguments.command]
        if arguments.processes > 1:
            words += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(arguments.processes)]
            words += ["--process", str(index)]
        running.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in running])
    threads = [threading.Thread(target=told, args=pair) for pair in enumerate(running)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((status for process in running if (status := process.wait())), 0)


def told(index: int, process: subprocess.Popen) -> None:
    """Passes on what a process says, line by line."""
    for line in process.stdout or ():
        print(f"{index}: {line.decode(errors='replace').rstrip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
