"""Experiments of the papers' sizes, too large to run here: they load, their stages fit together, sizes are right."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from alignjax import losses
from alignjax.checkpoints import huggingface
from alignjax.distributed.sharding import Mesh, make_mesh
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.objectives import PPO
from alignjax.pipeline import config, run
from alignjax.pipeline.description import describe
from alignjax.pipeline.experiment import Context, order
from alignjax.pipeline.judges import check_held_out
from alignjax.pipeline.stages import KeptPolicy, Label
from alignjax.preferences.preference_models import bradley_terry
from alignjax.sampling.samplers import mixture, moving_average, policy, reference
from alignjax.tasks import summary
from alignjax.training import presets
from alignjax.types import Role

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RLCD, TLDR, LLAMA = (EXPERIMENTS / f"{n}.py" for n in ("rlcd/harmless_7b", "nlhf/tldr_t5_xl", "nlhf/llama_70b"))
DECODER = EXPERIMENTS / "nlhf/tldr_decoder.py"
OUTLINE = EXPERIMENTS / "rlcd/outline_7b.py"
ARMS = ["rlhf", "sp", "md1", "md2", "md3", "md4", "md5", "md6", "br", "ema1", "ema2"]
EACH = [
    (RLCD, {}, ["base", "pairs", "rlaif_pairs", "rescore_pairs", "human", "human_test", "reward", "rlaif_reward"]),
    (RLCD, {"labeller": "30b", "attribute": "helpful"}, ["base", "labeller", "pairs"]),
    (OUTLINE, {}, ["base", "pairs", "rlaif_pairs", "rescore_pairs", "reward", "rlaif_reward", "rescore_reward"]),
    (TLDR, {}, ["base", "replies", "sft", "reader", "rater", "pairs", "truth", "preference", "reward", *ARMS]),
    (TLDR, {"sft": "tuned"}, ["sft", "reader", "rater", "pairs", "truth", "preference", "reward", *ARMS]),
    (DECODER, {}, ["base", "replies", "rater", "pairs", "truth", "sft", "preference", "reward", "rlhf", "gradient"]),
    (LLAMA, {}, ["base", "small", "pairs", "preference", "judge", "nash_md", "self_play"]),
    (LLAMA, {"family": "llama2", "adapters": "False", "preference": "8b"}, ["base", "small", "pairs", "preference"]),
]  # fmt: skip
each = pytest.mark.parametrize(("file", "settings", "first"), EACH, ids=lambda x: getattr(x, "stem", None))


@each
def test_it_loads_without_a_checkpoint_or_data_and_its_stages_stand_in_order(file, settings, first):
    experiment = config.load(file, settings)
    names = order(experiment.stages)
    assert names == list(experiment.stages) and names[: len(first)] == first and names[-1] == "table"
    context, table = Context(experiment, None, "table", make_mesh(Mesh())), experiment.stages["table"]
    for name, judge in table.judges.items():
        check_held_out(context, name, judge, table.policies.values())
    assert json.dumps(describe(experiment))


@each
def test_every_leaf_can_be_set(file, settings, first):
    experiment = config.load(file, settings)
    leaves = {path: value for path, value in config.leaves(experiment) if not path.endswith(".lora")}
    texts = {Role: lambda role: role.name, str: str}
    same = {path: texts.get(type(value), repr)(value) for path, value in leaves.items()}
    assert describe(config.override(experiment, same)) == describe(experiment)
    assert {
        "mesh.tensor",
        "stages.pairs.path" if file not in (RLCD, OUTLINE) else "stages.pairs.prompts",
    } <= leaves.keys()


@pytest.mark.parametrize(("file", "name", "count"), [
    (RLCD, "LLAMA_7B", 6.74e9), (RLCD, "LLAMA_30B", 32.5e9), (LLAMA, "LLAMA_2_70B", 69e9),
    (LLAMA, "LLAMA_3_70B", 70.6e9), (LLAMA, "LLAMA_3_8B", 8.03e9),
    (DECODER, "PYTHIA_1B", 1.0118e9), (DECODER, "PYTHIA_3B", 2.7752e9),
    (TLDR, "T5_LARGE", 783e6), (TLDR, "T5_XL", 2.85e9), (TLDR, "T5_XXL", 11.1e9),
])  # fmt: skip
def test_a_model_has_the_published_size(file, name, count):
    shapes = jax.eval_shape(build(getattr(config.load_module(file), name)).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize(("file", "settings", "buckets"), [
    (RLCD, {}, {"reward": 3, "rlcd": 3, "nash_md": 3, "policy_gradient": 3}), (TLDR, {}, {"preference": 3, "rlhf": 3}),
    (TLDR, {"sft": "tuned"}, {"md1": 3}), (TLDR, {}, {"sft": 1}), (DECODER, {}, {"sft": 1, "md1": 3}),
    (LLAMA, {"mesh.tensor": "2"}, {"nash_md": 2}),
])  # fmt: skip
def test_what_it_compiles_is_known_from_shapes_and_divides_over_a_mesh(file, settings, buckets):
    experiment = config.load(file, settings)
    mesh = make_mesh(experiment.mesh)
    for name, count in buckets.items():
        stage = experiment.stages[name]
        programs = stage.programs(Context(experiment, None, name, mesh))
        assert sum(program.name.split()[0] == "learn" for program in programs) == count
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        assert stage.loop.batch % (rows * stage.loop.accumulate) == 0


def test_the_arms_are_the_papers_grid_and_differ_in_nothing_else():
    stages = config.load(TLDR, {}).stages
    md = [stages[f"md{i}"] for i in range(1, 7)]
    betas = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75]
    assert [arm.data.samplers for arm in md] == [(policy, mixture(beta)) for beta in betas]
    arms = {"sp": policy, "br": reference, "ema1": moving_average, "ema2": moving_average}
    assert {name: stages[name].data.samplers for name in arms} == {n: (policy, arms[n]) for n in arms}
    others = [*md, stages["sp"], stages["br"]]
    assert all(dataclasses.replace(arm, data=md[0].data) == md[0] for arm in others)
    assert all(dataclasses.replace(arm.data, samplers=md[0].data.samplers) == md[0].data for arm in others)
    assert stages["rlhf"].data.samplers == (policy, policy) and stages["rlhf"].data.preference == "reward"
    assert [stages[name].average_decay for name in ("ema1", "ema2")] == [0.999, 0.9995]
    assert [stages[name].objective.loss.keywords["tau"] for name in ("rlhf", "md1")] == [0.05, 0.008]
    averages = {f"ema{i}_avg": KeptPolicy(policy=f"ema{i}", at="average") for i in (1, 2)}
    assert {name: stages[name] for name in averages} == averages
    assert stages["table"].policies == {n: n for n in ["sft", *ARMS, *averages]} and stages["md1"].loop.steps == 10_000


def test_the_policies_start_is_fine_tuned_unless_a_folder_has_been_and_nothing_else_changes():
    given, tuned = (config.load(TLDR, {"train": "posts.jsonl", **more}).stages for more in ({"sft": "folder"}, {}))
    assert dataclasses.replace(tuned.pop("base"), path="folder") == given["sft"]
    assert tuned.pop("replies").path == "posts.jsonl" and (tuned["sft"].start, tuned["sft"].pairs) == (
        "base",
        "replies",
    )
    assert {name for name in given if describe(given[name]) != describe(tuned[name])} == {"sft"}


@pytest.mark.parametrize(("file", "first"), [(TLDR, "reader"), (DECODER, "sft")])
def test_all_stages_of_the_summaries_ask_one_query_and_cut_posts_at_one_length(file, first):
    """In one tokenizer: that of the policies and that of the preference models are the same."""
    experiment = config.load(file, {})
    stages, query = experiment.stages, experiment.task.source.query
    assert query == summary.TLDR_QUERY and experiment.task.shorten
    reads = [stages[name].read for name in ("replies", "pairs", "truth")]
    assert {read.keywords["query"] for read in reads} == {query}
    assert [read.keywords["splits"] for read in reads[1:]] == [("train",), ("valid2",)]
    assert [read.keywords["confidence"] for read in reads[1:]] == [(), (1, 2, 8, 9)]
    asked = [stages[name].buckets for name in ("preference", "reward", "rlhf", "md1")]
    asked.append(stages["table"].writing.buckets)
    assert {max(buckets) for buckets in asked} == {stages["sft"].shorten_to or stages["sft"].row} == {512}
    assert stages["preference"].start == stages["reward"].start == first


@pytest.mark.parametrize(("size", "name", "width", "heads", "layers"), [
    ("1b", "PYTHIA_1B", 2048, 8, 16), ("2.8b", "PYTHIA_3B", 2560, 32, 32),
])  # fmt: skip
def test_a_decoder_is_the_published_pythia(size, name, width, heads, layers, tmp_path):
    """Its config.json, read as a checkpoint's is."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": width, "initializer_range": 0.02, "intermediate_size": 4 * width, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": heads,
        "num_hidden_layers": layers, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50304,
    }))  # fmt: skip
    stage = config.load(DECODER, {"size": size}).stages["base"]
    assert stage.model == getattr(config.load_module(DECODER), name) == huggingface.read_config(tmp_path)


