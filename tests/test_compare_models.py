"""Preference models on the same replies: which reply is shown first, whose answer stands where, what a kill leaves.

The networks are random tables, the oracle's preferences are a circle of three kinds of replies.
"""

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import RunAgain, UserError
from alignjax.models.tokenizer import encode_continuation, pad
from alignjax.pipeline.config import load
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.run import run
from alignjax.pipeline.stages import compare_models
from alignjax.pipeline.stages.pair_batches import shuffle_sides
from alignjax.reporting.model_comparison import comparison_picture, comparison_rows
from alignjax.training import data
from tests.conftest import ROOT
from tests.test_transitivity import brute_force
from tests.test_wiring import WORDS, WRITING, Random, mesh, task

MODELS = {"reward 1": "fitted", "pairwise 1": "asked", "paper": "shown"}
ORDERS = [("reward 1", "both orders"), ("pairwise 1", "both orders"), ("paper", "both orders"), ("paper", "one order")]


def circle(prompt, reply, other):
    """Kind 1 beats kind 0, 2 beats 1 and 0 beats 2, each with 0.8; the kind is the length modulo 3."""
    return (0.5, 0.8, 0.2)[(len(reply) - len(other)) % 3]


def short(raw):
    """Refuses every reply of an odd length."""
    return None if len(raw) % 2 else raw or " "


