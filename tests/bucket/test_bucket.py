"""The small quickstart with its work folder in a bucket: killed, moved and resumed, it has the bits of a run on a disk.

Needs gcsfs and gcp-storage-emulator: make bucket.
"""

import json
import subprocess
import sys
import time
import urllib.request

import pytest

from alignjax.distributed import storage
from alignjax.errors import RunAgain, UserError
from alignjax.pipeline import store
from tests.conftest import ROOT
from tests.test_hosts import free_port
from tests.test_quickstart import STAGES, command, compare, same_bits


@pytest.fixture(scope="module")
def bucket():
    """Serves gs://bucket on this machine; yields the environment variables that lead processes to it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google what kind of bucket this is
    }
    words = [sys.executable, "-m", "tests.bucket.server", str(port)]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            yield variables
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, environment):
    """Returns the work folder of a run on the disk."""
    workdir = tmp_path_factory.mktemp("disk")
    subprocess.run(command(workdir), env=environment(), check=True, capture_output=True, timeout=500)
    return workdir


def test_killed_and_resumed_in_a_bucket_it_ends_with_the_bits_of_the_disk(bucket, on_disk, environment, tmp_path):
    workdir = storage.parse_path("gs://bucket/runs/one")
    unfinished = []
    for name in ("base", "pairs", "nash_md", "table"):
        process = subprocess.Popen(command(workdir), env=environment(), stderr=subprocess.PIPE, text=True)
        while not progressed(workdir / name):
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.05)
        process.kill()
        process.communicate()
        unfinished.append(not json.loads((workdir / name / "stage.json").read_text())["finished"])
    done = subprocess.run(command(workdir), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(unfinished), unfinished
    storage.copy_tree(workdir, tmp_path)
    compare(on_disk, tmp_path, same_bits)
    for name in ("report.md", "table-oracle.png", "curves.png"):
        assert (tmp_path / name).stat().st_size
    assert (
        list((tmp_path / "nash_md" / "tensorboard").iterdir()) and not (tmp_path / "nash_md" / "checkpoints").exists()
    )


def progressed(folder):
    """Returns whether the stage has left work that a restart must continue."""
    saves = [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit() and (p / "commit_success.txt").exists()]
    return bool(saves or list((folder / "chunks").glob("*.json")) or list(folder.glob("replies-*.json")))


def test_another_configuration_replaces_a_stage_and_the_old_one_is_put_back(bucket, on_disk, environment):
    workdir = storage.parse_path("gs://bucket/runs/two")
    for name in STAGES:
        storage.copy_tree(on_disk / name, workdir / name)
    before = {path: path.read_bytes() for path in storage.list_files(workdir / "judge")}

    def run_judge(lr, *words):
        words = [*command(workdir, judge__adam__lr=lr), "--only", "judge", *words]
        return subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)

    old, new = 5e-4, 1e-3
    refused = run_judge(new)
    assert "was made with adam.lr=0.0005, now 0.001" in refused.communicate(timeout=300)[1] and refused.returncode == 2
    again = run_judge(new, "--redo")
    fingerprint = store.read_record(workdir / "judge")["fingerprint"]
    while store.read_record(workdir / "judge").get("fingerprint") in (fingerprint, None):
        assert again.poll() is None, again.stderr.read()[-2000:]
        time.sleep(0.05)
    again.kill()
    again.communicate()
    back = run_judge(old, "--redo")
    assert "judge: finished before, and put back" in back.communicate(timeout=300)[1] and back.returncode == 0
    assert {path: path.read_bytes() for path in storage.list_files(workdir / "judge")} == before
    assert not list(storage.list_files(workdir / ".judge.before"))


def test_a_folder_that_a_kill_left_without_its_record_is_not_resumed(bucket):
    """Files without a record are removed, whatever made them; a stage that was set aside comes back complete."""
    folder = storage.parse_path("gs://bucket/runs/five/pairs")
    ours, other = ({"stage": "pairs", "fingerprint": name, "finished": name == "a"} for name in "ab")
    (folder / "chunks" / "000000.json").write_text("[]")
    assert not store.prepare(folder, other, None, redo=False) and not store.has_work(folder)
    assert [path.name for path in storage.list_files(folder)] == ["stage.json"]
    store.remove(folder)
    assert not list(storage.list_files(folder))

    waiting = store.set_aside(folder)
    store.write_record(waiting, ours)
    (waiting / "chunks" / "000000.json").write_text("[1]")
    (folder / "chunks" / "000001.json").write_text("[2]")
    assert store.prepare(folder, ours, None, redo=False) and not list(storage.list_files(waiting))
    assert sorted(path.name for path in storage.list_files(folder)) == ["000000.json", "stage.json"]
    assert store.has_work(folder) and storage.read_text(folder / "chunks" / "000000.json") == "[1]"


def test_errors_that_a_retry_may_solve_end_with_run_again(bucket):
    from aiohttp import ClientConnectionError  # imported here: gcsfs reads the environment when it is imported
    from fsspec.exceptions import FSTimeoutError
    from gcsfs.retry import HttpError

    for error, expected in (
        (HttpError({"code": 503, "message": "busy"}), RunAgain),
        (HttpError({"code": 429, "message": "slow down"}), RunAgain),
        (HttpError({"code": 401, "message": "who are you"}), UserError),
        (ClientConnectionError("lost"), RunAgain),
        (FSTimeoutError(), RunAgain),
        (RuntimeError("UNAVAILABLE: All retry attempts failed"), RunAgain),
        (FileNotFoundError("gone"), FileNotFoundError),
        (ZeroDivisionError("a bug"), ZeroDivisionError),
    ):
        with pytest.raises(expected), storage.bucket_errors(storage.parse_path("gs://bucket/runs")):
            raise error
        with pytest.raises(type(error)), storage.bucket_errors(storage.parse_path("runs")):
            raise error


def test_two_processes_write_one_checkpoint_in_a_bucket(bucket, environment, tmp_path):
    settings = {"mesh__data": 2, "mesh__fsdp": 2}
    one, two = tmp_path / "one", storage.parse_path("gs://bucket/runs/three")
    subprocess.run([*command(one), "--only", "base"], env=environment(), check=True, capture_output=True, timeout=300)
    port = free_port()
    several = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    words = [*command(two, **settings), "--only", "base", *several]
    running = [
        subprocess.Popen([*words, str(me)], env=environment(2), stderr=subprocess.PIPE, text=True) for me in (0, 1)
    ]
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]
    storage.copy_tree(two, tmp_path / "two")
    losses = [
        [json.loads(line)["nll"] for line in (w / "base" / "metrics.jsonl").read_text().splitlines()]
        for w in (one, tmp_path / "two")
    ]
    assert len(losses[0]) == len(losses[1]) and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02


def test_results_are_read_from_a_bucket(bucket, on_disk, environment, tmp_path):
    workdir = storage.parse_path("gs://bucket/runs/four")
    for name in ("base", "nash_md"):
        storage.copy_tree(on_disk / name, workdir / name)

    def outcome(*words):
        done = subprocess.run(
            [sys.executable, "-m", "alignjax", *map(str, words)],
            env=environment(), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    local, remote = on_disk / "nash_md", workdir / "nash_md"
    options = ("--prompt", "Human: hello", "--max-new-tokens", "8")
    assert outcome("sample", local, *options)[:2] == outcome("sample", remote, *options)[:2]
    assert outcome("export", remote, tmp_path / "out")[0] == 0 and (tmp_path / "out" / "model.safetensors").exists()
    for words, message in (
        (("sample", "gs://bucket/none", *options), "gs://bucket/none is no finished stage's"),
        (
            ("run", command(workdir)[4], "--workdir", "gs://other/one", "--set", "small=True"),
            "gs://other/one cannot be",
        ),
    ):
        status, _, error = outcome(*words)
        assert status == 2 and message in error and "Traceback" not in error
