"""Metrics that a Weights & Biases project receives beside the file."""

import sys

import pytest

from alignjax.errors import UserError
from alignjax.training.metrics import MetricsWriter, read_metrics


class FakeWandb:
    """Records what a Weights & Biases run receives."""

    def __init__(self):
        self.received = []

    def init(self, **words):
        self.received.append(words["id"])
        return self

    def log(self, row, step):
        self.received.append((step, row))

    def finish(self):
        self.received.append("finished")


def test_a_named_project_receives_what_the_file_receives(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_path / "run" / "stage", resume_step=0, project="mine")
    writer.write(0, {"loss": 1.5})
    writer.close()
    assert fake.received == ["run-stage", (0, {"loss": 1.5}), "finished"]
    assert read_metrics(tmp_path / "run" / "stage" / "metrics.jsonl") == [{"step": 0, "loss": 1.5}]


def test_a_project_without_the_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"alignjax\[wandb\]"):
        MetricsWriter(tmp_path / "stage", resume_step=0, project="mine")
