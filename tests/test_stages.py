"""What stages refuse before they run, and what a preference model reads in training and of drawn responses."""

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
from alignjax.fields import Kind
from alignjax.pipeline.config import load, load_module
from alignjax.pipeline.experiment import Context, order
from alignjax.pipeline.stages import fit_preference as fit
from alignjax.pipeline.stages import pair_batches
from alignjax.pipeline.stages.pretrain import pack_documents
from alignjax.pipeline.stages.writing import fitting_prompts, stop_tokens, unseen_stops
from alignjax.sampling.generate import assign_buckets
from alignjax.tasks.task import Format
from alignjax.training import collect
from alignjax.training.optimizer import Adam
from tests.conftest import ragged
from tests.test_inputs import Own

FILE = Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def experiment():
    return load(FILE, {"small": "True"})


def context_of(experiment, name, workdir="w"):
    return Context(experiment, Path(workdir), name, sharding.make_mesh(experiment.mesh))


def test_held_out_pairs_of_the_same_stage_can_be_the_truth(experiment, monkeypatch):
    read = []
    monkeypatch.setattr(pair_batches.data, "read_pairs", lambda folder, split: read.append((folder, split)) or [])
    monkeypatch.setattr(fit, "encode_pairs", lambda rows, *_: ([], rows, {}))
    context = context_of(experiment, "preference")
    for truth in ("pairs", "truth"):
        stage = dataclasses.replace(experiment.stages["preference"], truth=truth)
        stage.measured_pairs(context, None)
    assert read == [(Path("w/pairs/data"), "held_out"), (Path("w/truth/data"), "train")]
    stage = dataclasses.replace(stage, truth="pairs")
    with pytest.raises(
        UserError, match=r"truth and pairs are both 'pairs', which holds nothing out; set pairs\.held_out"
    ):
        stage.check(context)
    pairs = dataclasses.replace(experiment.stages["pairs"], held_out=0.25)
    stage.check(context_of(experiment.with_stages(pairs=pairs, preference=stage), "preference"))


def test_a_preference_model_is_not_measured_on_the_pairs_that_it_is_fitted_to(experiment):
    """Another name, or another number, of the same pairs is refused."""
    for same in (experiment.stages["pairs"], dataclasses.replace(experiment.stages["pairs"], prompts=5)):
        stage = dataclasses.replace(experiment.stages["preference"], truth="same")
        with pytest.raises(UserError, match="truth='same' holds the pairs that the model is fitted to"):
            stage.check(context_of(experiment.with_stages(same=same, preference=stage), "preference"))


def test_pairs_too_long_to_train_on_are_not_measured_either(experiment, monkeypatch):
    def row(prompt, first, second):
        return {"prompt": "w " * prompt, "first": "w " * first, "second": "w " * second, "p": 1.0}

    rows, asked = [row(3, 1, 1), row(9, 1, 1), row(3, 1, 9), row(2, 1, 2)], []
    tokenizer = SimpleNamespace(encode=str.split)
    monkeypatch.setattr(pair_batches.data, "read_pairs", lambda folder, split: rows)
    monkeypatch.setattr(pair_batches, "encode_continuation", lambda tokenizer, text: text.split())
    judge = lambda *texts: asked.append(texts) or np.full(len(texts[0]), 0.9)  # noqa: E731
    monkeypatch.setattr(fit.judges, "model_judge", lambda *_, **__: judge)
    stage = dataclasses.replace(experiment.stages["preference"], truth="truth", buckets=(2, 4), response=4)
    context = context_of(experiment, "preference")
    context.abstracts["base"] = SimpleNamespace(tokenizer=tokenizer)
    parts, trained = SimpleNamespace(assemble=lambda *_: {}), SimpleNamespace(params={}, frozen=None)
    figures = stage.measure(context, SimpleNamespace(function=None), parts, trained)
    assert asked[0][0] == [rows[0]["prompt"], rows[3]["prompt"]] and figures["n"] == 2 and figures["too_long"] == 2
    rows = rows[1:3]
    with pytest.raises(UserError, match="none of 2 pairs fits prompts of 4 and responses of 4 tokens; raise buckets"):
        stage.measured_pairs(context, tokenizer)


def test_a_stage_that_does_not_say_what_it_makes_is_trusted_until_its_network_is_needed(experiment):
    table = dataclasses.replace(experiment.stages["table"], reference="own", policies={"own": "own"})
    fit = dataclasses.replace(experiment.stages["preference"], start="own")
    extended = experiment.with_stages(own=Own(Kind.POLICY), table=table, preference=fit)
    for name in order(extended.stages):
        extended.stages[name].check(context_of(extended, name))
    with pytest.raises(
        UserError, match="stage 'own' does not say what network it makes, and has not run; run it first"
    ):
        table.programs(Context(extended, None, "table", sharding.make_mesh(extended.mesh)))