def test_the_decoders_arms_share_start_models_and_lengths_and_ppo_is_the_published_one():
    stages = config.load(DECODER, {}).stages
    for arm, preference in (("rlhf", "reward"), ("gradient", "reward"), ("md1", "preference")):
        stage = stages[arm]
        assert (stage.start, stage.reference, stage.data.preference) == ("sft", "sft", preference)
        assert (stage.max_new_tokens, stages["table"].writing.max_new_tokens) == (53, 53)
    ppo, preset = stages["rlhf"], presets.tldr_details(1953)
    assert dataclasses.replace(ppo.objective, invalid=preset.objective.invalid) == preset.objective
    assert (ppo.adam, ppo.temperature) == (preset.adam, preset.temperature)
    assert ppo.critic.start == ppo.data.preference and ppo.critic.head == "reward"
    assert ppo.loop.steps * ppo.loop.batch == pytest.approx(1e6, rel=1e-3)
    assert stages["reward"].form is bradley_terry and stages["preference"].form is not bradley_terry


def test_the_larger_labeller_changes_who_writes_the_pairs_alone():
    small, large = (config.load(RLCD, {"labeller": size}).stages for size in ("7b", "30b"))
    assert large.pop("labeller").model.layers == 60
    assert large["pairs"] == dataclasses.replace(small["pairs"], generator="labeller")
    changed = {name for name in small if describe(small[name]) != describe(large[name])}
    assert changed == {"pairs", "rlaif_pairs", "rescore_pairs"}


