"""What stages refuse before they work, and that preference models see in a rollout what they were fitted on."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.checkpoints import huggingface
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.pipeline import stages
from alignjax.pipeline.config import load, load_module
from alignjax.pipeline.stages import fit_preference as fit
from alignjax.sampling import samplers as rollout
from alignjax.sampling.generate import bucketed
from alignjax.tasks.task import Format
from tests.conftest import ragged

FILE = Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def experiment():
    return load(FILE, {"small": "True"})


def check(experiment):
    context = stages.Context(experiment, Path(), "table", sharding.make_mesh(experiment.mesh))
    experiment.stages["table"].check_held_out(context)


def judged_by(experiment, source):
    table = dataclasses.replace(experiment.stages["table"], judges={"model": source})
    return experiment.with_stages(table=table)


def test_a_judge_is_never_what_a_policy_was_trained_against(experiment):
    check(experiment)
    fitted, md = experiment.stages["preference"], experiment.stages["nash_md"]
    clone = dataclasses.replace(fitted, start="base")
    tuned = dataclasses.replace(fitted, start="preference", pairs="annotated")
    further = dataclasses.replace(md, start="nash_md", preference="judge")
    asked = {"asked": stages.ZeroShot("base"), "again": stages.ZeroShot("base")}
    for source, extra in {
        "preference": {}, "clone": {"clone": clone}, "tuned": {"tuned": tuned},
        "judge": {"nash_md": further, "first": md},
        "again": {**asked, "nash_md": dataclasses.replace(md, preference="asked")},  # one model under two names
    }.items():  # fmt: skip
        with pytest.raises(UserError, match="held-out"):
            check(judged_by(experiment.with_stages(**extra), source))


def test_held_out_pairs_of_the_same_stage_can_be_the_truth(experiment, monkeypatch):
    read = []
    monkeypatch.setattr(fit.data, "read_pairs", lambda folder, split: read.append((folder, split)) or [])
    monkeypatch.setattr(fit.judges, "model_judge", lambda *_, **__: lambda *_: np.zeros(0))
    monkeypatch.setattr(fit.judges, "calibration", lambda p, label: {})
    monkeypatch.setattr(fit, "encode_pairs", lambda rows, *_: ([], rows))
    for truth in ("pairs", "truth"):
        stage = dataclasses.replace(experiment.stages["preference"], truth=truth)
        context = stages.Context(experiment, Path("w"), "preference", sharding.make_mesh(experiment.mesh))
        stage.measure(context, SimpleNamespace(tokenizer=None), SimpleNamespace(logit=None), {})
    assert read == [(Path("w/pairs/data"), "held_out"), (Path("w/truth/data"), "train")]
    held = dataclasses.replace(experiment.stages["pairs"], held_out=0.25)
    stages.check(dataclasses.replace(context, experiment=experiment.with_stages(
        pairs=held, preference=dataclasses.replace(stage, truth="pairs"))))  # fmt: skip


def test_pairs_too_long_to_train_on_are_not_measured_either(experiment, monkeypatch):
    def row(prompt, first, second):
        return {"prompt": "w " * prompt, "first": "w " * first, "second": "w " * second, "p": 1.0}

    rows, asked = [row(3, 1, 1), row(9, 1, 1), row(3, 1, 9), row(2, 1, 2)], []
    monkeypatch.setattr(fit.data, "read_pairs", lambda folder, split: rows)
    monkeypatch.setattr(fit, "encode_continuation", lambda tokenizer, text: text.split())
    judge = lambda *texts: asked.append(texts) or np.full(len(texts[0]), 0.9)  # noqa: E731
    monkeypatch.setattr(fit.judges, "model_judge", lambda *_, **__: judge)
    stage = dataclasses.replace(experiment.stages["preference"], truth="truth", buckets=(2, 4), response=4)
    context = stages.Context(experiment, Path("w"), "preference", sharding.make_mesh(experiment.mesh))
    found = stage.measure(context, SimpleNamespace(tokenizer=SimpleNamespace(encode=str.split)),
                          SimpleNamespace(logit=None), {})  # fmt: skip
    assert asked[0][0] == [rows[0]["prompt"], rows[3]["prompt"]] and found["n"] == 2 and found["too_long"] == 2
    rows = rows[1:3]
    with pytest.raises(UserError, match="none of 2 pairs fits prompts of 4 and responses of 4 tokens; raise buckets"):
        stage.measured(context, SimpleNamespace(encode=str.split))


def test_a_stage_of_ones_own_needs_no_check_and_is_trusted(experiment):
    own = SimpleNamespace(inputs=lambda: (), run=lambda context: {})
    mine = experiment.with_stages(own=own, table=dataclasses.replace(experiment.stages["table"], reference="own"))
    for name in ("own", "table"):
        stages.check(stages.Context(mine, Path(), name, sharding.make_mesh(experiment.mesh)))


def test_inputs_come_before_their_users_and_circles_are_named(experiment):
    names = stages.order(dict(reversed(experiment.stages.items())))
    for name in names:
        assert all(names.index(source) < names.index(name) for source in experiment.stages[name].inputs())
    circle = experiment.with_stages(truth=dataclasses.replace(experiment.stages["truth"], generator="nash_md"))
    with pytest.raises(UserError, match="circle"):
        stages.order(circle.stages)


def test_stop_tokens_outside_the_reply_format_are_not_shown_to_the_preference_model(experiment):
    """Training replies end as the format says; a rollout's stop token stays only if it is part of that."""
    tokenizer = huggingface.train_tokenizer(["Human: a\n\nAssistant: b"] * 9, 280, ("Human:",))
    inside = dataclasses.replace(experiment.task, format=Format(" ", "\n\nHuman:", ("Human:", "</s>")))
    stop = stages.stop_tokens(inside, tokenizer)
    assert stages.unseen_stops(inside, tokenizer) == stop[1]
    bare = dataclasses.replace(inside, format=Format("", "", ("Human:", "</s>")))
    hidden = stages.unseen_stops(bare, tokenizer)
    assert [(token,) for token in hidden] == list(stop)
    shown = rollout.without(ragged([[5, hidden[0]], [6, 7]]), hidden)
    assert np.asarray(shown.mask).tolist() == [[True, False], [True, True]]
    untouched = rollout.without(ragged([[5, hidden[0]], [6, 7]]), ())
    assert np.asarray(untouched.mask).all()


