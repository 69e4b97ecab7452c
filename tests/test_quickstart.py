"""The small quickstart: killed in stages of every kind, as two processes of four devices, and in the notebook."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

from alignjax.pipeline.config import load
from alignjax.training.metrics import read_metrics
from tests.test_hosts import free_port
from tests.test_notebook import NOTEBOOK, own_cells

FILE = str(Path(__file__).parents[1] / "experiments" / "quickstart.py")
SETTINGS = {
    "small": "True",
    "base.model.layers": "1",  # compiles in half the time
    "base.loop.save_every": "30",
    "preference.loop.save_every": "8",
    "judge.loop.save_every": "8",
    "nash_md.loop.save_every": "4",
    "self_play.loop.save_every": "4",
}
STAGES = ("base", "pairs", "annotated", "truth", "preference", "judge", "nash_md", "self_play", "table")
TRAINED = ("base", "preference", "judge", "nash_md", "self_play")


def command(workdir, **changes):
    """Returns the command that runs the small quickstart; ``a__b=1`` changes the setting a.b."""
    values = {**SETTINGS, **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "alignjax", "run", FILE, "--workdir", str(workdir), *sets]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    """Returns the work folder of a run that was not killed, and its output."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(workdir), env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir, done.stdout


def test_the_table_is_shown_written_and_consistent(undisturbed):
    workdir, output = undisturbed
    tables = json.loads((workdir / "table" / "win_rates.json").read_text())
    assert [table["judge"] for table in tables] == ["oracle", "held-out"]
    for table in tables:
        assert table["policies"] == ["base", "nash_md", "self_play"]
        rate, low, high = (np.array(table[name]) for name in ("win_rate", "low", "high"))
        np.testing.assert_allclose(rate + rate.T, 1)
        assert np.all((low <= rate) & (rate <= high)) and table["n"] == 24
        assert len(table["mean_length"]) == len(table["kl_to_reference"]) == 3
        assert abs(table["kl_to_reference"][0]) < 1e-3  # the base is the reference
        assert f"judge: {table['judge']}" in output and f"{rate[1, 0]:.3f}" in output
    report = (workdir / "report.md").read_text()
    assert "## Samples" in report and "## Where the time went" in report
    for picture in ("table-oracle.png", "table-held-out.png", "curves.png"):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")


def test_every_step_is_logged_once(undisturbed):
    experiment = load(FILE, SETTINGS)
    for name in TRAINED:
        rows = read_metrics(undisturbed[0] / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(experiment.stages[name].loop.steps))
        assert list((undisturbed[0] / name / "tensorboard").iterdir())