def test_the_arms_of_rlcd_differ_in_their_labels_alone():
    """Each has its own pairs, reward model and critic; the optimiser and its numbers are one."""
    stages = config.load(RLCD, {}).stages
    for arm, reward, pairs in (
        ("rlaif", "rlaif_reward", "rlaif_pairs"),
        ("rescore", "rescore_reward", "rescore_pairs"),
    ):
        assert stages[arm].critic.start == stages[arm].data.preference == reward and stages[reward].pairs == pairs
        same = dataclasses.replace(stages[arm], critic=stages["rlcd"].critic, data=stages["rlcd"].data)
        assert same == stages["rlcd"] and dataclasses.replace(stages[reward], pairs="pairs") == stages["reward"]
    rlcd, nash_md = stages["rlcd"].loop, stages["nash_md"].loop
    assert rlcd.steps * rlcd.batch == nash_md.steps * nash_md.batch == 80 * 512
    assert stages["distilled"].pairs == stages["rescore_pairs"].pairs == "pairs"


def test_the_faithful_ppo_has_the_faults_of_the_released_code_and_the_other_has_not():
    correct, faithful = (config.load(RLCD, {"faithful": value}).stages["rlcd"].objective for value in ("False", "True"))
    assert faithful.kl is losses.clamped_k1 and faithful.whiten_rewards and faithful.policy_places is losses.all_places
    assert correct == PPO(tau=faithful.tau, gae_lambda=1.0)


def test_a_preference_model_shares_the_adapters_base_or_is_of_the_small_model():
    for preference, start, judge in (("same", "base", "small"), ("8b", "small", "base")):
        stages = config.load(LLAMA, {"preference": preference}).stages
        assert (stages["preference"].start, stages["judge"].start) == (start, judge)
        assert (stages["preference"].lora is None) == (preference == "8b") and stages["nash_md"].lora


@pytest.mark.parametrize(("file", "settings", "words"), [
    (RLCD, {"labeller": "13b"}, "choose 7b or 30b"), (RLCD, {"attribute": "brave"}, "harmless, helpful"),
    (DECODER, {"size": "7b"}, "choose 1b or 2.8b"),
    (LLAMA, {"family": "mistral"}, "llama2, llama3"), (LLAMA, {"preference": "1b"}, "choose same or 8b"),
])  # fmt: skip
def test_an_unknown_choice_is_told(file, settings, words):
    with pytest.raises(UserError, match=words):
        config.load(file, settings)


@pytest.mark.parametrize(("file", "words"), [
    (RLCD, r"checkpoints/llama-7b.*cannot be read"), (TLDR, r"checkpoints/t5-v1_1-large.*cannot be read"),
    (LLAMA, r"checkpoints/llama-70b.*cannot be read"),
])  # fmt: skip
def test_a_run_without_a_checkpoint_is_told_before_anything_runs(file, words, tmp_path):
    experiment = config.load(file, {"mesh.tensor": "1"})
    with pytest.raises(UserError, match=words):
        run.run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_data_is_told(tmp_path):
    experiment = config.load(RLCD, {"mesh.tensor": "1"})
    context = Context(experiment, tmp_path, "pairs", make_mesh(experiment.mesh))
    stage = experiment.stages["pairs"]
    assert isinstance(stage, Label)
    with pytest.raises(UserError, match="no file of dialogues is named"):
        stage.check(context)
