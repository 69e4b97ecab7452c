"""The judge of a table is never what a policy was trained against, nor fitted to pairs that a policy has seen."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import alignjax as aj
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.pipeline.config import load
from alignjax.pipeline.experiment import Context, order

FILE = Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    return load(FILE, {"small": "True"})


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """The path of a file of one comparison, as text."""
    path = tmp_path_factory.mktemp("pairs") / "comparisons.jsonl"
    path.write_text(json.dumps({"prompt": "x", "first": "a", "second": "b", "p": 1.0}))
    return str(path)


def check_table(experiment):
    """Calls the check of the table, before anything has run."""
    order(experiment.stages)  # the wiring itself is right
    context = Context(experiment, None, "table", sharding.make_mesh(experiment.mesh))
    experiment.stages["table"].check(context)


def judged(quickstart, judge, /, **stages):
    """Returns the quickstart with other stages and a table of nash_md alone by one judge."""
    policies = {"nash_md": "nash_md"}
    return quickstart.with_stages(
        **stages, table=replace(quickstart.stages["table"], policies=policies, judges={"j": judge})
    )


def against(stage, preference, **changes):
    """Returns a TrainPolicy stage that is trained against another preference model."""
    return replace(stage, data=replace(stage.data, preference=preference), **changes)


def tuned_on(pairs):
    """Returns a FineTune stage that imitates the preferred replies of pairs."""
    return aj.FineTune(start="base", pairs=pairs, adam=aj.Adam(1e-3), loop=aj.Loop(steps=1, batch=8), row=64)


def offline(stage, pairs):
    """Returns a TrainPolicy stage that learns from pairs on disk."""
    objective = aj.DirectAlignment(partial(aj.losses.dpo, beta=0.1))
    return replace(stage, objective=objective, data=aj.OfflineData(pairs))


def models(q):
    """Yields (what is wrong, judge, stages) where the judge is, or is made from, a model that rewarded the policy."""
    fit, md, base = (q.stages[name] for name in ("preference", "nash_md", "base"))
    asked = {"asked": aj.ZeroShotPreference("base"), "nash_md": against(md, "asked")}
    yield "it is P", aj.ModelJudge("preference"), {}
    yield "it is P under another name", aj.ModelJudge("copy"), {"copy": fit}
    yield "it is made from P", aj.ModelJudge("tuned"), {"tuned": replace(fit, start="preference", pairs="annotated")}
    yield "both ask one model", aj.ModelJudge("again"), {**asked, "again": aj.ZeroShotPreference("base")}
    yield "a language model is P's model", aj.LanguageModelJudge("base"), asked
    heads = aj.ZeroShotPreference("base", aj.pairwise)
    yield "another form asks P's model", aj.ModelJudge("again"), {**asked, "again": heads}
    yield "another name of P's model", aj.LanguageModelJudge("twin"), {**asked, "twin": base}
    start = {"first": against(md, "judge"), "nash_md": replace(md, start="first")}
    yield "the start was trained against it", aj.ModelJudge("judge"), start
    yield "so was the reference", aj.ModelJudge("judge"), {**start, "nash_md": replace(md, reference="first")}
    tuned = {"tuned": replace(fit, start="judge", pairs="pairs"), "nash_md": against(md, "tuned")}
    yield "P is made from it", aj.ModelJudge("judge"), tuned
    fitted = {"j": replace(fit, start="asked", pairs="annotated", seed=5)}
    yield "it is made from the model that P asks", aj.ModelJudge("j"), {**asked, **fitted}


def labels(q):
    """Yields (what is wrong, judge, stages) where the judge, or its like, labelled pairs that the policy depends on."""
    pairs, fit, md, base = (q.stages[name] for name in ("pairs", "preference", "nash_md", "base"))
    rated = {"rater": replace(base, seed=1), "rated": replace(pairs, method=aj.Judged(aj.LanguageModelJudge("rater")))}
    fitted = {**rated, "preference": replace(fit, pairs="rated", truth=None)}
    yield "it rated P's pairs", aj.LanguageModelJudge("rater"), fitted
    yield "its model rated P's pairs", aj.ModelJudge("j"), {**fitted, "j": aj.ZeroShotPreference("rater")}
    yield "it rated the policy's pairs", aj.LanguageModelJudge("rater"), {**rated, "nash_md": offline(md, "rated")}
    asked = {"rater": replace(base, seed=1), "rated": replace(pairs, method=aj.RLAIF(aj.LanguageModelRater("rater")))}
    yield (
        "it rated the pairs that were imitated",
        aj.LanguageModelJudge("rater"),
        {**asked, "nash_md": tuned_on("rated")},
    )
    again = aj.Relabel(judge=aj.LanguageModelRater("rater"), sizes=aj.JudgeSizes(8, 32, 32), pairs="pairs")
    again = {"rater": asked["rater"], "again": again, "preference": replace(fit, pairs="again", truth=None)}
    yield "it labelled P's pairs again", aj.LanguageModelJudge("rater"), again
    mixed = {**again, "mixed": aj.MixPairs(first="pairs", second="again"), "nash_md": offline(md, "mixed")}
    yield "its labels are mixed into the policy's pairs", aj.LanguageModelJudge("rater"), mixed
    own = {"rated": replace(pairs, method=aj.Judged(aj.ModelJudge("judge")))}
    own |= {"preference": replace(fit, pairs="rated", truth=None)}
    yield "the model itself labelled P's pairs", aj.ModelJudge("judge"), own
    labeler = {"labeler": replace(fit, pairs="annotated", seed=3)}
    labeler |= {"rated": replace(pairs, method=aj.Judged(aj.ModelJudge("labeler")))}
    labeler |= {"preference": replace(fit, pairs="rated", truth=None)}
    yield "P's labeler was fitted to its pairs", aj.ModelJudge("judge"), labeler
    taught = {"rated": replace(pairs, method=aj.Judged(aj.ModelJudge("preference")), seed=9)}
    yield "P itself taught it", aj.ModelJudge("j"), {**taught, "j": replace(fit, pairs="rated", truth=None, seed=7)}
    teacher = {"taught": replace(pairs, method=aj.Judged(aj.ModelJudge("judge")), seed=9)}
    teacher |= {"student": replace(fit, pairs="taught", truth=None, seed=7)}
    teacher |= {"rated": replace(pairs, method=aj.Judged(aj.ModelJudge("student")), seed=11)}
    yield "it taught P's labeler", aj.ModelJudge("judge"), {**teacher, "nash_md": offline(md, "rated")}
    writer = {"writer": against(md, "judge"), "written": replace(pairs, generator="writer", seed=13)}
    writer |= {"nash_md": offline(md, "written")}
    yield "the pairs' writer was trained against it", aj.ModelJudge("judge"), writer
    asked = {"rater": replace(base, seed=1), "asked": aj.ZeroShotPreference("rater"), "writer": against(md, "asked")}
    asked |= {"written": writer["written"], "nash_md": writer["nash_md"]}
    yield "the pairs' writer was trained against a model without pairs", aj.LanguageModelJudge("rater"), asked


def pairs_seen(q, file):
    """Yields (what is wrong, judge, stages) where the judge is fitted to pairs that the policy, or its P, has seen."""
    pairs, fit, judge, md = (q.stages[name] for name in ("pairs", "preference", "judge", "nash_md"))
    files = {"one": aj.LoadPairs(file), "two": aj.LoadPairs(file, held_out=0.5)}
    files |= {"preference": replace(fit, pairs="one", truth=None), "judge": replace(judge, pairs="two", truth=None)}
    yield "one file under two names", aj.ModelJudge("judge"), files
    copy = {"copy": replace(pairs, prompts=7, held_out=0.1), "judge": replace(judge, pairs="copy")}
    yield "one labelling under two names", aj.ModelJudge("judge"), copy
    batches = {"copy": replace(pairs, writing=replace(pairs.writing, batch=8)), "judge": replace(judge, pairs="copy")}
    yield "one labelling in other batches", aj.ModelJudge("judge"), batches
    texts = {"judge": replace(judge, pairs="same"), "same": replace(pairs, method=aj.Judged(aj.Oracle("oracle")))}
    yield "other labels on texts of one seed", aj.ModelJudge("judge"), texts
    yield "the very pairs", aj.ModelJudge("judge"), {"judge": replace(judge, pairs="pairs")}
    yield "P was measured on them", aj.ModelJudge("judge"), {"preference": replace(fit, truth="annotated")}
    yield "the policy learns from them offline", aj.ModelJudge("judge"), {"nash_md": offline(md, "annotated")}
    first = {"first": offline(md, "annotated"), "nash_md": replace(md, start="first")}
    yield "its start learnt from them offline", aj.ModelJudge("judge"), first
    yield "the policy imitates their preferred replies", aj.ModelJudge("judge"), {"nash_md": tuned_on("annotated")}
    first = {"first": tuned_on("annotated"), "nash_md": replace(md, start="first")}
    yield "its start imitated their preferred replies", aj.ModelJudge("judge"), first
    mixed = {"mixed": aj.MixPairs(first="pairs", second="annotated"), "nash_md": tuned_on("mixed")}
    yield "they are mixed into what it imitates", aj.ModelJudge("judge"), mixed
    tuned = {"judge": replace(judge, pairs="pairs"), "tuned": replace(judge, start="judge", pairs="truth", truth=None)}
    yield "the judge's start was fitted to P's pairs", aj.ModelJudge("tuned"), tuned


def refused(experiment, words):
    with pytest.raises(UserError, match="name a held-out judge") as error:
        check_table(experiment)
    message = str(error.value)
    assert (
        words in message and "\n" not in message and message.startswith("table: judge 'j'") and "'nash_md'" in message
    )


MODELS = [*(case[0] for case in models(load(FILE, {}))), *(case[0] for case in labels(load(FILE, {})))]


@pytest.mark.parametrize("wrong", MODELS)
def test_a_judge_is_never_what_a_policy_was_trained_against(quickstart, wrong):
    cases = {name: rest for name, *rest in [*models(quickstart), *labels(quickstart)]}
    judge, stages = cases[wrong]
    words = "has seen" if wrong == "P's labeler was fitted to its pairs" else "was trained against"
    refused(judged(quickstart, judge, **stages), words)


@pytest.mark.parametrize("wrong", [case[0] for case in pairs_seen(load(FILE, {}), "x")])
def test_a_judge_is_never_fitted_to_pairs_that_a_policy_has_seen(quickstart, comparisons, wrong):
    cases = {name: rest for name, *rest in pairs_seen(quickstart, comparisons)}
    judge, stages = cases[wrong]
    refused(judged(quickstart, judge, **stages), "has seen")


def test_held_out_judges_are_accepted(quickstart, comparisons):
    """The quickstart's own, a language model that nothing was trained against, and pairs of another labelling."""
    check_table(quickstart)
    md, base = quickstart.stages["nash_md"], quickstart.stages["base"]
    rater = {"rater": replace(base, seed=1)}
    check_table(judged(quickstart, aj.LanguageModelJudge("rater"), **rater))
    check_table(judged(quickstart, aj.LanguageModelJudge("base")))  # P begins as the base, as the policy itself does
    fit, pairs = (quickstart.stages[name] for name in ("judge", "pairs"))
    rated = {"rated": replace(pairs, method=aj.RLAIF(aj.LanguageModelRater("base")))}
    rated |= {"preference": replace(quickstart.stages["preference"], pairs="rated", truth=None)}
    people = {**rated, "people": replace(fit, pairs="annotated", seed=5)}
    check_table(
        judged(quickstart, aj.ModelJudge("people"), **people)
    )  # it began as the rater did, and learned from others
    check_table(judged(quickstart, aj.ModelJudge("judge"), nash_md=offline(md, "pairs")))
    other = {"file": aj.LoadPairs(comparisons), "nash_md": offline(md, "file")}
    check_table(judged(quickstart, aj.ModelJudge("judge"), **other))
    check_table(judged(quickstart, aj.Oracle("oracle"), nash_md=offline(md, "annotated")))
    check_table(judged(quickstart, aj.ModelJudge("judge"), nash_md=tuned_on("pairs")))
    replies = {"replies": aj.LoadReplies(comparisons), "nash_md": tuned_on("replies")}
    check_table(judged(quickstart, aj.ModelJudge("judge"), **replies))


