"""Data, metrics and storage: batches are pure functions of (seed, step); files that are written survive a kill."""

import json
import os
import subprocess
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.training import data, metrics

KNOWN = {"affix": 3, "positive": 1}
ROWS = [
    {"prompt": "Human: hé 水 😀\n\nAssistant:", "first": "", "second": "tab\tand 'quotes' \\", "p": 1.0, **KNOWN},
    {"prompt": "", "first": "\n\n", "second": " spaces ", "p": 0.0, **KNOWN},
    {"prompt": "x" * 5000, "first": "\u2028\x00\x85", "second": "é", "p": 0.25, **KNOWN},
    {"prompt": "plain", "first": "a", "second": "b", "p": 1 / 3, **KNOWN},
]
ROW = itemgetter("prompt", "first", "second")
MESH = sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2))
META = {"method": "rlcd", "seed": 3, "label_accuracy": 0.75, "nested": {"a": [1, None]}}


def lengths_of(count, seed=0):
    return np.random.default_rng(seed).integers(1, 65, count).tolist()


CASES = [  # lengths, buckets, batch
    (lengths_of(100), (16, 32, 64), 8),
    (lengths_of(53), (64, 16), 7),
    (lengths_of(9), (64,), 9),
    ([10] * 20 + [60] * 3, (16, 64), 8),  # the long ones never fill a batch of their own
    ([10] * 8 + [20] * 5 + [60] * 2, (16, 32, 64), 8),
    ([16, 17, 32, 64] * 5, (16, 32, 64), 4),  # lengths on the edges
]
cases = pytest.mark.parametrize(("lengths", "buckets", "batch"), CASES)


def epochs(plan, count, batch, number):
    """Returns the plans of the first epochs, each of count // batch batches."""
    size = count // batch
    return [[plan(epoch * size + i) for i in range(size)] for epoch in range(number)]


@cases
def test_a_plan_is_a_pure_function_of_seed_and_step(lengths, buckets, batch):
    plan, again = data.plan_batches(lengths, buckets, batch, 5), data.plan_batches(lengths, buckets[::-1], batch, 5)
    forward = [plan(step) for step in range(40)]
    for step in np.random.default_rng(0).permutation(40):
        assert again(step).length == forward[step].length
        np.testing.assert_array_equal(again(step).indices, forward[step].indices)
    other = data.plan_batches(lengths, buckets, batch, 6)
    assert any(not np.array_equal(other(step).indices, forward[step].indices) for step in range(40))


@cases
def test_every_batch_is_whole_and_fits_its_bucket(lengths, buckets, batch):
    plan = data.plan_batches(lengths, buckets, batch, 0)
    for step in range(60):
        indices, length, _ = plan(step)
        assert indices.shape == (batch,) and length in buckets
        assert max(lengths[i] for i in indices) <= length


@cases
def test_an_epoch_repeats_no_example_and_leaves_out_less_than_a_batch(lengths, buckets, batch):
    plan = data.plan_batches(lengths, buckets, batch, 1)
    orders = []
    for epoch in epochs(plan, len(lengths), batch, 4):
        planned = np.concatenate([p.indices for p in epoch])
        assert len(set(planned)) == len(planned) == len(lengths) // batch * batch
        orders.append(tuple(planned))
    assert len(set(orders)) == 4  # every epoch has a shuffle of its own


@cases
def test_few_examples_move_to_a_larger_bucket(lengths, buckets, batch):
    for epoch in epochs(data.plan_batches(lengths, buckets, batch, 2), len(lengths), batch, 3):
        moved = Counter()
        for indices, length, _ in epoch:
            moved[length] += sum(min(b for b in buckets if b >= lengths[i]) < length for i in indices)
        assert all(count < batch for count in moved.values())


@cases
def test_the_epochs_together_contain_every_example(lengths, buckets, batch):
    plan = data.plan_batches(lengths, buckets, batch, 3)
    planned = Counter(i for epoch in epochs(plan, len(lengths), batch, 60) for p in epoch for i in p.indices)
    assert set(planned) == set(range(len(lengths)))


def test_examples_that_cannot_be_planned_are_refused():
    with pytest.raises(UserError, match="7 examples do not fill one batch of 8"):
        data.plan_batches([1] * 7, [16], 8, 0)
    with pytest.raises(UserError, match="65 tokens"):
        data.plan_batches([1] * 20 + [65], [64, 16], 8, 0)


@pytest.mark.parametrize("start", [0, 1, 7, 23, 24])
def test_batches_are_those_of_their_steps_from_any_start(start):
    plan = data.plan_batches(lengths_of(50), (16, 64), 8, 4)

    def make(chosen):
        return {"step": np.full(len(chosen.indices), chosen.step), "rows": chosen.indices[:, None] * [1, 2]}

    loaded = list(data.load_batches(plan, make, MESH, start, 24))
    assert len(loaded) == 24 - start
    for step, batch in enumerate(loaded, start):
        assert np.all(np.asarray(batch["step"]) == step) and batch["rows"].sharding == sharding.row_sharding(MESH)
        np.testing.assert_array_equal(batch["rows"], plan(step).indices[:, None] * [1, 2])


def test_an_error_in_make_reaches_the_loop():
    def make(chosen):
        if chosen.step == 2:
            raise UserError("row 2 is bad; drop it")
        return chosen.indices

    loaded = data.load_batches(lambda step: data.BatchPlan(np.arange(8), 1, step), make, MESH, 0, 5)
    assert [int(next(loaded).sum()), int(next(loaded).sum())] == [28, 28]
    with pytest.raises(UserError, match="row 2 is bad"):
        next(loaded)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    data.write_pairs(folder, {"train": ROWS, "held_out": ROWS[:1]}, META)
    return folder