def test_stop_tokens_outside_the_reply_format_are_not_shown_to_the_preference_model(experiment):
    """Replies that it is fitted to end as the format says; a drawn stop token stays only if it is part of that."""
    tokenizer = huggingface.train_tokenizer(["Human: a\n\nAssistant: b"] * 9, 280, ("Human:",))
    inside = dataclasses.replace(experiment.task, format=Format(" ", "\n\nHuman:", ("Human:", "</s>")))
    stop = stop_tokens(inside, tokenizer)
    assert unseen_stops(inside, tokenizer) == stop[1]
    bare = dataclasses.replace(inside, format=Format("", "", ("Human:", "</s>")))
    hidden = unseen_stops(bare, tokenizer)
    assert [(token,) for token in hidden] == list(stop)
    shown = collect.hide_tokens(ragged([[5, hidden[0]], [6, 7]]), hidden)
    assert np.asarray(shown.mask).tolist() == [[True, False], [True, True]]
    untouched = collect.hide_tokens(ragged([[5, hidden[0]], [6, 7]]), ())
    assert np.asarray(untouched.mask).all()


def test_unfinished_replies_lose_to_finished_ones_and_tie():
    p, done, not_done = np.full(1, 0.3, np.float32), np.array([True]), np.array([False])
    override_invalid = partial(collect.override_invalid, p)
    sides = ((done, not_done), (not_done, done), (not_done, not_done))
    assert [float(override_invalid(*side)[0]) for side in sides] == [1, 0, 0.5]
    assert override_invalid(done, done)[0] == p[0]


def test_packing_keeps_every_document_whole():
    documents = [[1] * 5, [2] * 4, [3] * 9, [4] * 3, [5] * 11]
    packed = pack_documents(documents, 10)
    rows = [
        [tokens[segments == k].tolist() for k in range(1, segments.max() + 1)]
        for tokens, segments in zip(packed.tokens, packed.segments, strict=True)
    ]
    assert [document for row in rows for document in row] == documents[:4]  # the last is longer than a row


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule, last):
    """Adam's first update is lr * sign(gradient): seen through updates of a constant gradient."""
    optimizer = Adam(lr=1.0, warmup=5, schedule=schedule, eps=1e-12).build(steps=20)
    params, state = jnp.zeros(1), optimizer.init(jnp.zeros(1))
    rates = []
    for _ in range(20):
        update, state = optimizer.update(jnp.ones(1), state, params)
        rates.append(-float(update[0]))
    np.testing.assert_allclose(rates[:6], [0, 0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-3)
    assert abs(rates[-1] - last) < 0.02


@pytest.fixture(scope="module")
def moments():
    """Returns, of either dtype, a noisy least-squares problem's losses under Adam, [steps], its last moments, and the
    last moments of 500 parameters whose gradients all have mean 1."""

    def run(dtype, noise, slope):
        optimizer = Adam(lr=0.02, warmup=0, clip=1e9, moments=dtype).build(steps=len(noise))

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
        Adam(1e-3, b1=0.99, moments="bfloat16")


def test_a_mean_in_bfloat16_is_not_short_of_the_gradient(moments):
    """Rounding errs to both sides, so over 500 parameters the means agree. With b1 itself rounded they would not."""
    high, low = (np.asarray(moments[dtype][2].mu, np.float32).mean() for dtype in ("float32", "bfloat16"))
    assert abs(high - 1) < 0.05 and abs(low / high - 1) < 0.005


def test_a_tournament_asks_nobody_what_is_too_long():
    whole = load_module(FILE).get_config()
    table, network = whole.stages["table"], SimpleNamespace(tokenizer=SimpleNamespace(encode=list))
    context = SimpleNamespace(abstract=lambda name: network, name="table", task=whole.task)
    assert fitting_prompts(context, "base", table.writing, ["a" * 80, "b" * 81, "c"]) == (
        ["a" * 80, "c"], {"prompts": 2, "too_long": 1},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"all 1 prompts are longer than 80 tokens; add a larger one to table\.writing"):
        fitting_prompts(context, "base", table.writing, ["b" * 81])


def test_prompts_go_to_the_smallest_bucket_that_holds_them():
    assert assign_buckets([3, 9, 8, 1, 5], (8, 4)) == {4: [0, 3], 8: [2, 4]}
