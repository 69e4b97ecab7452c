"""The small quickstart with its work in a bucket: the same bits as on a disk, killed, moved and resumed.

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
from alignjax.pipeline import run
from tests.conftest import ROOT
from tests.test_hosts import free_port
from tests.test_quickstart import STAGES, command, compare, same_bits


@pytest.fixture(scope="module")
def store():
    """The environment of processes that find gs://bucket on this machine."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    told = {
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
            for name, value in told.items():
                patch.setenv(name, value)
            yield told
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """A run on the disk."""
    workdir = tmp_path_factory.mktemp("whole")
    subprocess.run(command(workdir), env=environment(), check=True, capture_output=True, timeout=500)
    return workdir


def test_killed_and_resumed_in_a_bucket_it_ends_with_the_bits_of_the_disk(store, whole, environment, tmp_path):
    workdir = storage.parse_path("gs://bucket/runs/one")
    in_the_middle = []
    for name in ("base", "pairs", "nash_md", "table"):
        process = subprocess.Popen(command(workdir), env=environment(), stderr=subprocess.PIPE, text=True)
        while not progressed(workdir / name):
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.05)
        process.kill()
        process.communicate()
        in_the_middle.append(not json.loads((workdir / name / "stage.json").read_text())["finished"])
    done = subprocess.run(command(workdir), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(in_the_middle), in_the_middle
    storage.copy_tree(workdir, tmp_path)
    compare(whole, tmp_path, same_bits)
    for name in ("report.md", "table-oracle.png", "curves.png"):
        assert (tmp_path / name).stat().st_size
    assert (
        list((tmp_path / "nash_md" / "tensorboard").iterdir()) and not (tmp_path / "nash_md" / "checkpoints").exists()
    )


def progressed(folder):
    """Has it left what a restart must take up?"""
    saves = [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit() and (p / "commit_success.txt").exists()]
    return bool(saves or list((folder / "chunks").glob("*.json")) or list(folder.glob("replies-*.json")))


def test_another_configuration_takes_a_stage_s_place_and_gives_it_back(store, whole, environment):
    workdir = storage.parse_path("gs://bucket/runs/two")
    for name in STAGES:
        storage.copy_tree(whole / name, workdir / name)
    before = {path: path.read_bytes() for path in storage.list_files(workdir / "judge")}

    def judged(lr, *words):
        words = [*command(workdir, judge__adam__lr=lr), "--only", "judge", *words]
        return subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)

    old, new = 5e-4, 1e-3
    refused = judged(new)
    assert "was made with adam.lr=0.0005, now 0.001" in refused.communicate(timeout=300)[1] and refused.returncode == 2
    again = judged(new, "--redo")
    mark = run.read_record(workdir / "judge")["fingerprint"]
    while run.read_record(workdir / "judge").get("fingerprint") in (mark, None):
        assert again.poll() is None, again.stderr.read()[-2000:]
        time.sleep(0.05)
    again.kill()
    again.communicate()
    back = judged(old, "--redo")
    assert "judge: finished before, and taken back" in back.communicate(timeout=300)[1] and back.returncode == 0
    assert {path: path.read_bytes() for path in storage.list_files(workdir / "judge")} == before
    assert not list(storage.list_files(workdir / ".judge.before"))


def test_what_a_kill_left_of_a_stage_that_came_or_went_is_not_taken(store):
    """Half of one without its record, of whatever configuration, is cleared away; what was put aside comes whole."""
    folder = storage.parse_path("gs://bucket/runs/five/pairs")
    ours, other = ({"stage": "pairs", "fingerprint": mark, "finished": mark == "a"} for mark in "ab")
    (folder / "chunks" / "000000.json").write_text("[]")
    assert not run.prepare(folder, other, redo=False) and not run.has_work(folder)
    assert [path.name for path in storage.list_files(folder)] == ["stage.json"]
    run.remove(folder)
    assert not list(storage.list_files(folder))

    whole = run.aside(folder)
    run.write_record(whole, ours)
    (whole / "chunks" / "000000.json").write_text("[1]")
    (folder / "chunks" / "000001.json").write_text("[2]")
    assert run.prepare(folder, ours, redo=False) and not list(storage.list_files(whole))
    assert sorted(path.name for path in storage.list_files(folder)) == ["000000.json", "stage.json"]
    assert run.has_work(folder) and storage.read_text(folder / "chunks" / "000000.json") == "[1]"


def test_what_a_retry_may_mend_ends_with_run_again(store):
    from aiohttp import ClientConnectionError  # here: gcsfs reads the environment when it is imported
    from fsspec.exceptions import FSTimeoutError
    from gcsfs.retry import HttpError

    for error, told in (
        (HttpError({"code": 503, "message": "busy"}), RunAgain),
        (HttpError({"code": 429, "message": "slow down"}), RunAgain),
        (HttpError({"code": 401, "message": "who are you"}), UserError),
        (ClientConnectionError("lost"), RunAgain),
        (FSTimeoutError(), RunAgain),
        (RuntimeError("UNAVAILABLE: All retry attempts failed"), RunAgain),
        (FileNotFoundError("gone"), FileNotFoundError),
        (ZeroDivisionError("ours"), ZeroDivisionError),
    ):
        with pytest.raises(told), storage.bucket_errors(storage.parse_path("gs://bucket/runs")):
            raise error
        with pytest.raises(type(error)), storage.bucket_errors(storage.parse_path("runs")):
            raise error


def test_two_processes_write_one_checkpoint_there(store, environment, tmp_path):
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
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]
    storage.copy_tree(two, tmp_path / "two")
    losses = [
        [json.loads(line)["nll"] for line in (w / "base" / "metrics.jsonl").read_text().splitlines()]
        for w in (one, tmp_path / "two")
    ]
    assert len(losses[0]) == len(losses[1]) and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02


def test_its_results_are_read_from_there(store, whole, environment, tmp_path):
    workdir = storage.parse_path("gs://bucket/runs/four")
    for name in ("base", "nash_md"):
        storage.copy_tree(whole / name, workdir / name)

    def said(*words):
        done = subprocess.run(
            [sys.executable, "-m", "alignjax", *map(str, words)],
            env=environment(), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    here, there = whole / "nash_md", workdir / "nash_md"
    asked = ("--prompt", "Human: hello", "--max-new-tokens", "8")
    assert said("sample", here, *asked)[:2] == said("sample", there, *asked)[:2]
    assert said("export", there, tmp_path / "out")[0] == 0 and (tmp_path / "out" / "model.safetensors").exists()
    for words, told in (
        (("sample", "gs://bucket/none", *asked), "gs://bucket/none is no finished stage's"),
        (
            ("run", command(workdir)[4], "--workdir", "gs://other/one", "--set", "small=True"),
            "gs://other/one cannot be",
        ),
    ):
        status, _, complaint = said(*words)
        assert status == 2 and told in complaint and "Traceback" not in complaint