def test_pairs_round_trip_with_every_character(written):
    expected = [{**row, "p": float(np.float32(row["p"]))} for row in ROWS]
    assert sorted(data.read_pairs(written, "train"), key=ROW) == sorted(expected, key=ROW)
    assert data.read_pairs(written, "held_out") == expected[:1]


def test_pairs_are_a_tfds_dataset_with_its_metadata(written):
    source = tfds.data_source("pairs", split="train", data_dir=str(written))
    prompts = sorted(source[i]["prompt"].decode() for i in range(len(source)))
    assert prompts == sorted(row["prompt"] for row in ROWS)
    info = tfds.builder_from_directory(str(written / "pairs" / "1.0.0")).info
    assert dict(info.metadata) == META and info.splits["train"].num_examples == len(ROWS)
    assert set(info.features) == set(ROWS[0]) == set(data.PAIR_FEATURES)


def test_the_same_pairs_make_the_same_bytes_and_order(written, tmp_path):
    data.write_pairs(tmp_path, {"train": ROWS, "held_out": ROWS[:1]}, META)
    names = [path.relative_to(written) for path in written.rglob("*.array_record*")]
    assert len(names) == 2
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    assert data.read_pairs(tmp_path, "train") == data.read_pairs(written, "train")


def test_a_second_write_replaces_the_first(tmp_path):
    for rows in (ROWS, ROWS[:2]):
        data.write_pairs(tmp_path, {"train": rows}, {"count": len(rows)})
        assert len(data.read_pairs(tmp_path, "train")) == len(rows)


def test_a_missing_dataset_or_split_is_refused(written, tmp_path):
    for folder, split in ((tmp_path, "train"), (written, "validation")):
        with pytest.raises(UserError, match=f"{folder.name}.*{split}") as error:
            data.read_pairs(folder, split)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 100, 65536, 0.5, -1])
def test_a_truncated_dataset_is_refused(tmp_path, cut):
    rows = [{**ROWS[3], "prompt": np.random.default_rng(i).bytes(60).hex()} for i in range(200)]
    data.write_pairs(tmp_path, {"train": rows}, {})
    path = next(tmp_path.rglob("*.array_record*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if isinstance(cut, float) else cut])
    with pytest.raises(UserError, match="label again"):
        data.read_pairs(tmp_path, "train")


def test_tensorflow_is_never_imported(tmp_path):
    """A package of that name, which ends the process that imports it, stands for an installed TensorFlow."""
    (tmp_path / "tensorflow.py").write_text("import os\nprint('imported', flush=True)\nos._exit(3)\n")
    program = f"""if True:
        from pathlib import Path
        import sys
        import numpy as np
        from alignjax.training import data, metrics
        from alignjax.distributed import sharding
        folder = Path({str(tmp_path)!r})
        row = dict(prompt="x", first="y", second="z", p=0.5, affix=0, positive=1)
        data.write_pairs(folder / "pairs", dict(train=[row]), dict(n=1))
        assert data.read_pairs(folder / "pairs", "train") == [row]
        mesh = sharding.make_mesh(sharding.Mesh())
        plan = lambda step: data.BatchPlan(np.arange(step, step + 8), 1, step)
        assert [int(b[0]) for b in data.load_batches(plan, lambda p: p.indices, mesh, 2, 4)] == [2, 3]
        metrics.MetricsWriter(folder, 0).close()
        assert "tensorflow" not in sys.modules
        print("not imported")
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "not imported\n"), done.stderr


def written_metrics(folder, steps, resume_step=0):
    writer = metrics.MetricsWriter(folder, resume_step)
    for step in steps:
        writer.write(step, {"loss": 1 / (step + 3), "kl": np.float32(step)})
    writer.close()
    return metrics.read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("resume", [0, 3, 5, 9])
@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 2', "{"])
def test_a_resumed_run_writes_what_one_run_would_have(tmp_path, resume, torn):
    whole = written_metrics(tmp_path / "whole", range(12))
    assert whole == [{"step": step, "loss": 1 / (step + 3), "kl": float(step)} for step in range(12)]
    written_metrics(tmp_path / "killed", range(5))
    path, kept = tmp_path / "killed" / "metrics.jsonl", min(resume, 5)
    path.write_text(path.read_text() + torn)
    assert written_metrics(tmp_path / "killed", [], resume) == whole[:kept]
    assert written_metrics(tmp_path / "killed", range(kept, 12), kept) == whole
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_file_cut_at_any_byte_reads_as_its_whole_lines(tmp_path):
    rows = written_metrics(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    for cut in range(len(text) + 1):
        path.write_text(text[:cut])
        loaded = metrics.read_metrics(path)
        assert loaded == rows[: len(loaded)] and len(loaded) - text[:cut].count("\n") in (0, 1)
    assert metrics.read_metrics(tmp_path / "none.jsonl") == []


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "stage.json"
    storage.write_json(path, {"seed": 1, "text": "é水"})
    assert json.loads(path.read_text()) == {"seed": 1, "text": "é水"}
    assert [p.name for p in tmp_path.iterdir()] == ["stage.json"]

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(path, "half")
    assert json.loads(path.read_text()) == {"seed": 1, "text": "é水"}
    monkeypatch.undo()
    storage.write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.parse_path("~/runs/a") == tmp_path / "runs" / "a"
    assert storage.parse_path("runs/~a") == Path("runs/~a")
    with pytest.raises(UserError, match="unknown user"):
        storage.parse_path("~no-such-user-of-this-machine/a")
