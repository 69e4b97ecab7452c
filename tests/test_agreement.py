"""Agreement with people: on which pairs, of which models, against a referee that asks one pair at a time."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.models.tokenizer import encode_continuation, pad
from alignjax.pipeline.config import load
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.run import run
from tests.test_wiring import WORDS, WRITING, experiment, mesh

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "rlcd" / "agreement.py"
DATA = Path(os.environ.get("ALIGNJAX_TEST_DATA", ""))
HH = DATA / "hh_harmless_base_test.jsonl.gz"
needs_data = pytest.mark.skipif("ALIGNJAX_TEST_DATA" not in os.environ, reason="ALIGNJAX_TEST_DATA names no folder")
SIZES = aj.JudgeSizes(batch=8, prompt=16, reply=8)
LONG = " ".join(WORDS * 2)


def human_rows():
    """Comparisons in an order that TFDS does not keep: hard and soft, of both sides, undecided, too long."""
    rows = [(f"a {w}", f"one {w}", "two", (1.0, 0.0, 0.7, 0.2)[i % 4]) for i, w in enumerate(WORDS)]
    rows.insert(2, ("undecided", "one", "two", 0.5))
    rows.insert(4, ("long", LONG, "two", 1.0))
    return [dict(zip(("prompt", "first", "second", "p"), row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The experiment and its work folder: human labels, a model fitted to simulated pairs, one that is asked."""
    folder = tmp_path_factory.mktemp("agreement")
    files = {
        "human": human_rows(),
        "file": [
            {"prompt": prompt, "first": f"yes {w}", "second": f"no {w}", "p": 1.0}
            for w in WORDS
            for prompt in ([f"a {w}"] if w in WORDS[:3] else [f"x {w}"])
        ],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fit = aj.FitPreference(
        start="base", pairs="file", form=aj.bradley_terry, adam=aj.Adam(3e-2, warmup=0),
        loop=aj.Loop(steps=4, batch=8), buckets=(16,), response=8,
    )  # fmt: skip
    whole = experiment(
        human=aj.LoadPairs(str(folder / "human.jsonl"), held_out=0.25),
        file=aj.LoadPairs(str(folder / "file.jsonl")),
        fitted=fit,
        asked=aj.ZeroShotPreference("other"),
        agreement=aj.MeasureAgreement(models={"fit": "fitted", "zero": "asked"}, pairs="human", sizes=SIZES),
    )
    run(whole, folder / "work")
    return whole, folder / "work"


def context_of(line, stage=None):
    whole = line[0] if stage is None else line[0].with_stages(agreement=stage)
    return Context(whole, line[1], "agreement", mesh())


def p_of_preferred(context, stage, rows):
    """P(preferred > other) by the preference model of a stage, asked about each pair alone."""
    network = context.load(stage)
    model = context.experiment.stages[stage].preference_model(context.task, network)
    ask, found = jax.jit(model.logit), []
    for row in rows:
        ids = [network.tokenizer.encode(row["prompt"])]
        ids += [encode_continuation(network.tokenizer, " " + row[side]) for side in ("first", "second")]
        logit = ask(network.all_params, *(pad([side], 16) for side in ids))
        p = 1 / (1 + np.exp(-float(logit[0])))
        found.append(p if row["p"] > 0.5 else 1 - p)
    return np.array(found)


def expected_rows():
    """The pairs that are left: of the first three quarters, without known prompts, ties and what is too long."""
    first = human_rows()[: 14 - 14 // 4]
    known = {f"a {w}" for w in WORDS[:3]}
    return [row for row in first if row["p"] != 0.5 and row["first"] != LONG and row["prompt"] not in known]


def test_accuracy_and_probability_are_those_of_each_pair_asked_alone(line):
    numbers, rows = storage.read_json(line[1] / "agreement" / "numbers.json"), expected_rows()
    assert {row["p"] > 0.5 for row in rows} == {True, False}  # the human's choice stands first and second
    for name, stage in (("fit", "fitted"), ("zero", "asked")):
        p, found = p_of_preferred(context_of(line), stage, rows), numbers["models"][name]
        right = int(np.sum(p > 0.5))
        assert found["accuracy"] == right / len(rows) and found["n"] == len(rows) == numbers["measured"]
        exact = stats.binomtest(right, len(rows)).proportion_ci(0.95, "exact")
        assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high), abs=1e-9)
        assert found["mean_probability"] == pytest.approx(p.mean(), abs=1e-5)
        student = stats.t.interval(0.95, len(p) - 1, p.mean(), stats.sem(p))
        assert (found["probability_low"], found["probability_high"]) == pytest.approx(student, abs=1e-5)
    section = (line[1] / "agreement" / "section.md").read_text()
    assert f"{100 * numbers['models']['fit']['accuracy']:.1f} [" in section
    assert "two" not in section and not any(word in section for word in WORDS if len(word) > 3)  # no text is shown