def experiment(folder, **stages):
    rows = [{"prompt": f"x {w}", "first": f"yes {w}", "second": f"no {w}", "p": 1.0} for w in WORDS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fit = aj.FitPreference(
        start="other", pairs="file", form=aj.bradley_terry, adam=aj.Adam(3e-2, warmup=0),
        loop=aj.Loop(steps=4, batch=8), buckets=(16,), response=8,
    )  # fmt: skip
    whole = {
        "base": Random(0),
        "other": Random(1),
        "file": aj.LoadPairs(str(folder / "pairs.jsonl")),
        "fitted": fit,
        "asked": aj.ZeroShotPreference("other", aj.pairwise),
        "shown": aj.ZeroShotPreference("other", aj.one_order),
        "compare": aj.CompareModels(
            models=MODELS, policy="base", judge=aj.Oracle("circle"), prompts=10, replies=4, writing=WRITING
        ),
    }  # fmt: skip
    return aj.Experiment(task(oracles={"circle": circle}), {**whole, **stages}, mesh=aj.Mesh(data=-1))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    whole = experiment(folder)
    run(whole, folder / "work")
    return whole, folder / "work"


def chunks(line, part, field):
    files = sorted((line[1] / "compare" / "chunks" / part).iterdir())
    return [row for file in files for row in storage.read_json(file)[field]]


def numbers_of(line):
    return storage.read_json(line[1] / "compare" / "numbers.json")


def context_of(line, **changes):
    whole = line[0].with_stages(compare=replace(line[0].stages["compare"], **changes))
    return Context(whole, line[1], "compare", mesh())


def texts(line):
    prompts = line[0].task.source.prompts("test", 10, context_of(line).seed())
    return prompts, chunks(line, "write", "replies")


def alone(line, stage, order):
    """P(y_i > y_j) of a stage's model, y_i shown first, every pair of replies asked alone: [N, K, K]."""
    context = context_of(line)
    network = context.load(stage)
    model = line[0].stages[stage].preference_model(context.task, network)
    ask = jax.jit(model.logit if order == "both orders" else model.ordered)
    prompts, replies = texts(line)
    p = np.full((len(prompts), 4, 4), 0.5)
    for n, prompt in enumerate(prompts):
        for i, j in itertools.permutations(range(4), 2):
            ids = [network.tokenizer.encode(prompt)]
            ids += [encode_continuation(network.tokenizer, " " + replies[n][side]) for side in (i, j)]
            p[n, i, j] = 1 / (1 + np.exp(-float(ask(network.all_params, *(pad([row], 32) for row in ids))[0])))
    return p


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_what_a_model_says_is_what_it_says_of_each_pair_alone_in_that_order(line, name, order):
    p = np.array(chunks(line, f"{name}, {order}", "p"))
    np.testing.assert_allclose(p, alone(line, MODELS[name], order), atol=1e-5)
    assert np.ptp(p) > 0.1


def test_every_model_is_asked_about_the_replies_of_one_policy_to_the_test_prompts(line):
    prompts, replies = texts(line)
    assert len(replies) == len(prompts) == 10 and all(prompt[0] == "t" for prompt in prompts)
    assert all(len(own) == 4 for own in replies)
    assert np.mean([len(set(own)) for own in replies]) > 3.5  # each is drawn with keys of its own


def test_figures_are_those_of_a_loop_over_pairs_and_triples(line):
    prompts, replies = texts(line)
    numbers = numbers_of(line)
    truth = np.array([[[circle(x, a, b) for b in own] for a in own] for x, own in zip(prompts, replies, strict=True)])
    np.testing.assert_allclose(chunks(line, "judge", "p"), truth, atol=1e-12)
    pairs = [(n, i, j) for n in range(10) for i, j in itertools.combinations(range(4), 2)]
    assert (numbers["prompts"], numbers["pairs"]) == (10, 60)
    assert numbers["judge_ties"] == sum(truth[at] == 0.5 for at in pairs) > 0
    for name, order in ORDERS:
        p, found = np.array(chunks(line, f"{name}, {order}", "p")), numbers["models"][name][order.replace(" ", "_")]
        right = [0.5 if p[at] == 0.5 else (p[at] > 0.5) == (truth[at] > 0.5) for at in pairs if truth[at] != 0.5]
        assert found["accuracy"]["value"] == pytest.approx(np.mean(right)) and found["accuracy"]["n"] == len(right)
        bias = [p[n, i, j] + p[n, j, i] - 1 for n, i, j in pairs]
        assert found["position_bias"]["value"] == pytest.approx(np.mean(bias), abs=1e-12)
        upper = np.triu(p, 1)
        odd = upper + np.tril(1 - upper.swapaxes(1, 2))
        assert found["cyclic"]["value"] == pytest.approx(sum(brute_force(own, 0.01) for own in odd) / 40)
    assert numbers["judge"]["cyclic"]["value"] == sum(brute_force(own, 0.01) for own in truth) / 40 > 0
    assert numbers["judge"]["accuracy"]["value"] == numbers["judge"]["reproduced"]["value"] == 1
    assert numbers["best_reward"]["cyclic"]["value"] == 0


def test_position_bias_is_gone_to_the_bit_where_both_orders_are_asked(line):
    models = numbers_of(line)["models"]
    for orders in models.values():
        found = orders["both_orders"]
        assert found["position_bias"] == found["changed"] == {"value": 0, "low": 0, "high": 0, "n": 60}
    assert models["reward 1"]["one_order"] is models["pairwise 1"]["one_order"] is None
    shown = models["paper"]["one_order"]
    assert abs(shown["position_bias"]["value"]) > 0.05 and shown["changed"]["value"] > 0.05


def test_a_reward_model_has_no_cycle_and_half_the_difference_of_both_orders_is_what_judges(line):
    assert numbers_of(line)["models"]["reward 1"]["both_orders"]["cyclic"]["value"] == 0
    one, both = (np.array(chunks(line, f"paper, {order}", "p")) for order in ("one order", "both orders"))
    logit = np.log(one / (1 - one))
    want = 1 / (1 + np.exp(-(logit - logit.swapaxes(1, 2)) / 2))
    np.testing.assert_allclose(both, want, atol=1e-4)


def test_a_judge_asks_the_papers_form_in_both_orders(line):
    context, spec, sizes = context_of(line), aj.ModelJudge("shown"), aj.JudgeSizes(8, 16, 6)
    judge = spec.open(context, spec.programs(context, "judge", sizes), sizes)
    prompts, replies = texts(line)
    got = judge(prompts, [own[2] for own in replies], [own[1] for own in replies])
    np.testing.assert_allclose(got, np.array(chunks(line, "paper, both orders", "p"))[:, 2, 1], atol=1e-6)
    assert np.ptp(got) > 0.05


def test_the_report_has_the_table_and_the_picture(line):
    report = (line[1] / "report.md").read_text()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in report.splitlines() if row[:1] == "|"]
    named = {row[0]: row for row in rows}
    for name in ("the judge", "the best reward", "reward 1", "pairwise 1", "paper, one order", "paper, both orders"):
        assert name in named
    found = numbers_of(line)["models"]["paper"]["one_order"]
    assert named["paper, one order"][4].startswith(f"{found['position_bias']['value']:.3f} [")
    assert named["reward 1"][6] == "0.000 [0.000, 0.000]" and "the task's exact oracle 'circle'" in report
    assert "](compare-models.png)" in report and (line[1] / "compare-models.png").stat().st_size > 1000
    assert not any(reply in report for own in texts(line)[1] for reply in own if len(reply) > 8)  # no text is shown


