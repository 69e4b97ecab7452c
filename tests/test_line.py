"""The whole line with an encoder-decoder, adapters, and a preference model of another kind and tokenizer."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax import objectives
from alignjax.distributed import sharding
from alignjax.labeling import methods as labeling
from alignjax.models.decoder import TransformerConfig
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.pipeline import stages
from alignjax.pipeline.run import run
from alignjax.pipeline.stages import (
    Adam,
    Experiment,
    FitPreference,
    Label,
    Loop,
    Optimise,
    Pretrain,
    Tournament,
    Writing,
    ZeroShot,
)
from alignjax.preferences import models as preference
from alignjax.sampling import samplers as rollout
from alignjax.tasks import sandbox
from alignjax.tasks.task import oracle_from_score
from alignjax.training.metrics import read_metrics

T5 = T5Config(vocab_size=512, width=16, layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=24, end_token=2)
DECODER = TransformerConfig(vocab_size=480, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=24)
WRITING = Writing(max_new_tokens=6, buckets=(32,), batch=8)
LOOP = Loop(steps=2, batch=8)
LORA = Lora(2, 8.0, ("q", "v"))


def any_text(raw):
    """Models that hardly learnt to write pass this filter."""
    return raw.strip() or None


def shorter(prompt, reply):
    return -float(len(reply))


@pytest.fixture(scope="module")
def experiment():
    world = sandbox.World(nouns=4, verbs=4, two_turns=0.0)
    plain = sandbox.task(world)
    task = dataclasses.replace(
        plain, clean=any_text, score=shorter, oracles={"oracle": oracle_from_score(shorter)},
        template=plain.template._replace(answer="Human:", other="</s>"),  # one token each in any tokenizer
    )  # fmt: skip
    base = Pretrain(model=T5, documents=200, row=64, adam=Adam(1e-3), loop=LOOP, tokenizer_documents=200)
    oracle = partial(labeling.by_oracle, oracle="oracle", error=0.0)
    fit = FitPreference(start="base", pairs="pairs", adam=Adam(1e-3), loop=LOOP, buckets=(32,), response=24)
    policy = Optimise(
        start="base", reference="base", preference="asked", objective=partial(objectives.nash_md, tau=0.1),
        opponent=partial(rollout.mixture, beta=0.25), adam=Adam(1e-2, warmup=0), loop=LOOP, prompts=16, buckets=(32,),
        max_new_tokens=6, unfinished_loses=False,
    )  # fmt: skip
    return Experiment(task, {
        "base": base,
        "reader": dataclasses.replace(base, model=DECODER, tokenizer_documents=50),
        "pairs": Label(generator="base", method=oracle, split="train", prompts=24, writing=WRITING),
        "other": dataclasses.replace(fit, start="reader", form=preference.bradley_terry, lora=LORA),
        "fitted": fit,
        "asked": ZeroShot("base"),
        "full": policy,
        "adapted": dataclasses.replace(policy, preference="other", lora=LORA),
        "table": Tournament(
            policies={n: n for n in ("base", "full", "adapted")}, reference="base",
            judges={"oracle": "oracle:oracle"}, prompts=16, writing=WRITING,
        ),
    })  # fmt: skip


@pytest.fixture(scope="module")
def line(experiment, tmp_path_factory):
    """The folder of a whole run; and stage -> the most bytes of float32 arrays that lived when it placed a batch."""
    folder, held = tmp_path_factory.mktemp("line"), {}
    place, timed, now = sharding.place, stages.timed, []
    others = {id(x): x for x in jax.live_arrays()}

    def placed(*arguments):
        alive = [x.nbytes for x in jax.live_arrays() if x.dtype == np.float32 and id(x) not in others]
        held[now[-1]] = max(held.get(now[-1], 0), sum(alive))
        return place(*arguments)

    def named(stage, context):
        now.append(context.name)
        return timed(stage, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "place", placed)
        patch.setattr(stages, "timed", named)
        run(experiment, folder)
    return folder, held


@pytest.fixture(scope="module")
def workdir(line):
    return line[0]


def size(program):
    leaves = {id(x): x for x in jax.tree.leaves((program.arguments, program.beside)) if x.dtype == np.float32}
    return sum(4 * x.size for x in leaves.values())


def test_what_lives_while_a_stage_works_is_what_is_planned(line, experiment):
    mesh = sharding.make_mesh(experiment.mesh)
    for name, held in line[1].items():
        context = stages.Context(experiment, Path("nowhere"), name, mesh, sketched=True)
        planned = {program.name: size(program) for program in experiment.stages[name].programs(context)}
        most = max(planned.values())
        assert most <= held <= most + 1000, name  # a batch's own log-probs are among what lived
    logp = WRITING.batch * WRITING.max_new_tokens * 4
    assert planned["the reference scores 32"] == planned["full writes 32"] + logp  # the largest policy beside it
    assert line[1].keys() == experiment.stages.keys() - {"asked"}


def test_a_policy_is_its_reference_before_its_first_step(workdir):
    """Whole or with adapters, and wherever P reads its text: the first rollout's log-ratio is 0 to the bit, the next
    one's is not; P lies between 0 and 1 and is told apart."""
    for name in ("full", "adapted"):
        first, second = read_metrics(workdir / name / "metrics.jsonl")
        assert first["kl"] == 0 and second["kl"] != 0, name
        assert 0 < first["preference"] < 1 and first["gradient_norm"] > 0


def test_adapters_are_all_that_such_a_stage_writes(workdir):
    sizes = {
        name: sum(p.stat().st_size for p in (workdir / name / "params").rglob("*")) for name in ("full", "adapted")
    }
    assert sizes["adapted"] < sizes["full"]
    for name, base in (("adapted", "base"), ("other", "reader"), ("asked", "base")):
        assert json.loads((workdir / name / "model.json").read_text())["adapter"]["base"] == base
    assert not (workdir / "asked" / "params").exists()  # nothing trained, nothing copied


def test_what_was_drawn_is_what_the_reference_scores(workdir):
    """Cached decoding of the encoder-decoder against its full pass, over real prompts: the base's KL to itself is 0."""
    (table,) = json.loads((workdir / "table" / "win_rates.json").read_text())
    kl = dict(zip(table["policies"], table["kl_to_reference"], strict=True))
    assert abs(kl["base"]) < 1e-4 and all(np.isfinite(list(kl.values())))
    assert max(abs(kl[name]) for name in ("full", "adapted")) > 1e-3
    rates = np.array(table["win_rate"])
    np.testing.assert_allclose((rates + rates.T)[~np.eye(3, dtype=bool)], 1.0)


def test_a_second_run_makes_nothing_again(workdir, experiment, capfd):
    run(experiment, workdir)
    assert capfd.readouterr().err.count("finished before") == len(experiment.stages)
    assert jax.device_count() == 8  # all of it on the mesh of eight
