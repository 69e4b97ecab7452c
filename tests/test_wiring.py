"""Who writes, who is asked, which split, which sign: stage-level laws in a world small enough to know the answer.

The networks are random tables of a few thousand numbers, the tasks a handful of sentences. Everything else is real:
stages, collectors, adapters, judges, files.
"""

import dataclasses
import types
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alignjax as aj
from alignjax.checkpoints import huggingface
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.fields import Kind
from alignjax.models.build import build
from alignjax.models.heads import apply_head, init_head
from alignjax.models.log_probs import log_prob, policy_functions
from alignjax.models.tokenizer import encode_continuation, pad
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec
from alignjax.pipeline.judges import check_held_out
from alignjax.pipeline.networks import Network, NetworkRecord
from alignjax.pipeline.run import run
from alignjax.pipeline.stages.policy_data import OnlineData
from alignjax.sampling.generate import Generator, ReplyFormat, reply_scorer, reply_writer
from alignjax.sampling.process import Sampling
from alignjax.tasks.task import Format, Task, Template
from alignjax.training import data, presets
from alignjax.training.loop import LearnerSpec, TrainingRun, train
from alignjax.training.metrics import read_metrics
from alignjax.types import Estimates, Extras

WORDS = ["red", "blue", "green", "one", "two", "three", "four", "five", "six", "seven", "yes", "no"]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) + "." for i in range(len(WORDS))]
MODEL = aj.TransformerConfig(vocab_size=300, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=24)
WRITING = aj.Writing(max_new_tokens=6, buckets=(16,), batch=8)
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Prompts that name their split; every request is noted in ``asked``."""

    asked: ClassVar[list] = []

    def prompts(self, split, count, seed):
        self.asked.append(split)
        return [
            f"{split[0]} {WORDS[i % 10]} {WORDS[(i * 7 + 3) % 10]}{' red' * (i % 3)}" for i in range(min(count, 10))
        ]


@dataclasses.dataclass(frozen=True)
class Random:
    """A stage whose network is drawn from a seed."""

    number: int
    scale: float = 3.0
    poison: float = 1.0  # a factor of the embedding
    makes: ClassVar[Kind] = Kind.POLICY
    meanings: ClassVar[dict] = {}

    def check(self, context):
        pass

    def network(self, context):
        return NetworkSpec(NetworkRecord(MODEL, "float32", {}, False, None), tokenizer(), "words")

    def exposure(self, context):
        return Exposure()

    def programs(self, context):
        return ()

    def params(self):
        params = jax.tree.map(lambda x: x * self.scale, build(MODEL).init(jax.random.key(self.number)))
        return {**params, "embed": jax.tree.map(lambda x: x * self.poison, params["embed"])}

    def run(self, context, programs):
        networks.save(context.folder, Network(context.name, build(MODEL), tokenizer(), "words", self.params()))
        return {}


TOKENIZER = []


def tokenizer():
    if not TOKENIZER:
        TOKENIZER.append(huggingface.train_tokenizer(TEXTS, MODEL.vocab_size, ()))
    return TOKENIZER[0]


def keep(raw):
    """Any text is a reply."""
    return raw or " "


def longer(prompt, reply, other):
    """Prefers the longer reply."""
    return 0.5 + 0.5 * float(np.sign(len(reply) - len(other)))


def task(**changes):
    fields = dict(
        name="words", source=Sentences(), format=Format(before=" ", end="", stop=(aj.EOS,)), clean=keep,
        template=Template("", " or", " which:", " yes", " no"), oracles={"longer": longer},
        score=lambda prompt, reply: float(len(reply)),
    )  # fmt: skip
    return Task(**{**fields, **changes})


def experiment(**stages):
    return aj.Experiment(task(), {"base": Random(0), "other": Random(1), **stages}, mesh=aj.Mesh(data=-1))


def policy_stage(**changes):
    fields = dict(
        start="base", reference="base", objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.1)),
        data=OnlineData(samplers=(aj.policy, aj.policy), prompts=10, preference="asked", unfinished_loses=False),
        adam=aj.Adam(1e-2, warmup=0, schedule="constant"), loop=aj.Loop(steps=2, batch=8, log_every=1), buckets=(16,),
        max_new_tokens=6,
    )  # fmt: skip
    return aj.TrainPolicy(**{**fields, **changes})


@dataclasses.dataclass(frozen=True)
class Critic:
    """A value head that learns P(y > y') from the state before each token of response 0."""

    scored: ClassVar = (0,)
    on_policy: ClassVar = (0,)
    compared: ClassVar = ((0, 1),)
    rewarded: ClassVar = False
    meanings: ClassVar = {"critic": "squared error", "moved": "the head now minus the head when collected"}

    @property
    def extras(self):
        return Extras(lambda width: {"value": init_head(width)}, self.prepare)

    def values(self, params, batch, policy):
        return apply_head(params["value"], policy.states(params, batch.prompt, batch.responses[0].completion))

    def prepare(self, roles, batch, policy):
        value = self.values(roles.policy, batch, policy)
        first = dataclasses.replace(batch.responses[0], estimates=Estimates(*[value] * 4, value[:, 0]))
        return dataclasses.replace(batch, responses=(first, *batch.responses[1:]))

    def __call__(self, params, batch, key, /, *, policy):
        values, response = self.values(params, batch, policy), batch.responses[0]
        error = jnp.square(batch.probability(0, 1)[:, None] - values) * response.completion.mask
        moved = jnp.max(jnp.abs(values - response.estimates.value))
        return jnp.mean(error), {"critic": jnp.mean(error), "moved": moved}


def mesh():
    return sharding.make_mesh(aj.Mesh(data=-1))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Labels, two preference models, three policies and a tournament; the splits that each stage asked for."""
    folder, splits = tmp_path_factory.mktemp("wiring"), {}
    label = aj.Label(
        generator="base", method=aj.Judged(aj.Oracle("longer")), split="validation", prompts=10, writing=WRITING
    )
    lora = aj.Lora(2, 8.0, ("q", "v"))
    pairs = folder / "pairs.jsonl"
    rows = [f'{{"prompt": "x {w}", "first": "yes {w}", "second": "no {w}", "p": 1}}' for w in WORDS[:8]]
    rows += [f'{{"prompt": "z {w}", "first": "no {w}", "second": "yes {w}", "p": 0}}' for w in WORDS[:8]]
    pairs.write_text("\n".join(rows))
    fit = aj.FitPreference(
        start="base", pairs="file", truth="file", form=aj.bradley_terry, adam=aj.Adam(3e-2, warmup=0),
        loop=aj.Loop(steps=30, batch=8), buckets=(16,), response=8,
    )  # fmt: skip
    stages = {
        "labels": label,
        "file": aj.LoadPairs(str(pairs), held_out=0.25),
        "fitted": fit,
        "asked": aj.ZeroShotPreference("base"),
        "online": policy_stage(),
        "adapted": policy_stage(lora=lora),
        "offline": policy_stage(
            objective=aj.DirectAlignment(partial(aj.losses.dpo, beta=0.1)), data=aj.OfflineData("file"),
            loop=aj.Loop(steps=12, batch=8, log_every=1), adam=aj.Adam(3e-3, warmup=0, schedule="constant"),
            max_new_tokens=8,
        ),
        "critic": policy_stage(
            objective=Critic(), lora=lora, loop=aj.Loop(steps=2, batch=8, log_every=1, epochs=2, minibatches=2)
        ),
        "adapted_further": policy_stage(start="adapted", lora=lora),
        "ppo": policy_stage(
            objective=aj.PPO(tau=0.1), critic=aj.Critic("fitted", head="reward"), lora=lora,
            data=OnlineData(samplers=(aj.policy,), prompts=10, preference="fitted"),
            loop=aj.Loop(steps=2, batch=8, log_every=1, epochs=2),
        ),
        "tempered": policy_stage(temperature=0.5),
        "group": policy_stage(
            objective=aj.GroupGradient(3, aj.losses.leave_one_out, aj.losses.score_function, aj.losses.mean_of_sums),
            data=OnlineData(samplers=(aj.policy,) * 3, prompts=10, preference="fitted", unfinished_loses=False),
        ),
        "table": aj.Tournament(
            policies={"base": "base", "other": "other", "adapted": "adapted"}, reference="base",
            judges={"longer": aj.Oracle("longer")}, prompts=10, writing=WRITING,
        ),
    }  # fmt: skip
    whole = experiment(**stages)
    with pytest.MonkeyPatch.context() as patch:
        from alignjax.pipeline import run as module

        execute = module.execute

        def recorded(context):
            Sentences.asked.clear()
            result = execute(context)
            splits[context.name] = set(Sentences.asked)
            return result

        patch.setattr(module, "execute", recorded)
        run(whole, folder)
    return whole, folder, splits


def test_every_stage_reads_its_own_split(line):
    splits = line[2]
    assert splits["labels"] == {"validation"} and splits["table"] == {"test"}
    assert splits["online"] == splits["adapted"] == {"train"} and splits["offline"] == set()


def context_of(line, name):
    return Context(line[0], line[1], name, mesh())


def test_a_preference_model_agrees_with_separable_pairs_it_did_not_see(line):
    """ "yes" was preferred in every pair, first or second: the model must prefer it on held-out prompts."""
    figures = storage.read_json(line[1] / "fitted" / "stage.json")["figures"]["held_out"]
    assert figures["accuracy"] == 1.0 and figures["n"] == 4


def test_the_splits_of_a_file_share_no_prompt(line):
    splits = [data.read_pairs(line[1] / "file" / "data", split) for split in ("train", "held_out")]
    prompts = [{row["prompt"] for row in rows} for rows in splits]
    assert not prompts[0] & prompts[1] and [len(rows) for rows in splits] == [12, 4]


def test_dpo_on_stored_pairs_raises_the_preferred_response(line):
    rows = read_metrics(line[1] / "offline" / "metrics.jsonl")
    assert rows[0]["log_ratio_margin"] == 0.0 and rows[-1]["log_ratio_margin"] > 0.5 and rows[-1]["accuracy"] > 0.9


def test_under_adapters_the_reference_is_the_base(line):
    """A policy is its reference before its first step, and no more after it."""
    for name in ("online", "adapted"):
        first, second = read_metrics(line[1] / name / "metrics.jsonl")
        assert first["kl"] == 0 and second["kl"] != 0, name


def test_an_objective_has_a_head_that_is_trained_saved_and_read_back(line):
    """Values are those of collection: within a step's four updates the head moves away from them, then they follow."""
    rows = read_metrics(line[1] / "critic" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["moved"] > 0 for row in rows)
    network = context_of(line, "table").load("critic")
    assert np.any(np.asarray(network.heads["value"]["kernel"])) and network.shared_base.stage == "base"
    assert storage.read_json(line[1] / "critic" / "model.json")["heads"] == {"value": {"kernel": [16]}}
    assert network.params.keys() == network.base.keys()  # the backbone is asked without the head


def test_a_critic_of_its_own_begins_as_the_reward_model_and_is_not_saved(line):
    context, stage = context_of(line, "ppo"), line[0].stages["ppo"]
    start, critic = context.load("base"), context.load("fitted")
    parts = stage.trained_parts(context, start, critic)
    jax.tree.map(np.testing.assert_array_equal, parts.params["critic"], critic.params)
    assert np.any(np.asarray(critic.heads["reward"]["kernel"]))
    np.testing.assert_array_equal(parts.params["value"]["kernel"], critic.heads["reward"]["kernel"])
    trained = dataclasses.replace(start, heads={"value": {"kernel": np.ones(16, np.float32)}})  # its critic was itself
    new = dataclasses.replace(stage, critic=aj.Critic("fitted")).trained_parts(context, trained, critic)
    assert not np.any(np.asarray(new.params["value"]["kernel"]))
    record = storage.read_json(line[1] / "ppo" / "model.json")
    assert record["heads"] == {} and record["shared_base"]["stage"] == "base"
    assert context.load("ppo").adapters.keys() == {"blocks"}


def test_a_critic_of_its_own_reads_its_own_network_and_lies_on_the_mesh_as_that_does(line):
    context, stage = context_of(line, "ppo"), line[0].stages["ppo"]
    start, critic, row = context.load("base"), context.load("fitted"), pad([[5, 6, 7]], 4)
    policy = policy_functions(start.model, critic.model)
    want = critic.model.completion_states(critic.params, row, row)
    np.testing.assert_array_equal(policy.states({**start.params, "critic": critic.params}, row, row), want)
    assert np.abs(np.asarray(start.model.completion_states(start.params, row, row)) - np.asarray(want)).max() > 1e-3
    tree = {"critic": critic.params}
    own = sharding.shardings(critic.params, sharding.matching_rules(critic.model.rules, critic.params), mesh())
    rules = sharding.matching_rules(stage.trained_parts(context, start, critic).rules, tree)
    assert sharding.shardings(tree, rules, mesh(), strict=False)["critic"] == own


def test_ppo_starts_at_its_reference_and_moves_within_a_batch(line):
    """The first epoch begins at the reference, and the last one has moved. The second batch is the moved policy's."""
    first, second = read_metrics(line[1] / "ppo" / "metrics.jsonl")
    assert first["kl"] == 0 and second["kl"] != 0
    assert all(row["approximate_kl"] > 1e-6 and row["value_loss"] > 0 for row in (first, second))


def test_a_policy_is_trained_and_judged_at_its_temperature_and_so_is_its_reference(line):
    rows, context = read_metrics(line[1] / "tempered" / "metrics.jsonl"), context_of(line, "table")
    assert rows[0]["kl"] == 0 and rows[1]["kl"] != 0
    network, row = context.load("tempered"), pad([encode_continuation(tokenizer(), "red blue")], 8)
    logits = build(MODEL).logits(network.params, network.model.completion_states(network.params, row, row))
    logp = np.asarray(jax.nn.log_softmax(logits / 0.5))
    want = np.where(row.mask, np.take_along_axis(logp, row.tokens[..., None], -1)[..., 0], 0.0)
    np.testing.assert_allclose(log_prob(network.model)(network.params, row, row), want, atol=1e-5)
    first = network.model.prefill(network.params, row, 2)
    again = first.step(first.carry, row.tokens[:, 0])[1]
    plain = build(MODEL).prefill(network.params, row, 2)
    np.testing.assert_allclose(first.logits, plain.logits / 0.5, rtol=1e-6)
    np.testing.assert_allclose(again, plain.step(plain.carry, row.tokens[:, 0])[1] / 0.5, rtol=1e-5)


def test_rewards_of_a_group_are_of_its_own_responses(line):
    rows = read_metrics(line[1] / "group" / "metrics.jsonl")
    assert abs(rows[0]["kl"]) < 1e-6 < abs(rows[1]["kl"]) and all(row["spread"] > 0 for row in rows)


def test_a_judge_that_the_critic_began_as_is_not_held_out(line):
    stage = dataclasses.replace(
        line[0].stages["online"], objective=aj.PPO(tau=0.1), critic=aj.Critic("fitted"),
        data=OnlineData(samplers=(aj.policy,), prompts=10, preference="asked"),
    )  # fmt: skip
    whole = dataclasses.replace(line[0], stages={**line[0].stages, "other_ppo": stage})
    context = dataclasses.replace(context_of(line, "table"), experiment=whole)
    with pytest.raises(UserError, match="that 'other_ppo' was trained against"):
        check_held_out(context, "judge", aj.ModelJudge("fitted"), ["other_ppo"])
    check_held_out(context, "judge", aj.ModelJudge("fitted"), ["online"])


def test_a_critic_is_refused_where_it_cannot_work(line):
    context = context_of(line, "ppo")
    with pytest.raises(UserError, match=r"ppo\.critic is set and the objective has no critic"):
        dataclasses.replace(line[0].stages["online"], critic=aj.Critic("fitted")).check(context)
    whole = dataclasses.replace(
        line[0].stages["group"], objective=presets.openai_2019(2, 8).objective, loop=aj.Loop(2, 8, accumulate=2),
        data=OnlineData(samplers=(aj.policy,), prompts=10, preference="fitted"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"accumulate=2 would change the objective"):
        whole.check(context)
    more = dataclasses.replace(whole, data=dataclasses.replace(whole.data, samplers=(aj.policy,) * 2))
    with pytest.raises(UserError, match=r"writes 2 responses and the objective reads 1; name fewer samplers"):
        more.check(context)
    with pytest.raises(UserError, match=r"critic\.head='value' is no head of 'fitted', which has reward"):
        dataclasses.replace(line[0].stages["ppo"], critic=aj.Critic("fitted", "value")).programs(context)
    with pytest.raises(UserError, match=r"ppo\.critic\.head='value' is no head of 'fitted', which has reward"):
        dataclasses.replace(line[0].stages["ppo"], critic=aj.Critic("fitted", "value")).check(context)


def test_adapters_over_adapters_lie_over_the_first_base(line):
    record = storage.read_json(line[1] / "adapted_further" / "model.json")
    assert record["shared_base"]["stage"] == "base"
    first, _ = read_metrics(line[1] / "adapted_further" / "metrics.jsonl")
    assert first["kl"] != 0  # it starts where ``adapted`` ended


def test_the_tokens_without_text_are_known_where_replies_are_compared(line):
    """The tokenizer has every byte: those that are white space alone are ten, and its merges are of words."""
    context = context_of(line, "online")
    stage, start = line[0].stages["online"], context.abstract("base")
    setup = types.SimpleNamespace(start=start, max_new_tokens=6, objective=stage.objective, policy=None)
    spaces = [tokenizer().encode_bare(character) for character in "\t\n\x0b\x0c\r \x1c\x1d\x1e\x1f"]
    assert [len(ids) for ids in spaces] == [1] * 10
    no_text = range(tokenizer().vocab_size, MODEL.vocab_size)
    assert set(stage.data.collector(context, setup).blank) == {*(ids[0] for ids in spaces), *no_text}


def test_what_an_adapter_stage_writes_is_what_it_trained(line):
    """W + (alpha / rank) A B, read back, gives the log-probs of a hand-made sum."""
    network = context_of(line, "table").load("adapted")
    score, row = log_prob(network.model), pad([encode_continuation(tokenizer(), "red blue")], 8)
    kernels = {name: network.base["blocks"][name]["kernel"] for name in ("q", "v")}
    blocks = dict(network.base["blocks"])
    for name in kernels:
        pair = network.adapters["blocks"][name]["lora"]
        low = np.einsum("lir,lro->lio", pair["a"], pair["b"]) * 8.0 / 2
        blocks[name] = {**blocks[name], "kernel": kernels[name] + low}
    by_hand = score({**network.base, "blocks": blocks}, row, row)
    np.testing.assert_allclose(score(network.params, row, row), by_hand, rtol=2e-5)
    assert np.abs(np.asarray(score(network.base, row, row)) - np.asarray(by_hand)).max() > 1e-4


def by_name(table, field):
    return dict(zip(table["policies"], table[field], strict=True))


def test_the_figures_of_a_table_have_their_sign_and_size(line):
    """KL to the reference is the mean of log pi(y) - log mu(y) over the written replies, whose texts are on disk."""
    (table,) = storage.read_json(line[1] / "table" / "win_rates.json")
    kl, context = by_name(table, "kl_to_reference"), context_of(line, "table")
    assert abs(kl["base"]) < 1e-4 and kl["other"] > 1.0
    assert by_name(table, "mean_length")["other"] == 6.0  # random networks do not stop
    base, other = context.load("base"), context.load("other")
    generator = Generator(
        reply_writer(other.model, ((0,),), 6, Sampling(), mesh()), other.params, tokenizer(), ReplyFormat(((0,),), ""),
        (16,), 8, jax.random.key(0), mesh(), (reply_scorer(log_prob(base.model), mesh()), base.params), "other",
    )  # fmt: skip
    drawn = generator([f"x {word}" for word in WORDS[:8]] * 8, range(64), 0)
    assert np.mean([reply.kl for reply in drawn]) > 1.0  # an estimate of a KL that is far from 0


def test_the_longer_replies_win_by_the_longer_oracle(line):
    (table,) = storage.read_json(line[1] / "table" / "win_rates.json")
    replies = {
        name: storage.read_json(line[1] / "table" / f"replies-{name}.json")["text"] for name in table["policies"]
    }
    for i, name in enumerate(table["policies"]):
        for j, other in enumerate(table["policies"]):
            if i != j:
                votes = [longer("", a or " ", b or " ") for a, b in zip(replies[name], replies[other], strict=True)]
                np.testing.assert_allclose(table["win_rate"][i][j], np.mean(votes))


def test_policies_of_a_tournament_draw_with_their_own_keys(tmp_path):
    """One network under two names writes two samples: P(pi > pi) is over independent replies."""
    table = aj.Tournament(
        policies={"a": "base", "b": "base"}, reference="base", judges={"longer": aj.Oracle("longer")}, prompts=10,
        writing=WRITING,
    )  # fmt: skip
    run(experiment(table=table), tmp_path)
    texts = [storage.read_json(tmp_path / "table" / f"replies-{name}.json")["text"] for name in "ab"]
    assert texts[0] != texts[1]


def test_a_reply_depends_on_its_example_number_alone():
    params, model = Random(1).params(), build(MODEL)
    generator = Generator(
        reply_writer(model, ((0,),), 6, Sampling(), mesh()), params, tokenizer(), ReplyFormat(((0,),), ""), (16,), 8,
        jax.random.key(0), mesh(), None, "other",
    )  # fmt: skip
    same = [reply.text for reply in generator(["red"] * 16, range(16), 0)]
    assert len(set(same)) > 8
    assert [reply.text for reply in generator(["red"] * 4, (9, 3, 0, 7), 0)] == [same[i] for i in (9, 3, 0, 7)]
    assert same != [reply.text for reply in generator(["red"] * 16, range(16), 1)]


def test_a_damaged_network_is_named_and_nothing_is_written(tmp_path):
    label = aj.Label(
        generator="broken", method=aj.Judged(aj.Oracle("longer")), split="train", prompts=8, writing=WRITING
    )
    broken = dataclasses.replace(experiment(broken=Random(2, poison=float("nan")), labels=label), seed=1)
    with pytest.raises(UserError, match="labels: the network of 'broken' gives log-probs that are not finite"):
        run(broken, tmp_path)
    assert not (tmp_path / "labels").exists()


def test_prompts_that_are_too_long_are_not_trained_on(line):
    stage = policy_stage(buckets=(4,), data=dataclasses.replace(policy_stage().data, prompts=10))
    whole = line[0].with_stages(short=stage)
    context = Context(whole, line[1], "short", mesh())
    encode = tokenizer().encode
    prompts = whole.task.source.prompts("train", 10, 0)
    fitting = {tuple(encode(prompt)) for prompt in prompts if len(encode(prompt)) <= 4}
    assert 0 < len(fitting) < len(prompts), sorted(len(encode(p)) for p in prompts)
    setup, _ = stage.setup(context)
    setup = setup._replace(loop=aj.Loop(steps=1, batch=len(fitting)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineData, "collect", lambda *_: None)
        batches = stage.data.batches(context, setup, ())
    batch = batches.make_batch(batches.plan(0))
    rows = {tuple(row[mask].tolist()) for row, mask in zip(batch.tokens, batch.mask, strict=True)}
    assert rows == fitting and batches.figures["too_long"] == len(prompts) - len(fitting)


@pytest.mark.parametrize(("changes", "words"), [
    ({"data": OnlineData(samplers=(aj.mixture(0.25), aj.policy), prompts=10, preference="asked")}, "is not the policy"),
    ({"data": OnlineData(samplers=(aj.policy,), prompts=10, preference="asked")}, "writes 1 responses"),
    ({"data": aj.OfflineData("file")}, "responses that the policy has just written"),
    ({"objective": aj.RewardGradient(partial(aj.losses.regularized_policy_gradient, tau=0.1), bound=1.0)}, None),
    ({"objective": aj.PreferenceGradient(partial(aj.losses.nash_md, tau=-1.0))}, "must be finite and not negative"),
])  # fmt: skip
def test_data_that_an_objective_cannot_learn_from_is_refused_before_anything_runs(line, changes, words):
    context = Context(line[0].with_stages(wrong=policy_stage(**changes)), line[1], "wrong", mesh())
    with pytest.raises(UserError, match=words or "reads rewards and 'asked' is no reward model"):
        context.experiment.stages["wrong"].check(context)
        context.experiment.stages["wrong"].programs(context)  # the form of a preference model is known here


def test_direct_alignment_learns_from_two_of_more_responses(line):
    direct = aj.DirectAlignment(partial(aj.losses.online_ipo, tau=0.1))
    data_of_three = OnlineData(samplers=(aj.policy,) * 3, prompts=10, preference="asked", unfinished_loses=False)
    context = Context(
        line[0].with_stages(three=policy_stage(objective=direct, data=data_of_three)), line[1], "three", mesh()
    )
    context.experiment.stages["three"].check(context)
    with jax.set_mesh(mesh()):
        programs = context.experiment.stages["three"].programs(context)
        learned, _ = jax.eval_shape(programs[-1].function, *programs[-1].arguments)
    assert learned.step.shape == ()


def test_a_resumed_loop_sees_the_batches_that_were_left(tmp_path):
    """Stopped in step 3 after the save of step 2, it goes on with batch 2, and every batch is learned from once."""
    learned, place = [], mesh()

    def loss(params, batch, key):
        return jnp.sum(params["w"]) * jnp.mean(batch), {"batch": jnp.mean(batch)}

    def collect(state, frozen, batch):
        learned.append(int(batch[0]))
        if learned.count(2) == 1 and learned[-1] == 2:
            raise UserError("stopped")  # a save under way is completed
        return batch

    plan = data.plan_batches([1] * 48, [1], 8, seed=0)
    learning = LearnerSpec(
        aj.Loop(steps=6, batch=8, save_every=2), aj.Adam(1e-2), loss, ((r".*", jax.sharding.PartitionSpec()),)
    )
    learner = learning.compile({"w": jax.ShapeDtypeStruct((2,), "float32")}, place)
    context = TrainingRun(
        "loop", tmp_path, place, Context(experiment(), tmp_path, "base", place).hosts, jax.random.key(0)
    )

    def go():
        with jax.set_mesh(place):
            return train(
                context,
                learner,
                lambda: ({"w": jnp.ones(2)}, ()),
                plan,
                lambda p: np.full(8, p.step, np.float32),
                collect,
            )

    with pytest.raises(UserError, match="stopped"):
        go()
    go()
    assert learned == [0, 1, 2, 2, 3, 4, 5]
    assert [row["batch"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
