"""Training a policy: arms share their random numbers, and pairs on disk are learnt from as they are labelled."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alignjax as aj
from alignjax.distributed import sharding
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import encode_continuation, pad
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.run import run
from alignjax.tasks import sandbox
from alignjax.tasks.task import Format, Task
from alignjax.training.metrics import read_metrics

MODEL = aj.TransformerConfig(vocab_size=320, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=24)
WORDS = ("red", "green", "blue", "grey")


@dataclasses.dataclass(frozen=True)
class Colours:
    """Prompts of a few words; every split has the same ones."""

    def prompts(self, split, count, seed):
        order = np.random.default_rng(seed).permutation(24)[:count]
        return [f"{i} {WORDS[i % 4]}:" for i in order]


def documents(source, count, seed):
    return [f"{i} {WORDS[i % 4]}: {'good' if i % 2 else 'bad'}." for i in range(count)]


def nash_md(samplers, **changes):
    """Returns Nash-MD with these samplers."""
    stage = aj.TrainPolicy(
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.1)),
        data=aj.OnlineData(preference="asked", samplers=samplers, prompts=16, unfinished_loses=False),
        adam=aj.Adam(1e-2, warmup=0), loop=aj.Loop(steps=3, batch=8), buckets=(16,), max_new_tokens=4, start="base",
        reference="base", average_decay=0.9,
    )  # fmt: skip
    return dataclasses.replace(stage, **changes)


ARMS = {
    "self_play": nash_md((aj.policy, aj.policy)),
    "mixture_0": nash_md((aj.policy, aj.mixture(0.0))),
    "best_response": nash_md((aj.policy, aj.reference)),
    "mixture_1": nash_md((aj.policy, aj.mixture(1.0))),
    "average": nash_md((aj.policy, aj.moving_average)),
    "seeded": nash_md((aj.policy, aj.policy), seed=1),
}


@pytest.fixture(scope="module")
def task():
    template = sandbox.sandbox_task().template._replace(answer="g", other="b")
    return Task("colours", Colours(), Format(" ", ".", (".",)), template=template, corpus_of_source=documents)


@pytest.fixture(scope="module")
def base():
    return aj.Pretrain(model=MODEL, documents=200, row=32, adam=aj.Adam(1e-2), loop=aj.Loop(steps=20, batch=8))


@pytest.fixture(scope="module")
def arms(task, base, tmp_path_factory):
    """Returns (experiment, folder) of a finished run of the arms."""
    folder = tmp_path_factory.mktemp("arms")
    experiment = aj.Experiment(task, {"base": base, "asked": aj.ZeroShotPreference("base"), **ARMS})
    run(experiment, folder)
    return experiment, folder


def parameters(arms, name):
    """Returns a finished stage's parameters on the host."""
    experiment, folder = arms
    context = Context(experiment, folder, name, sharding.make_mesh(experiment.mesh))
    return jax.tree.map(np.asarray, context.load(name).params)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize(("arm", "twin"), [("self_play", "mixture_0"), ("best_response", "mixture_1")])
def test_a_mixture_of_one_network_alone_ends_with_the_same_bits(arms, arm, twin):
    assert same(parameters(arms, arm), parameters(arms, twin))
    rows = [(arms[1] / name / "metrics.jsonl").read_text() for name in (arm, twin)]
    assert rows[0] == rows[1]


def test_arms_share_prompts_and_keys_and_the_seed_changes_them(arms):
    """The policy's own first responses are the same whoever the opponent is: nothing is learnt before them."""
    experiment, folder = arms
    contexts = {
        name: Context(experiment, folder, name, sharding.make_mesh(experiment.mesh)) for name in experiment.stages
    }
    assert len({contexts[name].seed() for name in ARMS}) == 1
    assert contexts["base"].seed() != contexts["self_play"].seed() != contexts["self_play"].seed(1)
    other = dataclasses.replace(experiment, seed=1)
    assert Context(other, folder, "average", contexts["base"].mesh).seed() != contexts["average"].seed()
    first = {name: read_metrics(folder / name / "metrics.jsonl")[0] for name in ARMS}
    shared = {name: (row["length"], row["kl"]) for name, row in first.items() if name != "seeded"}
    assert len(set(shared.values())) == 1
    trained = {name: parameters(arms, name) for name in ARMS}
    assert not same(trained["self_play"], trained["best_response"])
    assert not same(trained["self_play"], trained["average"])
    assert not same(trained["self_play"], trained["seeded"])


def test_the_moving_average_is_the_policy_itself_before_the_first_step(arms):
    first = {name: read_metrics(arms[1] / name / "metrics.jsonl")[0] for name in ("self_play", "average")}
    assert first["average"]["preference"] == pytest.approx(first["self_play"]["preference"], abs=1e-6)


@pytest.fixture(scope="module")
def offline(task, base, tmp_path_factory):
    """Returns a finished run of DPO on separable pairs: " good" is preferred, stored first or second by a coin.

    The held-out split of the same file says the opposite.
    """
    folder = tmp_path_factory.mktemp("offline")
    rng, rows = np.random.default_rng(0), []
    for i, prompt in enumerate(Colours().prompts("train", 24, 0)):
        first, second = rng.permutation(["good", "bad"]).tolist()
        right = first == "good"
        rows.append({"prompt": prompt, "first": first, "second": second, "p": float(right if i < 12 else not right)})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dpo = nash_md(
        (), objective=aj.DirectAlignment(partial(aj.losses.dpo, beta=0.5)), data=aj.OfflineData("pairs"),
        loop=aj.Loop(steps=20, batch=8),
    )  # fmt: skip
    pairs = aj.LoadPairs(str(folder / "pairs.jsonl"), held_out=0.5)
    experiment = aj.Experiment(task, {"base": base, "pairs": pairs, "dpo": dpo})
    run(experiment, folder / "run")
    return experiment, folder / "run"


def test_dpo_moves_the_log_ratio_margin_of_the_train_split_up(offline):
    rows = read_metrics(offline[1] / "dpo" / "metrics.jsonl")
    assert rows[0]["log_ratio_margin"] == 0 and rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[0]["accuracy"] == 0.5 and rows[-1]["accuracy"] == 1
    assert rows[-1]["log_ratio_margin"] > 1 and rows[-1]["loss"] < 0.5


def test_what_dpo_logs_is_the_log_ratio_of_the_preferred_text(offline):
    """Measured anew from the finished networks, by text: neither side is exchanged, no split is mistaken."""
    experiment, folder = offline
    context = Context(experiment, folder, "dpo", sharding.make_mesh(experiment.mesh))
    policy, reference = context.load("dpo"), context.load("base")
    encode = policy.tokenizer.encode
    prompts = Colours().prompts("train", 24, 0)[:12]
    score = log_prob(policy.model)

    def log_ratio(text):
        prompt = pad([encode(x) for x in prompts], 16)
        completion = pad([encode_continuation(policy.tokenizer, f" {text}.") for _ in prompts], 4)
        logps = [score(network.params, prompt, completion).sum(-1) for network in (policy, reference)]
        return logps[0] - logps[1]

    assert float(jnp.mean(log_ratio("good") - log_ratio("bad"))) > 1


def test_offline_data_draws_nothing_and_asks_no_preference_model(offline):
    experiment, folder = offline
    context = Context(experiment, folder, "dpo", sharding.make_mesh(experiment.mesh))
    programs = experiment.stages["dpo"].programs(context)
    assert [program.name for program in programs] == ["collect 16", "learn 16"]
    assert programs[0].arguments[1].tree().preference is None
    assert "prompts" not in json.loads((folder / "dpo" / "stage.json").read_text())["figures"]
