"""What a training keeps beside its result: its moving average and its policy after some steps, as policies."""

import dataclasses

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.run import run
from alignjax.pipeline.stages.policy_data import OnlineData
from tests.test_wiring import WORDS, Critic, experiment, mesh, policy_stage, tokenizer

DECAY, LORA = 0.7, aj.Lora(2, 8.0, ("q", "v"))
TRAINED = policy_stage(average_decay=DECAY, keep_at=(1, 2, 3), loop=aj.Loop(steps=3, batch=8, save_every=1))
PPO = policy_stage(
    objective=aj.PPO(tau=0.1), critic=aj.Critic("fitted", head="reward"), average_decay=DECAY, keep_at=(1,),
    loop=aj.Loop(steps=1, batch=8),
    data=OnlineData(samplers=(aj.policy,), prompts=10, preference="fitted", unfinished_loses=False),
)  # fmt: skip


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Trainings that keep parameters, a shorter one, and policies of what was kept."""
    folder = tmp_path_factory.mktemp("kept")
    tokenizer()  # a part of the fingerprint of Random
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(f'{{"prompt": "x {w}", "first": "yes", "second": "no", "p": 1}}' for w in WORDS[:8]))
    stages = {
        "asked": aj.ZeroShotPreference("base"),
        "pairs": aj.LoadPairs(str(pairs)),
        "fitted": aj.FitPreference(
            start="base",
            pairs="pairs",
            form=aj.bradley_terry,
            adam=aj.Adam(1e-2, warmup=0),
            loop=aj.Loop(1, 8),
            buckets=(16,),
            response=8,
        ),
        "md": TRAINED,
        "short": dataclasses.replace(TRAINED, keep_at=(), average_decay=None, loop=aj.Loop(steps=2, batch=8)),
        "low": dataclasses.replace(TRAINED, lora=LORA, keep_at=(1, 2), loop=aj.Loop(steps=2, batch=8)),
        "ppo": PPO,
        "headed": dataclasses.replace(
            TRAINED, objective=Critic(), lora=LORA, keep_at=(1,), loop=aj.Loop(steps=1, batch=8)
        ),
        **{f"md_{at}": aj.KeptPolicy(at, policy="md") for at in (1, 2, 3, "average")},
        **{f"low_{at}": aj.KeptPolicy(at, policy="low") for at in (1, 2, "average")},
        "ppo_average": aj.KeptPolicy("average", policy="ppo"),
        "headed_1": aj.KeptPolicy(1, policy="headed"),
    }
    whole = experiment(**stages)
    run(whole, folder)
    return whole, folder


def context_of(line, name="md"):
    return Context(line[0], line[1], name, mesh())


def loaded(line, name, part="base"):
    """Returns the parameters of a stage's network as NumPy arrays; ``part`` is "base", "adapters" or "heads"."""
    return jax.tree.map(np.asarray, getattr(context_of(line).load(name), part))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def average_by_hand(start, *trained):
    """d^n start + (1 - d) sum_k d^(n-k) trained_k, in float64."""
    n = len(trained)
    weights = [DECAY**n, *((1 - DECAY) * DECAY ** (n - k) for k in range(1, n + 1))]
    assert sum(weights) == pytest.approx(1)
    return jax.tree.map(lambda *leaves: sum(w * x.astype(float) for w, x in zip(weights, leaves, strict=True)),
                        start, *trained)  # fmt: skip


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def moved(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_the_average_is_that_of_the_kept_parameters(line):
    steps = [loaded(line, f"md_{k}") for k in (1, 2, 3)]
    average = loaded(line, "md_average")
    close(average, average_by_hand(loaded(line, "base"), *steps))
    assert moved(average, steps[-1]) > 1e-4  # it is no copy of the last


def test_the_average_of_adapters_is_that_of_each_matrix_from_its_first_value(line):
    parts = line[0].stages["low"].trained_parts(context_of(line, "low"), context_of(line).load("base"), None)
    start = jax.tree.map(np.asarray, parts.params)
    steps = [loaded(line, f"low_{k}", "adapters") for k in (1, 2)]
    average = loaded(line, "low_average", "adapters")
    close(average, average_by_hand(start, *steps))
    assert moved(average, steps[-1]) > 1e-4
    same(loaded(line, "low_average"), loaded(line, "base"))  # what it lies over
    same(steps[-1], loaded(line, "low", "adapters"))


def test_a_policy_kept_at_a_step_is_that_of_a_training_of_so_many_steps(line):
    same(loaded(line, "md_2"), loaded(line, "short"))
    same(loaded(line, "md_3"), loaded(line, "md"))
    assert moved(loaded(line, "md_1"), loaded(line, "md_2")) > 1e-4


@pytest.mark.parametrize(("name", "at"), [("ppo", "average"), ("ppo", "1"), ("headed", "1"), ("headed", "average")])
def test_no_critic_and_no_optimiser_is_kept(line, name, at):
    """Neither one of its own nor a head on the policy."""
    kept = ocp.metadata(line[1] / name / "kept" / at).metadata
    network = context_of(line).load(name)
    assert kept.keys() == networks.owned_params(network).keys()
    assert jax.tree.map(lambda x: tuple(x.shape), kept) == jax.tree.map(
        lambda x: x.shape, dict(networks.owned_params(network))
    )


def test_a_kept_policy_is_the_trained_one_s_network_without_heads(line):
    context = context_of(line)
    assert loaded(line, "headed", "heads").keys() == {"value"} and loaded(line, "headed_1", "heads") == {}
    for kept, policy in (("md_average", "md"), ("low_2", "low"), ("headed_1", "headed")):
        want, got = context.spec(policy), context.spec(kept)
        assert got.record == dataclasses.replace(want.record, heads={}) and got.token_digest == want.token_digest
        found = storage.read_json(line[1] / kept / "model.json")
        trained = storage.read_json(line[1] / policy / "model.json")
        assert found == {**trained, "heads": {}}
        assert context.exposure(kept) == context.exposure(policy) != aj.Exposure()


def test_a_killed_training_keeps_the_same_bits(line, tmp_path, monkeypatch):
    """It is killed as it begins to keep step 2. A save of step 2 before that would leave nothing to keep."""
    whole = line[0].with_stages(md_2=aj.KeptPolicy(2, policy="md"))
    save, kills = networks.save_kept, []

    def killed(folder, at, network):
        if at == 2 and not kills:
            kills.append(at)
            raise UserError("killed")
        save(folder, at, network)

    monkeypatch.setattr(networks, "save_kept", killed)
    only = ["base", "other", "asked", "md", "md_1", "md_2", "md_average"]
    with pytest.raises(UserError, match="killed"):
        run(whole, tmp_path, only=only)
    assert {path.name for path in (tmp_path / "md" / "kept").iterdir()} == {"1"}
    run(whole, tmp_path, only=only)
    assert kills == [2]
    for name in ("md_1", "md_2", "md_average"):
        same(loaded((whole, tmp_path), name), loaded(line, name))


def test_best_keeps_the_average_of_the_step_that_it_chooses(tmp_path):
    """The first save is the best of a metric that only grows."""
    best = dataclasses.replace(TRAINED, loop=aj.Loop(3, 8, best=aj.Best("gradient_norm", 1)))
    whole = experiment(asked=aj.ZeroShotPreference("base"), md=best, average=aj.KeptPolicy("average", policy="md"))
    run(whole, tmp_path)
    chosen = storage.read_json(tmp_path / "md" / "stage.json")["figures"]["best_step"]
    place = context_of((whole, tmp_path))
    kept = [networks.load_kept(tmp_path / "md", k, place.abstract("md")).base for k in range(1, chosen + 1)]
    kept = [jax.tree.map(np.asarray, params) for params in kept]
    same(loaded((whole, tmp_path), "md"), kept[-1])
    close(loaded((whole, tmp_path), "average"), average_by_hand(loaded((whole, tmp_path), "base"), *kept))


@pytest.mark.parametrize(("kept", "words"), [
    (aj.KeptPolicy(4, policy="md"), r"kept\.at=4 is nothing that 'md' keeps; it keeps 1, 2, 3, 'average'; name one"),
    (aj.KeptPolicy(1, policy="short"), r"it keeps nothing; name one of those, or set short\.keep_at"),
    (aj.KeptPolicy("average", policy="short"), r"'short' keeps no moving average; set short\.average_decay, e\.g\. 0"),
    (aj.KeptPolicy(1, policy="base"), r"kept\.policy='base' is a Random, which keeps no other parameters"),
])  # fmt: skip
def test_what_is_not_kept_is_refused_before_anything_runs(line, kept, words):
    whole = line[0].with_stages(kept=kept)
    with pytest.raises(UserError, match=words):
        run(whole, line[1], only=["kept"])
    assert not (line[1] / "kept").exists()


def test_steps_that_cannot_be_are_refused(line):
    with pytest.raises(UserError, match=r"TrainPolicy\.keep_at=\(2, 2\) names a step twice"):
        dataclasses.replace(TRAINED, keep_at=(2, 2))
    with pytest.raises(UserError, match=r"TrainPolicy\.keep_at=\(2, 4\) must be in \[1, 3\]"):
        dataclasses.replace(TRAINED, keep_at=(2, 4))
    with pytest.raises(UserError, match=r"KeptPolicy\.at='mean' is neither a step nor 'average'"):
        aj.KeptPolicy("mean", policy="md")
    more = line[0].with_stages(short=dataclasses.replace(line[0].stages["short"], keep_at=(1,)))
    with pytest.raises(UserError, match=r"'short' in .* was made with keep_at"):
        run(more, line[1], only=["short"])


def test_a_table_compares_an_average_with_its_policy(line):
    table = aj.Tournament(
        policies={"md": "md", "md average": "md_average", "md 1": "md_1"}, reference="base", prompts=4,
        judges={"longer": aj.Oracle("longer")}, writing=aj.Writing(max_new_tokens=4, buckets=(16,), batch=8),
    )  # fmt: skip
    run(line[0].with_stages(table=table), line[1], only=["table"])
    (found,) = storage.read_json(line[1] / "table" / "win_rates.json")
    assert found["policies"] == ["md", "md average", "md 1"] and len(set(found["kl_to_reference"])) == 3
