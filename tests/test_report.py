"""The report of a run shows every metric and figure of its stages, with the meanings that the stages declare."""

import dataclasses
import json
from functools import partial
from typing import ClassVar

import pytest

import alignjax as aj
from alignjax.reporting import plots, report, tables
from alignjax.training.metrics import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Logging:
    """A stage of a user's own, which logs metrics and returns a figure."""

    meanings: dict[str, str]
    late: str = "late"  # a metric that is logged from step 2 on
    makes: ClassVar[aj.Kind] = aj.Kind.FINDINGS

    def network(self, context):
        return None

    def exposure(self, context):
        return aj.Exposure()

    def check(self, context):
        pass

    def programs(self, context):
        return ()

    def run(self, context, programs):
        writer = MetricsWriter(context.folder, 0)
        for step in range(4):
            writer.write(step, {"loss": 1 / (step + 1), "gradient_norm": 1.0, **({self.late: 5.0} if step > 1 else {})})
        writer.close()
        return {"share": 0.25, "held_out": {"accuracy": 0.5}}


MEANINGS = {
    "loss": "nats of surprise",
    "late": "what comes late",
    "share": "of the whole",
    "held_out.accuracy": "on new",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the work folder of a run of two such stages, with its report."""
    folder = tmp_path_factory.mktemp("run")
    stages = {
        "first": Logging(MEANINGS),
        "second": Logging({"loss": "squared error", "late": "what comes late"}, "odd"),
    }
    aj.run(aj.Experiment(None, stages), folder)
    return folder


def test_a_stage_s_new_metric_and_figure_are_reported_with_their_meanings(workdir):
    text = (workdir / "report.md").read_text()
    assert "- late: what comes late\n" in text
    assert "- loss: nats of surprise (first); squared error (second)\n" in text
    assert "- gradient_norm: global norm of the gradient before clipping, the largest of a batch\n" in text
    assert "- odd: no meaning is declared\n" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["first", "share", "0.25", "of the whole"] in rows
    assert ["first", "held out accuracy", "0.5", "on new"] in rows
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_logged_metric_has_a_panel_with_a_line_for_each_stage_that_logged_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "write_picture", lambda path, figure: figures.append(figure))
    runs = {
        "a": [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5, "late": 3.0}],
        "b": [{"step": 0, "kl": 0.0, "loss": 2.0}],
    }
    plots.training_curves(tmp_path / "curves.png", runs)
    panels = {axes.get_title(): axes.get_lines() for axes in figures[0].axes if axes.get_title()}
    lines = {name: {line.get_label(): line.get_xydata().tolist() for line in panel} for name, panel in panels.items()}
    assert lines == {
        "loss": {"a": [[0.0, 1.0], [1.0, 0.5]], "b": [[0.0, 2.0]]},
        "late": {"a": [[1.0, 3.0]]},
        "kl": {"b": [[0.0, 0.0]]},
    }
    looks = {(line.get_label(), line.get_color(), line.get_linestyle()) for panel in panels.values() for line in panel}
    assert len(looks) == 2 and len({look[1:] for look in looks}) == 2  # a stage looks alike in all panels
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert all(axes.get_legend() is None for axes in figures[0].axes)


def test_an_objective_s_own_metrics_have_their_meanings_in_the_record_of_its_stage():
    @dataclasses.dataclass(frozen=True)
    class Own(aj.PreferenceGradient):
        meanings: ClassVar[dict[str, str]] = {"entropy": "nats a token"}

    objective = Own(partial(aj.losses.nash_md, tau=0.1))
    data = aj.OnlineData(preference="p", samplers=(aj.policy, aj.policy), prompts=8)
    stage = aj.TrainPolicy(objective, data, aj.Adam(1e-3), aj.Loop(1, 8), (8,), 8, start="a", reference="a")
    assert stage.meanings["entropy"] == "nats a token" and "prompts" in stage.meanings


def test_a_run_without_training_has_no_curves(tmp_path):
    assert report.curves_section(tmp_path, {"a": {"meanings": {}}}) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_win_rate_table_shows_rates_intervals_and_what_was_not_measured():
    table = {
        "judge": "oracle", "judge_description": "the task's exact oracle", "reference": "base", "n": 50,
        "policies": ["base", "mine"], "win_rate": [[0.5, 0.25], [0.75, 0.5]], "low": [[0.4, 0.1], [0.6, 0.4]],
        "high": [[0.6, 0.4], [0.9, 0.6]], "mean_length": [10.0, 12.5], "kl_to_reference": [-0.001, 1.25],
        "mean_score": [None, 2.0],
    }  # fmt: skip
    text = tables.win_rate_table(json.loads(json.dumps(table)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["base", "-", "0.250 [0.100, 0.400]", "10.00", "0.00", "-"] in rows
    assert ["mine", "0.750 [0.600, 0.900]", "-", "12.50", "1.25", "2.00"] in rows


def judged(judge, means, kls=(0.0, 2.0, 1.0, 5.0)):
    """A table of a tournament: these mean probabilities of its policies over its baseline, and votes that all win."""
    names = ["sft", "br 40", "br 20", "rlhf"]
    probability = [[0.5 if i == j else mean for j in range(4)] for i, mean in enumerate(means)]
    return {"policies": names, "judge": judge, "baseline": "sft", "reference": "base", "kl_to_reference": list(kls),
            "win_rate": [[1.0] * 4] * 4, "mean_probability": probability}  # fmt: skip


def test_the_judges_of_a_training_are_drawn_over_its_kl_in_order(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "write_picture", lambda path, figure: drawn.append(figure))
    tables = [judged("truth", (0.5, 0.6, 0.7, 0.9)), judged("model", (0.5, 0.95, 0.8, 0.9))]
    assert plots.judges_against_kl(tmp_path / "x.png", tables)
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"br, by truth": [[1.0, 0.7], [2.0, 0.6]], "br, by model": [[1.0, 0.8], [2.0, 0.95]]}
    assert not plots.judges_against_kl(tmp_path / "x.png", tables[:1])
    alone = [{**table, "policies": ["sft", "br 40", "sp", "rlhf"]} for table in tables]
    assert not plots.judges_against_kl(tmp_path / "x.png", alone)
    unmeasured = [judged("truth", (0.5,) * 4, kls=(0.0, None, 1.0, 5.0)), tables[1]]
    assert not plots.judges_against_kl(tmp_path / "x.png", unmeasured)
