"""The whole line with an encoder-decoder, adapters, and a preference model of another kind and tokenizer."""

import collections
import dataclasses
import functools
import gc
import hashlib
import json
import re
from functools import partial

import jax
import numpy as np
import pytest

from alignjax import losses
from alignjax.distributed import sharding
from alignjax.labeling.judged import Judged
from alignjax.models.config import T5Config, TransformerConfig
from alignjax.models.lora import Lora
from alignjax.objectives import PreferenceGradient
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.judges import LanguageModelJudge, Oracle
from alignjax.pipeline.run import run
from alignjax.pipeline.stages import (
    FitPreference,
    Label,
    OnlineData,
    Pretrain,
    Tournament,
    TrainPolicy,
    Writing,
    ZeroShotPreference,
)
from alignjax.preferences.preference_models import bradley_terry
from alignjax.sampling.samplers import mixture, policy
from alignjax.tasks import sandbox
from alignjax.tasks.task import oracle_from_score
from alignjax.training.loop import Loop
from alignjax.training.metrics import read_metrics
from alignjax.training.optimizer import Adam

T5 = T5Config(vocab_size=512, width=16, layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=24, end_token=2)
DECODER = TransformerConfig(vocab_size=480, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=24)
WRITING = Writing(max_new_tokens=6, buckets=(32,), batch=8)
LOOP = Loop(steps=2, batch=8)
LORA = Lora(2, 8.0, ("q", "v"))


def any_text(raw):
    """Keeps any text: models that have hardly learnt to write pass this filter."""
    return raw.strip() or None


def shorter(prompt, reply):
    return -float(len(reply))


@pytest.fixture(scope="module")
def experiment():
    world = sandbox.World(nouns=4, verbs=4, two_turns=0.0)
    plain = sandbox.sandbox_task(world)
    task = dataclasses.replace(
        plain, clean=any_text, score=shorter, oracles={"oracle": oracle_from_score(shorter)},
        template=plain.template._replace(answer="Human:", other="</s>"),  # one token each in any tokenizer
    )  # fmt: skip
    base = Pretrain(model=T5, documents=200, row=64, adam=Adam(1e-3), loop=LOOP, tokenizer_documents=200)
    fit = FitPreference(start="base", pairs="pairs", adam=Adam(1e-3), loop=LOOP, buckets=(32,), response=24)
    online = OnlineData((policy, mixture(0.25)), prompts=16, preference="asked", unfinished_loses=False)
    full = TrainPolicy(
        PreferenceGradient(partial(losses.nash_md, tau=0.1)), online, Adam(1e-2, warmup=0), LOOP, buckets=(32,),
        max_new_tokens=6, start="base", reference="base",
    )  # fmt: skip
    adapted = dataclasses.replace(full, data=dataclasses.replace(online, preference="other"), lora=LORA)
    return Experiment(task, {
        "base": base,
        "reader": dataclasses.replace(base, model=DECODER, tokenizer_documents=50),
        "pairs": Label(
            generator="base", method=Judged(Oracle("oracle")), split="train", prompts=24, writing=WRITING, held_out=0.4
        ),
        "other": dataclasses.replace(fit, start="reader", form=bradley_terry, lora=LORA),
        "fitted": dataclasses.replace(fit, truth="pairs"),
        "asked": ZeroShotPreference("base"),
        "full": full,
        "adapted": adapted,
        "table": Tournament(
            policies={n: n for n in ("base", "full", "adapted")}, reference="base",
            judges={"oracle": Oracle("oracle"), "asked": LanguageModelJudge("reader")}, prompts=16, writing=WRITING,
        ),
    })  # fmt: skip