def test_unfinished_replies_lose_to_finished_ones_and_tie():
    p, done, not_done = np.full(1, 0.3, np.float32), np.array([True]), np.array([False])
    said = partial(rollout.finished_first, p)
    assert [float(said(*sides)[0]) for sides in ((done, not_done), (not_done, done), (not_done, not_done))] == [
        1,
        0,
        0.5,
    ]
    assert said(done, done)[0] == p[0]


def test_packing_keeps_every_document_whole():
    documents = [[1] * 5, [2] * 4, [3] * 9, [4] * 3, [5] * 11]
    packed = stages.pack(documents, 10)
    rows = [
        [tokens[segments == k].tolist() for k in range(1, segments.max() + 1)]
        for tokens, segments in zip(packed.tokens, packed.mask, strict=True)
    ]
    assert [document for row in rows for document in row] == documents[:4]  # the last is longer than a row


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule, last):
    """Adam's first update is lr * sign(gradient): seen through updates of a constant gradient."""
    optimizer = stages.Adam(lr=1.0, warmup=5, schedule=schedule, eps=1e-12).build(steps=20)
    params, state = jnp.zeros(1), optimizer.init(jnp.zeros(1))
    rates = []
    for _ in range(20):
        update, state = optimizer.update(jnp.ones(1), state, params)
        rates.append(-float(update[0]))
    np.testing.assert_allclose(rates[:6], [0, 0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-3)
    assert abs(rates[-1] - last) < 0.02


@pytest.fixture(scope="module")
def moments():
    """Of either dtype: a noisy least-squares problem's losses under Adam, [steps], and its last moments; and the last
    moments of 500 parameters whose gradients all have mean 1."""

    def run(dtype, noise, slope):
        optimizer = stages.Adam(lr=0.02, warmup=0, clip=1e9, moments=dtype).build(steps=len(noise))

        def step(carry, noise):
            w, state = carry
            update, state = optimizer.update(1 - slope * w + noise, state, w)
            return (w - update, state), jnp.mean((w - 1) ** 2)

        w = jnp.zeros(500)
        (_, state), losses = jax.lax.scan(step, (w, optimizer.init(w)), noise)
        return losses, state[1][0]

    def both(noise):
        return {dtype: (*run(dtype, noise, 1.0), run(dtype, noise, 0.0)[1]) for dtype in ("float32", "bfloat16")}

    return jax.jit(both)(np.random.default_rng(0).normal(size=(300, 500)).astype(np.float32))


def test_moments_in_bfloat16_are_the_mean_s_alone_and_train_as_well(moments):
    (want, high, _), (got, low, _) = moments["float32"], moments["bfloat16"]
    assert [str(x.dtype) for x in (high.mu, high.nu, low.mu, low.nu)] == ["float32"] * 2 + ["bfloat16", "float32"]
    assert want[-1] < 0.05 * want[0]
    np.testing.assert_allclose(got, want, rtol=0.02)
    with pytest.raises(UserError, match=r"b1=0\.99 .* lower it to 0\.95"):
        stages.Adam(1e-3, b1=0.99, moments="bfloat16")


def test_a_mean_in_bfloat16_is_not_short_of_the_gradient(moments):
    """Rounding errs to either side: over 500 parameters the means agree, as they would not were b1 itself rounded."""
    high, low = (np.asarray(moments[dtype][2].mu, np.float32).mean() for dtype in ("float32", "bfloat16"))
    assert abs(high - 1) < 0.05 and abs(low / high - 1) < 0.005


def test_a_tournament_asks_nobody_what_is_too_long():
    table = load_module(FILE).get_config().stages["table"]
    network = SimpleNamespace(tokenizer=SimpleNamespace(encode=list))
    context = SimpleNamespace(policy=lambda name: network, name="table")
    assert table.fitting(context, ["a" * 80, "b" * 81, "c"]) == (["a" * 80, "c"], 1)
    with pytest.raises(UserError, match=r"all 1 prompts are longer than 80 tokens; add a larger one to table\.writing"):
        table.fitting(context, ["b" * 81])


def test_prompts_go_to_the_smallest_bucket_that_holds_them():
    assert bucketed([3, 9, 8, 1, 5], (8, 4)) == {4: [0, 3], 8: [2, 4]}
