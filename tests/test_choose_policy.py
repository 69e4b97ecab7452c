"""The best of several policies: which replies are compared with whose, and which network is the result."""

import dataclasses

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.pipeline.experiment import Context, Exposure
from alignjax.pipeline.judges import check_held_out
from alignjax.pipeline.run import run
from tests.test_wiring import WRITING, Random, experiment, policy_stage


@dataclasses.dataclass(frozen=True)
class Longer:
    """Prefers the longer reply; ``asked`` notes what it was shown."""

    asked: list = dataclasses.field(default_factory=list, compare=False)

    def check(self, context):
        pass

    def exposure(self, context):
        return Exposure(identity=frozenset({"longer"}))

    def programs(self, context, name, sizes):
        return ()

    def open(self, context, programs, sizes):
        def judge(prompts, replies, others):
            self.asked.append((list(replies), list(others)))
            return np.array([0.5 + 0.5 * np.sign(len(a) - len(b)) for a, b in zip(replies, others, strict=True)])

        return judge

    def describe(self):
        return "length"


def chosen(judge, **policies):
    return aj.ChoosePolicy(policies=policies, reference="base", judge=judge, prompts=10, writing=WRITING)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder, judge = tmp_path_factory.mktemp("chosen"), Longer()
    whole = experiment(third=Random(2), best=chosen(judge, first="other", second="third"))
    run(whole, folder)
    return whole, folder, judge


def test_the_policy_with_the_highest_mean_over_the_references_replies_is_the_result(line):
    whole, folder, judge = line
    replies = {
        name: storage.read_json(folder / "best" / f"replies-{name}.json")
        for name in ("policy first", "policy second", "reference")
    }
    assert judge.asked == [(replies[f"policy {name}"], replies["reference"]) for name in ("first", "second")]
    assert len({tuple(texts) for texts in replies.values()}) == 3
    figures = storage.read_json(folder / "best" / "stage.json")["figures"]
    for name in ("first", "second"):
        signs = [np.sign(len(a) - len(b)) for a, b in zip(replies[f"policy {name}"], replies["reference"], strict=True)]
        assert figures["preference"][name] == pytest.approx(0.5 + 0.5 * np.mean(signs))
    assert figures["chosen"] == max(figures["preference"], key=figures["preference"].get)
    context = Context(whole, folder, "best", sharding.make_mesh(whole.mesh))
    best, loser = ("other", "third") if figures["chosen"] == "first" else ("third", "other")
    jax.tree.map(np.testing.assert_array_equal, context.load("best").params, context.load(best).params)
    assert np.any(context.load("best").params["embed"]["embedding"] != context.load(loser).params["embed"]["embedding"])


def test_a_judge_that_chose_is_not_held_out_from_what_it_chose(line):
    whole, folder, judge = line
    context = Context(whole, folder, "best", sharding.make_mesh(whole.mesh))
    with pytest.raises(UserError, match="name a held-out judge"):
        check_held_out(context, "length", judge, ["best"])
    check_held_out(context, "length", judge, ["other"])


def test_policies_of_different_kinds_are_refused():
    adapted = policy_stage(lora=aj.Lora(2, 8.0, ("q",)))
    whole = experiment(
        asked=aj.ZeroShotPreference("base"), adapted=adapted, best=chosen(Longer(), a="other", b="adapted")
    )
    context = Context(whole, None, "best", sharding.make_mesh(whole.mesh))
    with pytest.raises(UserError, match=r"best\.policies are networks of different kinds"):
        whole.stages["best"].check(context)
    with pytest.raises(UserError, match=r"ChoosePolicy\.policies is empty"):
        chosen(Longer())