def progressed(workdir, name):
    """Returns whether the stage has left work that a restart must continue."""
    folder = workdir / name
    if (folder / "stage.json").exists() and json.loads((folder / "stage.json").read_text())["finished"]:
        return True
    saves = [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    return bool(saves or list(folder.glob("chunks/*.json")) or list(folder.glob("replies-*.json")))


def finished(workdir, name):
    """Returns whether the record of the stage says that it is finished."""
    return json.loads((workdir / name / "stage.json").read_text())["finished"]


def test_killed_in_a_stage_of_every_kind_it_ends_with_the_same_bits(undisturbed, environment, tmp_path):
    """tests/kills.py kills in every stage, at random moments."""
    unfinished = []
    for name in ("base", "pairs", "preference", "nash_md", "table"):
        process = subprocess.Popen(command(tmp_path), env=environment(), stderr=subprocess.PIPE, text=True)
        while not progressed(tmp_path, name):
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        unfinished.append(not finished(tmp_path, name))
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(unfinished), unfinished
    compare(undisturbed[0], tmp_path, same_bits)


def compare(a, b, equal):
    """Compares the results of two runs; ``equal(name, tree, tree)`` compares parameters."""
    for name in TRAINED:
        equal(name, parameters(a / name), parameters(b / name))
    for name in ("pairs", "annotated", "truth"):
        assert chunks(a / name) == chunks(b / name) != []
    assert (a / "table" / "win_rates.json").read_text() == (b / "table" / "win_rates.json").read_text()
    for name in TRAINED:
        assert (a / name / "metrics.jsonl").read_text() == (b / name / "metrics.jsonl").read_text()


def chunks(folder):
    """Returns the texts of a Label stage's chunks, in order."""
    return [path.read_text() for path in sorted(folder.glob("chunks/*.json"))]


def parameters(folder, part="params"):
    """Returns the parameters that a stage saved under a name as NumPy arrays, by path."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from alignjax.distributed.sharding import path_name

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # other devices may have saved them
    shapes = ocp.metadata(folder / part).metadata
    tree = ocp.load(
        folder / part, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    )
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same_bits(name, a, b):
    assert set(a) == set(b)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=f"{name} {path}")


RUN_EACH = """if True:
    import sys
    from pathlib import Path
    from alignjax.pipeline import config, run
    from alignjax.distributed.hosts import Launch, connect
    file, workdir, port, me, *sets = sys.argv[1:]
    hosts = connect(Launch(f"127.0.0.1:{port}", 2, int(me)))
    settings = dict(text.split("=", 1) for text in sets)
    for name in STAGES:
        experiment = config.load(file, settings)
        run.run(experiment, Path(workdir) / name, only=[name], hosts=hosts)
"""


def test_one_device_and_two_processes_of_four_give_the_same_numbers(undisturbed, environment, tmp_path):
    """Stages of three kinds start from the inputs of the undisturbed run, so that a difference is their own.

    tests/test_hosts.py compares pretraining."""
    stages = ("pairs", "nash_md", "table")
    for name in stages:
        for source in STAGES[: STAGES.index(name)]:
            shutil.copytree(undisturbed[0] / source, tmp_path / name / source)
    settings = {**SETTINGS, "mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"}
    environment, port = environment(4), free_port()
    code = RUN_EACH.replace("STAGES", repr(stages))
    words = [sys.executable, "-c", code, FILE, str(tmp_path), str(port)]
    sets = [f"{name}={value}" for name, value in settings.items()]
    with contextlib.ExitStack() as ending:
        pipes = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running = [subprocess.Popen([*words, str(me), *sets], **pipes) for me in range(2)]
        for process in running:
            ending.callback(process.kill)
        for process in running:
            _, error = process.communicate(timeout=500)
            assert process.returncode == 0, error[-2000:]

    def logged(name):
        return [read_metrics(workdir / name / "metrics.jsonl") for workdir in (undisturbed[0], tmp_path / name)]

    for one, eight in zip(*logged("nash_md"), strict=True):
        for metric in set(one) - {"gradient_norm"}:
            np.testing.assert_allclose(eight[metric], one[metric], rtol=0.02, atol=0.02, err_msg=metric)
    texts = [chunks(workdir / "pairs") for workdir in (undisturbed[0], tmp_path / "pairs")]
    assert texts[0] == texts[1]
    one, eight = (
        json.loads((w / "table" / "win_rates.json").read_text()) for w in (undisturbed[0], tmp_path / "table")
    )
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["win_rate"], a["win_rate"], atol=1e-9)
        np.testing.assert_allclose(b["kl_to_reference"], a["kl_to_reference"], atol=1e-3)


def test_the_notebook_trains_a_policy_and_shows_its_win_rate_and_plot(undisturbed, environment, tmp_path, monkeypatch):
    """The stages of its first cell are those of the undisturbed run, and are found finished."""
    copied = STAGES[: STAGES.index("nash_md") + 1]
    for name in copied:
        shutil.copytree(undisturbed[0] / name, tmp_path / name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"../runs/notebook"', repr(str(tmp_path)))
        cell.source = cell.source.replace('"small": "True"', '"small": "True", "base.model.layers": "1"')
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "".join(output.get("text", "") for output in first.outputs).count("finished before") == len(copied)
    idea, picture = own_cells(notebook)
    printed = "".join(output.get("text", "") for output in idea.outputs)
    assert "judge: oracle" in printed and "log_odds" in printed
    assert any("image/png" in output.get("data", {}) for output in picture.outputs)
    rows = read_metrics(tmp_path / "log_odds" / "metrics.jsonl")
    assert abs(rows[0]["kl"]) < 1e-3 < np.mean([row["kl"] for row in rows[-3:]])