def test_a_checkpoint_is_one_model_whatever_its_path_and_dtype(quickstart, tmp_path):
    """A judge is refused that asks the folder which the preference model asks, written otherwise."""
    lm = aj.LoadCheckpoint(str(tmp_path), model=quickstart.stages["base"].model)
    digest = {"digest": "0123456789abcdef"}
    stages = {"lm": lm, "again": replace(lm, path=f"{tmp_path}/", compute_dtype="bfloat16")}
    for stage in stages.values():
        object.__setattr__(stage, "digest", digest["digest"])
    context = Context(quickstart.with_stages(**stages), None, "lm", sharding.make_mesh(quickstart.mesh))
    assert context.exposure("lm").identity == context.exposure("again").identity != frozenset()


def test_every_policy_of_the_table_is_asked_for(quickstart):
    """One policy of several is enough for a refusal, and its own name is in the message."""
    stage = against(quickstart.stages["self_play"], "judge")
    with pytest.raises(UserError, match="'self_play' was trained against"):
        check_table(quickstart.with_stages(self_play=stage))


def test_a_judge_that_is_not_held_out_can_say_so(quickstart):
    """And only such a one: a held-out judge keeps its name, whoever else is trained against the other."""
    hacked = aj.TrainingJudge(aj.ModelJudge("preference"))
    check_table(judged(quickstart, hacked))
    assert "NOT held out" in hacked.describe() and "stage preference" in hacked.describe()
    with pytest.raises(UserError, match="judge 'j' is a TrainingJudge, and no policy depends on it; name it without"):
        check_table(judged(quickstart, aj.TrainingJudge(aj.ModelJudge("judge"))))
    with pytest.raises(UserError, match="TrainingJudge holds a TrainingJudge"):
        aj.TrainingJudge(hacked)
    with pytest.raises(UserError, match="has no oracle 'nobody'"):
        check_table(judged(quickstart, aj.TrainingJudge(aj.Oracle("nobody"))))
    with pytest.raises(UserError, match=r"needs a preference model as judges\.j\.judge\.stage"):
        check_table(judged(quickstart, aj.TrainingJudge(aj.ModelJudge("base"))))


@pytest.mark.parametrize("wrong", MODELS)
def test_every_judge_that_the_law_refuses_can_be_named_a_training_judge(quickstart, wrong):
    judge, stages = {name: rest for name, *rest in [*models(quickstart), *labels(quickstart)]}[wrong]
    check_table(judged(quickstart, aj.TrainingJudge(judge), **stages))