def test_models_that_differ_behind_a_space_make_one_curve(line):
    numbers = numbers_of(line)
    numbers["models"]["pairwise 2"] = numbers["models"]["pairwise 1"]
    accuracy = comparison_picture(numbers).axes[0]
    drawn = {container.get_label(): container.lines[0].get_ydata().tolist() for container in accuracy.containers}
    value = numbers["models"]["pairwise 1"]["both_orders"]["accuracy"]["value"]
    assert drawn["pairwise"] == [value, value] and {"reward", "paper", "paper, one order"} < drawn.keys()


def test_a_killed_stage_goes_on_with_what_it_has(line, tmp_path, monkeypatch):
    """It is ended in its third call of a judge, and asks what is left alone."""
    asked, every_pair = [], compare_models.comparison.every_pair

    def ended(judge, prompts, replies, both_orders, batch):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise RunAgain("ended")
        return every_pair(judge, prompts, replies, both_orders, batch)

    monkeypatch.setattr(compare_models.comparison, "every_pair", ended)
    whole = experiment(tmp_path)
    with pytest.raises(RunAgain):
        run(whole, tmp_path / "work")
    run(whole, tmp_path / "work")
    assert len(asked) == 1 + 5 * len(list((line[1] / "compare" / "chunks" / "judge").iterdir())) > 6
    assert numbers_of((whole, tmp_path / "work")) == numbers_of(line)


def test_programs_are_known_before_anything_has_run(line):
    context = Context(line[0], None, "compare", mesh())
    programs = line[0].stages["compare"].programs(context)
    asked = ["reward 1, both orders", "pairwise 1, both orders", "paper, both orders", "paper, one order"]
    assert [program.name for program in programs] == ["write 16", *asked]
    for program in programs[1:]:
        assert jax.eval_shape(program.function, *program.arguments).shape == (8,)


def test_without_a_judge_nothing_is_called_right(line, tmp_path):
    stage = replace(line[0].stages["compare"], judge=None, models={"paper": "shown"}, prompts=4, replies=3)
    whole = replace(line[0], stages={name: line[0].stages[name] for name in ("base", "other", "shown")})
    whole = whole.with_stages(compare=stage)
    run(whole, tmp_path)
    numbers = numbers_of((whole, tmp_path))
    found = numbers["models"]["paper"]["both_orders"]
    assert set(found) == {"position_bias", "changed", "cyclic", "weakest_link"} and "judge_ties" not in numbers
    assert [name for name, _ in comparison_rows(numbers)] == ["paper, one order", "paper, both orders"]
    assert "accuracy" not in (tmp_path / "compare" / "section.md").read_text()


def test_what_is_left_out_is_counted(line, monkeypatch):
    """A known prompt, one that is too long, and those for which the filter refuses every try."""
    context = context_of(line, attempts=1)
    prompts = line[0].task.source.prompts("test", 10, context.seed())
    encode = context.abstract("base").tokenizer.encode
    longest = max(len(encode(prompt)) for prompt in prompts)
    stage = replace(context.experiment.stages["compare"], writing=replace(WRITING, buckets=(longest - 1,)))
    fitting = [prompt for prompt in prompts if len(encode(prompt)) < longest]
    monkeypatch.setattr(compare_models, "known_prompts", lambda context, models: {fitting[1]})
    drawn = {}

    def draw(self, context, programs, asked):
        drawn.update({x: [None if i == 2 else f"{x} a", "b", "c", "d"] for i, x in enumerate(asked)})
        return list(drawn.values())

    monkeypatch.setattr(aj.CompareModels, "draw", draw)
    kept, replies, figures = stage.written(context, ())
    assert list(drawn) == [fitting[0], *fitting[2:]] and kept == [x for i, x in enumerate(drawn) if i != 2]
    assert [own[0] for own in replies] == [f"{x} a" for x in kept]
    assert figures == {
        "prompts": len(kept), "pairs": 6 * len(kept), "too_long": 10 - len(fitting), "known_prompts": 1, "incomplete": 1
    }  # fmt: skip
    monkeypatch.setattr(aj.CompareModels, "draw", lambda self, context, programs, asked: [[None]] * len(asked))
    with pytest.raises(UserError, match=r"compare: of 10 prompts, 1 are known to a model and \d+ have too few replies"):
        stage.written(context, ())