def abstract(x):
    """Returns an array as its shape, dtype and place; of an array that may lie anywhere, without place."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


@pytest.fixture(scope="module")
def line(experiment, tmp_path_factory):
    """Returns the folder of a whole run, and (stage, program) -> its calls."""
    folder, calls = tmp_path_factory.mktemp("line"), collections.defaultdict(list)
    others = {id(x): x for x in jax.live_arrays()}
    gc.freeze()  # what other tests left is not looked through again at every call

    def recorded(stage, program):
        def call(*arguments):
            gc.collect()  # readers of checkpoints leave cycles
            live = {id(x): x for x in jax.live_arrays() if x.dtype == np.float32 and len(x.devices()) > 1}
            alive = sum(x.nbytes for x in live.values() if id(x) not in others)  # one device: a part of a saved array
            calls[stage, program.name].append((alive, program.function, jax.tree.map(abstract, arguments)))
            return program.function(*arguments)

        return program._replace(function=call)

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(stage) for stage in experiment.stages.values()}:

            def programs(stage, context, inner=kind.programs):
                return tuple(recorded(context.name, program) for program in inner(stage, context))

            patch.setattr(kind, "programs", programs)
        run(experiment, folder)
    gc.unfreeze()
    return folder, dict(calls)


@pytest.fixture(scope="module")
def workdir(line):
    return line[0]


def planned(experiment, workdir):
    """Returns (stage, program's name) -> Program. With ``workdir`` tokenizers are those of the finished stages."""
    mesh = sharding.make_mesh(experiment.mesh)
    return {
        (name, program.name): program
        for name, stage in experiment.stages.items()
        for program in stage.programs(Context(experiment, workdir, name, mesh))
    }


def size(program):
    """Returns the bytes of the float32 arrays that are planned to live while a program runs."""
    leaves = {id(x): x for x in jax.tree.leaves((program.arguments, program.resident)) if x.dtype == np.float32}
    return sum(4 * x.size for x in leaves.values())


def test_what_lives_while_a_program_runs_is_what_is_planned(line, experiment):
    programs = planned(experiment, None)
    for key, calls in line[1].items():
        alive = max(alive for alive, _, _ in calls)
        assert size(programs[key]) <= alive <= size(programs[key]) + 1000, key  # metrics of earlier steps live too
    logp = WRITING.batch * WRITING.max_new_tokens * 4
    assert size(programs["table", "score 32"]) == size(programs["table", "write full 32"]) + logp  # the largest policy


def test_the_programs_that_are_planned_are_the_programs_that_run(line, experiment):
    """Planned before anything has run: the same programs, each with the very shapes that the run gave it."""
    programs = planned(experiment, None)
    assert programs.keys() == line[1].keys() and {name for name, _ in programs} == experiment.stages.keys() - {"asked"}
    for key, calls in line[1].items():
        want = jax.tree.structure(programs[key].arguments)
        for _, _, arguments in calls:
            assert jax.tree.structure(arguments) == want, key
            for got, expected in zip(*map(jax.tree.leaves, (arguments, programs[key].arguments)), strict=True):
                assert (got.shape, got.dtype) == (expected.shape, expected.dtype), key


def digest(text):
    """Returns the digest of a lowered program whatever its helper functions are called, and however they are shared."""
    found = re.finditer(r"func\.func \w+ @([^(]+)\((.*?)(?=\n  func\.func|\n}\s*$)", text, re.DOTALL)
    bodies = {match[1]: match[2] for match in found}

    @functools.cache
    def canonical(name):
        body = re.sub(r"call @([^(]+)\(", lambda match: f"call {canonical(match[1])}(", bodies[name])
        return hashlib.sha256(body.encode()).hexdigest()

    return canonical("main")


def test_the_texts_that_are_planned_are_the_texts_that_run(line, experiment, workdir):
    """The lowered programs are compared where the tokenizers are known: their ids are constants of some programs."""
    with jax.set_mesh(sharding.make_mesh(experiment.mesh)):
        want = {
            key: {digest(p.function.lower(*p.arguments).as_text())} for key, p in planned(experiment, workdir).items()
        }
        got = {
            key: {digest(function.lower(*arguments).as_text()) for _, function, arguments in (calls[0], calls[-1])}
            for key, calls in line[1].items()
        }
    assert got == want
    assert len(set().union(*want.values())) > 10


def test_a_policy_is_its_reference_before_its_first_step(workdir):
    """The log-ratio of the first batch is 0 to the bit, with and without adapters, and that of the next is not."""
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
        assert json.loads((workdir / name / "model.json").read_text())["shared_base"]["stage"] == base
    assert not (workdir / "asked" / "params").exists()  # nothing trained, nothing copied


def test_what_is_drawn_is_what_the_reference_scores(workdir):
    """Cached decoding of the encoder-decoder against its full pass, over real prompts: the base's KL to itself is 0."""
    table, asked = json.loads((workdir / "table" / "win_rates.json").read_text())
    assert (table["judge"], asked["judge"]) == ("oracle", "asked")
    kl = dict(zip(table["policies"], table["kl_to_reference"], strict=True))
    assert abs(kl["base"]) < 1e-4 and all(np.isfinite(list(kl.values())))
    assert max(abs(kl[name]) for name in ("full", "adapted")) > 1e-3
    rates = np.array(table["win_rate"])
    np.testing.assert_allclose((rates + rates.T)[~np.eye(3, dtype=bool)], 1.0)


def test_a_second_run_finds_every_stage_finished(workdir, experiment, capfd):
    run(experiment, workdir)
    assert capfd.readouterr().err.count("finished before") == len(experiment.stages)
    assert jax.device_count() == 8  # the whole line ran on a mesh of eight