def test_what_is_left_out_is_counted(line):
    figures = storage.read_json(line[1] / "agreement" / "stage.json")["figures"]
    assert figures == {"measured": len(expected_rows()), "too_long": 1, "undecided": 1, "known_prompts": 3}


@pytest.mark.parametrize("count", [1, 5, 8])
def test_the_first_pairs_of_the_file_are_measured(line, count):
    stage = replace(line[0].stages["agreement"], count=count, overlap=True)
    rows, figures = stage.measured_pairs(context_of(line, stage))
    first = [row for row in human_rows()[:count] if row["p"] != 0.5 and row["first"] != LONG]
    assert rows == first and sum(figures[name] for name in ("measured", "too_long", "undecided")) == count


def test_overlap_measures_known_prompts_too_and_the_held_out_split_is_the_end_of_the_file(line):
    stage = replace(line[0].stages["agreement"], overlap=True)
    figures = stage.measured_pairs(context_of(line, stage))[1]
    assert figures["known_prompts"] == 3 and figures["measured"] == len(expected_rows()) + 3
    held_out = replace(stage, split="held_out", overlap=False)
    assert held_out.measured_pairs(context_of(line, held_out))[0] == human_rows()[-3:]


def stages(line):
    """Yields (what, whether it is refused, changed stages): a model is not measured on pairs that it was fitted to."""
    whole = line[0].stages
    human, fit, agreement = whole["human"], replace(whole["fitted"], pairs="human"), whole["agreement"]
    twin = replace(human, held_out=0.5)
    label = aj.Label(
        generator="tuned", method=aj.Judged(aj.Oracle("longer")), split="train", prompts=9, writing=WRITING
    )
    tuned = aj.FineTune(start="base", pairs="human", adam=fit.adam, loop=fit.loop, row=32)
    held_out = replace(agreement, split="held_out")
    yield "its own pairs", True, {"fitted": fit}
    yield "the same file under another name", True, {"twin": twin, "fitted": replace(fit, pairs="twin")}
    yield "its start was fitted to them", True, {"first": fit, "fitted": replace(whole["fitted"], start="first")}
    mixed = {"mixed": aj.MixPairs("file", "human"), "fitted": replace(fit, pairs="mixed")}
    yield "they are part of a mixture", True, mixed
    yield "measured as truth alone", False, {"fitted": replace(whole["fitted"], truth="human")}
    yield "the writer of its pairs", True, {"tuned": tuned, "label": label, "fitted": replace(fit, pairs="label")}
    yield "overlap says so", False, {"fitted": fit, "agreement": replace(agreement, overlap=True)}
    yield "the held-out split", False, {"fitted": fit, "agreement": held_out}
    yield "the held-out split, mixed", False, {**mixed, "agreement": held_out}
    yield "another cut of the file", True, {"twin": twin, "fitted": replace(fit, pairs="twin"), "agreement": held_out}
    writer = {"tuned": tuned, "label": label, "fitted": replace(fit, pairs="label")}
    yield "the held-out split, by way of a writer", False, {**writer, "agreement": held_out}
    own = {**writer, "agreement": replace(agreement, pairs="label", models={"fit": "fitted"})}
    yield "labelled pairs", True, own
    apart = {**own, "label": replace(label, held_out=0.5), "agreement": replace(own["agreement"], split="held_out")}
    yield "labelled pairs that are held out", False, apart
    yield "what their writer learned from", False, {**own, "fitted": fit}