def test_a_reply_that_the_filter_refuses_is_drawn_again(line):
    whole = replace(line[0], task=replace(line[0].task, clean=short))
    context = Context(whole, line[1], "filtered", mesh())
    for attempts, complete in ((1, False), (12, True)):
        stage = replace(whole.stages["compare"], attempts=attempts)
        named = replace(context, experiment=whole.with_stages(filtered=stage), name=f"compare{attempts}")
        named = replace(named, experiment=named.experiment.with_stages(**{named.name: stage}))
        with jax.set_mesh(named.mesh):
            drawn = stage.draw(named, stage.programs(named), ["t red", "t blue"])
        kept = [reply for own in drawn for reply in own if reply is not None]
        assert all(len(reply) % 2 == 0 or reply == " " for reply in kept)
        assert (len(kept) == 8) == complete


@pytest.mark.parametrize(("changes", "words"), [
    ({"models": {}}, "CompareModels.models is empty; name a preference model"),
    ({"models": {"a/b": "asked"}}, "'a/b' cannot name a model"), ({"replies": 2}, "replies=2"),
    ({"prompts": 0}, "prompts=0"), ({"threshold": 0.6}, "threshold=0.6"), ({"attempts": 0}, "attempts=0"),
])  # fmt: skip
def test_a_field_out_of_range_is_refused(line, changes, words):
    with pytest.raises(UserError, match=words) as error:
        replace(line[0].stages["compare"], **changes)
    assert "\n" not in str(error.value)


def test_a_judge_that_is_not_there_is_told_before_anything_runs(line):
    context = context_of(line, judge=aj.Oracle("nobody"))
    with pytest.raises(UserError, match="compare: task 'words' has no oracle 'nobody'; it has circle"):
        context.experiment.stages["compare"].check(context)


def test_the_experiment_fits_every_form_to_the_same_pairs_over_its_own_width():
    whole = load(ROOT / "experiments" / "nlhf" / "preference_models.py", {})
    compare, forms = (
        whole.stages["compare"],
        {"pairwise": aj.pairwise, "paper": aj.one_order, "reward": aj.bradley_terry},
    )
    assert len(compare.models) == 9 and compare.judge == aj.Oracle("annotators")
    for name, stage in compare.models.items():
        form, width = name.split()
        fit = whole.stages[stage]
        assert fit.form is forms[form] and fit.pairs == "pairs"
        assert whole.stages[whole.stages[fit.start].start].model.width == int(width)
    widest = max(int(name.split()[1]) for name in compare.models)
    assert compare.policy == whole.stages["pairs"].generator == f"sft{widest}"
    for name in ("pairs", "compare", "paper48"):
        whole.stages[name].check(Context(whole, None, name, mesh()))


# --- the paper's form is fitted ---


def test_a_coin_of_its_own_orders_each_pair_and_the_label_follows():
    rows = [{"prompt": str(i), "first": f"a{i}", "second": f"b{i}", "p": 0.9} for i in range(200)]
    mixed = shuffle_sides(rows, 3)
    exchanged = [row["first"][0] == "b" for row in mixed]
    assert 70 < sum(exchanged) < 130
    for row, swapped, i in zip(mixed, exchanged, range(200), strict=True):
        first, second = (f"b{i}", f"a{i}") if swapped else (f"a{i}", f"b{i}")
        assert (row["prompt"], row["first"], row["second"]) == (str(i), first, second)
        assert row["p"] == pytest.approx(0.1 if swapped else 0.9)
    assert shuffle_sides(rows, 3) == mixed != shuffle_sides(rows, 4)


def test_the_papers_form_does_not_learn_that_the_preferred_reply_stands_first(tmp_path):
    """In the file it always does. The shown logit is fitted: after training the words tell the winner in one order."""
    whole = experiment(tmp_path)
    fit = replace(
        whole.stages["fitted"], form=aj.one_order, loop=aj.Loop(steps=60, batch=8), adam=aj.Adam(1e-2, warmup=0)
    )
    whole = replace(whole, stages={"other": Random(1, scale=1.0), "file": whole.stages["file"], "fitted": fit})
    run(whole, tmp_path / "work")
    context = Context(whole, tmp_path / "work", "fitted", mesh())
    network = context.load("fitted")
    model = fit.preference_model(context.task, network)
    rows = data.read_pairs(tmp_path / "work" / "file" / "data", "train")
    sides = [
        pad([encode_continuation(network.tokenizer, " " + row[side]) for row in rows], 8)
        for side in ("first", "second")
    ]
    prompt = pad([network.tokenizer.encode(row["prompt"]) for row in rows], 16)
    forward = np.asarray(model.ordered(network.all_params, prompt, *sides))
    backward = np.asarray(model.ordered(network.all_params, prompt, *sides[::-1]))
    assert np.mean(forward > 0) > 0.9 and np.mean(backward < 0) > 0.9
    assert np.mean(np.asarray(model.logit(network.all_params, prompt, *sides)) > 0) == 1
