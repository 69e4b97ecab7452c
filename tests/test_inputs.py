"""Wiring: an input of the wrong kind is refused in one line that names stage, field and kind, before anything runs."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

import alignjax as aj
from alignjax.errors import UserError
from alignjax.fields import Kind, is_stage_input, stage_inputs
from alignjax.pipeline import judges, stages
from alignjax.pipeline.config import _replace_at, load
from alignjax.pipeline.experiment import Exposure, ancestors, order
from alignjax.pipeline.fingerprint import input_names

FILE = Path(__file__).parents[1] / "experiments" / "quickstart.py"


@dataclasses.dataclass(frozen=True)
class Own:
    """A stage of one's own that does nothing and says nothing about its network."""

    makes: Kind
    meanings: ClassVar[dict] = {}

    def check(self, context):
        pass

    def network(self, context):
        return None

    def exposure(self, context):
        return Exposure()

    def programs(self, context):
        return ()

    def run(self, context, programs):
        return {}


def every_stage():
    """Returns an experiment that has every stage and every judge that names an input."""
    q = load(FILE, {"small": "True"})
    judged = dataclasses.replace(q.stages["pairs"], method=aj.Judged(aj.ModelJudge("preference")))
    asked = dataclasses.replace(judged, method=aj.Judged(aj.LanguageModelJudge("base")))
    direct = aj.DirectAlignment(partial(aj.losses.dpo, beta=0.1))
    table = dataclasses.replace(
        q.stages["table"], judges={"a": aj.ModelJudge("judge"), "b": aj.LanguageModelJudge("base")}
    )
    return q.with_stages(
        **{kind.name: Own(kind) for kind in Kind},
        judged=judged,
        asked=asked,
        adapter=aj.LoadAdapter("nowhere", "base"),
        kept=aj.KeptPolicy(1, policy="nash_md"),
        zero=aj.ZeroShotPreference("base"),
        dpo=dataclasses.replace(q.stages["nash_md"], objective=direct, data=aj.OfflineData("pairs")),
        table=table,
        ratings=aj.RatePool("table"),
        rated=dataclasses.replace(judged, method=aj.RLAIF(aj.LanguageModelRater("base"))),
        relabeled=aj.Relabel(judge=aj.LanguageModelRater("base"), sizes=aj.JudgeSizes(8, 8, 8), pairs="pairs"),
        mixed=aj.MixPairs(first="pairs", second="relabeled"),
        labels=aj.PairStudy(judge=aj.ModelJudge("judge"), sizes=aj.JudgeSizes(8, 8, 8), pairs={"a": "pairs"}),
        agreement=aj.MeasureAgreement(sizes=aj.JudgeSizes(8, 8, 8), models={"a": "judge"}, pairs="truth"),
        imitated=aj.FineTune(start="base", pairs="REPLIES", adam=aj.Adam(1e-3), loop=aj.Loop(steps=1, batch=8), row=64),
        tuned=aj.FineTune(start="base", pairs="pairs", adam=aj.Adam(1e-3), loop=aj.Loop(steps=1, batch=8), row=64),
    )


EXPERIMENT = every_stage()
INPUTS = [(n, *found) for n, stage in EXPERIMENT.stages.items() for found in stage_inputs(stage)]


def with_input(name, field, source):
    """Returns the stages with another input."""
    stage = _replace_at(EXPERIMENT.stages[name], field.split("."), source)
    return {**EXPERIMENT.stages, name: stage}


def test_every_kind_of_input_is_among_the_cases():
    order(EXPERIMENT.stages)
    parts = [getattr(stages, name) for name in stages.__all__] + [judges.ModelJudge, judges.LanguageModelJudge]
    declared = {field.name for part in parts if dataclasses.is_dataclass(part) for field in dataclasses.fields(part)
                if is_stage_input(field)}  # fmt: skip
    reached = {part for _, field, _, _ in INPUTS for part in field.split(".")}
    assert declared <= reached and {"judges.a.stage", "method.judge.stage", "data.preference", "data.pairs"} <= {
        field for _, field, _, _ in INPUTS
    }


@pytest.mark.parametrize(("name", "field", "source", "kinds"), INPUTS, ids=lambda x: x if isinstance(x, str) else "")
def test_an_input_of_another_kind_is_refused_by_stage_field_and_kind(name, field, source, kinds):
    assert EXPERIMENT.stages[source].makes in kinds
    for kind in Kind:
        if kind in kinds:
            order(with_input(name, field, kind.name))
            continue
        with pytest.raises(UserError) as error:
            order(with_input(name, field, kind.name))
        message = str(error.value)
        needs = f"stage {name!r} needs {kinds[0].value} as {field}, and {kind.name!r} makes {kind.value}"
        assert message == f"{needs}; name another stage"


@pytest.mark.parametrize(("name", "field"), [case[:2] for case in INPUTS], ids=str)
@pytest.mark.parametrize("source", ["nowhere", 3])
def test_an_input_that_is_no_stage_is_refused(name, field, source):
    with pytest.raises(UserError, match=f"stage '{name}' names the input {source!r} \\({field}\\), which is no stage"):
        order(with_input(name, field, source))


def test_inputs_come_before_their_users():
    names = order(dict(reversed(EXPERIMENT.stages.items())))
    assert sorted(names) == sorted(EXPERIMENT.stages)
    for name in names:
        assert all(names.index(source) < names.index(name) for source in input_names(EXPERIMENT.stages[name]))
    assert ancestors(EXPERIMENT.stages, ["dpo"]) == {"dpo", "pairs", "base"}


def test_a_cycle_is_named():
    truth = dataclasses.replace(EXPERIMENT.stages["truth"], generator="nash_md")
    with pytest.raises(UserError, match=r"stages form a cycle: .*truth -> .*nash_md.*-> truth"):
        order({"truth": truth, **{n: s for n, s in EXPERIMENT.stages.items() if n != "truth"}})


@pytest.mark.parametrize(("stage", "words"), [
    (Own, "is the class Own; make an instance"), (object(), "which is no dataclass"),
    (aj.Oracle("x"), "which lacks makes"), (None, "which is no dataclass"),
])  # fmt: skip
def test_what_is_no_stage_is_refused(stage, words):
    with pytest.raises(UserError, match=words):
        order({"own": stage})


@pytest.mark.parametrize("name", ["a b", "compiled", "a/b", "", 3])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(UserError, match="cannot name a stage"):
        order({name: Own(Kind.POLICY)})