CASES = ["its own pairs", "the same file under another name", "its start was fitted to them",
         "they are part of a mixture", "measured as truth alone", "the writer of its pairs", "overlap says so",
         "the held-out split", "the held-out split, mixed", "another cut of the file",
         "the held-out split, by way of a writer", "labelled pairs", "labelled pairs that are held out",
         "what their writer learned from"]  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_a_model_is_not_measured_on_pairs_that_it_was_fitted_to(line, what):
    cases = {name: rest for name, *rest in stages(line)}
    assert list(cases) == CASES
    refused, changed = cases[what]
    whole = line[0].with_stages(**changed)
    stage = whole.stages["agreement"]
    context = Context(whole, None, "agreement", mesh())
    if not refused:
        return stage.check(context)
    with pytest.raises(UserError, match=r"^agreement: 'fit' was fitted to pairs of '.*overlap=True$") as error:
        stage.check(context)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"models": {}}, "models is empty"), ({"split": "test"}, "choose train or held_out"), ({"count": 0}, "count=0"),
])  # fmt: skip
def test_a_field_out_of_range_is_refused(line, changes, words):
    with pytest.raises(UserError, match=words):
        replace(line[0].stages["agreement"], **changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"sizes": SIZES._replace(reply=1)}, "no pair fits prompts of 16 and replies of 1 tokens; raise agreement.sizes"),
    ({"count": 1}, "of 1 pairs of 'human', 0 are undecided and 1 have prompts that a model was fitted to"),
])  # fmt: skip
def test_nothing_to_measure_is_told(line, changes, words):
    stage = replace(line[0].stages["agreement"], **changes)
    with pytest.raises(UserError, match=words):
        stage.measured_pairs(context_of(line, stage))


def test_a_split_that_is_not_there_is_told_before_anything_runs(line):
    stage = replace(line[0].stages["agreement"], pairs="file", split="held_out", overlap=True)
    with pytest.raises(UserError, match=r"'file' holds nothing out; set file\.held_out"):
        stage.check(context_of(line, stage))


@needs_data
def test_on_the_real_file_the_held_out_half_is_measured(tmp_path):
    """Whoever was fitted to the first half is measured on prompts of the second alone; nothing is lost or shown."""
    settings = {"checkpoint": str(DATA / "models" / "stories260K"), "comparisons": str(HH), "small": "True"}
    whole = load(EXPERIMENT, {**settings, "agreement.sizes.prompt": "96", "agreement.sizes.reply": "64"})
    kept = {name: whole.stages[name] for name in ("base", "human", "people", "agreement")}
    kept["people"] = replace(kept["people"], buckets=(64,), response=32, loop=aj.Loop(steps=1, batch=8))
    kept["agreement"] = replace(kept["agreement"], models={"people": "people"})
    run(replace(whole, stages=kept), tmp_path)
    numbers = storage.read_json(tmp_path / "agreement" / "numbers.json")
    splits = kept["human"].splits(Context(whole, tmp_path, "human", mesh()))
    assert [len(rows) for rows in splits.values()] == [1152, 1151]
    assert not {row["prompt"] for row in splits["train"]} & {row["prompt"] for row in splits["held_out"]}
    assert numbers["measured"] + numbers["too_long"] == 1151 and numbers["measured"] == numbers["models"]["people"]["n"]
    assert numbers["measured"] > 50 and numbers["undecided"] == numbers["known_prompts"] == 0
    assert "Human" not in (tmp_path / "agreement" / "section.md").read_text()
