"""Plans: a stage's own programs as shapes, how the mesh changes their memory and traffic, and the table."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignjax.cli import main
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.models.decoder import decoder
from alignjax.pipeline import config
from alignjax.pipeline.experiment import Context, Program, abstract_array, abstract_tokens
from alignjax.pipeline.stages.load import parameter_places
from alignjax.pipeline.stages.writing import writing_model
from alignjax.planning import cost, counting, hlo, loops, plan, topology
from alignjax.sampling.generate import reply_writer
from alignjax.sampling.process import Sampling
from tests.conftest import ROOT, TINY, ragged

FILE = str(ROOT / "experiments" / "quickstart.py")
SMALL = {"small": "True", "nash_md.max_new_tokens": "8", "nash_md.loop.steps": "2"}
CHIP = topology.CHIPS["v5e"]


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh(sharding.Mesh(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def planned(experiment, name, mesh):
    """Returns a stage's programs, from abstract networks, before anything has run."""
    return experiment.stages[name].programs(Context(experiment, None, name, mesh))


def analyse(name, mesh, **settings):
    """Returns the analysis of a stage's last ``learn`` program on that mesh."""
    experiment = config.load(FILE, {**SMALL, **{k.replace("__", "."): str(v) for k, v in settings.items()}})
    learn = [program for program in planned(experiment, name, mesh) if program.name.startswith("learn")][-1]
    analysis, refused = plan.compile_program(learn, mesh, CHIP, {})
    assert not refused
    return analysis


def bytes_sent(analysis):
    return sum(kind.bytes for kind in analysis.cost.collectives.values())


def test_every_stage_of_the_quickstart_says_what_it_compiles_before_anything_has_run():
    experiment, mesh = config.load(FILE, SMALL), mesh_of(2, 2, 2)
    names = {name: [program.name for program in planned(experiment, name, mesh)] for name in experiment.stages}
    assert names["base"] == ["learn"] and names["pairs"] == ["write 32", "write 104"]
    assert names["preference"] == ["learn 24", "learn 80", "measure"]
    assert names["nash_md"] == ["collect 24", "learn 24"]
    assert names["table"][:2] == ["write base 24", "write base 80"]
    assert names["table"][-3:] == ["score 24", "score 80", "judge held-out"]


def test_the_abstract_state_is_the_state_of_the_run():
    """Shapes, dtypes and places of what ``plan`` compiles for are those that training makes."""
    mesh = mesh_of(2, 2, 2)
    experiment = config.load(FILE, SMALL)
    stage = experiment.stages["base"]
    context = Context(experiment, None, "base", mesh)
    (program,) = stage.programs(context)
    model = build(stage.model)
    params = jax.jit(model.init, out_shardings=parameter_places(model, mesh))(context.key())
    state = stage.learner(context).init(params, context.key())
    for abstract, array in zip(jax.tree.leaves(program.arguments[0]), jax.tree.leaves(state), strict=True):
        assert abstract.shape == array.shape and abstract.dtype == array.dtype
        assert abstract.sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.fixture(scope="module")
def over_fsdp():
    """Returns (devices, batch) -> the analysis of the preference model's learning on fsdp alone."""
    cache = {}

    def at(devices, batch):
        if (devices, batch) not in cache:
            cache[devices, batch] = analyse("judge", mesh_of(1, devices, 1), judge__loop__batch=batch)
        return cache[devices, batch]

    return at


def test_a_devices_temporaries_do_not_grow_when_the_batch_grows_with_the_mesh(over_fsdp):
    two, eight = over_fsdp(2, 16), over_fsdp(8, 64)
    assert eight.memory.temporaries <= 1.02 * two.memory.temporaries
    assert eight.memory.arguments < two.memory.arguments


def test_parameters_are_sent_and_activations_are_not(over_fsdp):
    """Over fsdp four times the rows send little more."""
    assert bytes_sent(over_fsdp(8, 64)) < 1.3 * bytes_sent(over_fsdp(8, 16))


def test_with_gathered_weights_the_decoding_loop_gathers_nothing():
    """The samples are the same, and no parameter is sent once a token."""
    model, mesh, key = decoder(TINY), mesh_of(1, 8, 1), jax.random.key(3)
    prompt, numbers = ragged([[3 + i, 4 + i, 5] for i in range(8)]), np.arange(8)
    drawn, traffic = {}, {}
    with jax.set_mesh(mesh):
        where = sharding.shardings(jax.eval_shape(model.init, key), model.rules, mesh)
        params = jax.jit(lambda k: jax.tree.map(lambda x: 1.5 * x, model.init(k)), out_shardings=where)(key)
        for gather in (False, True):
            write = reply_writer(writing_model(model, gather), ((2,),), 6, Sampling(), mesh)
            arguments = params, *sharding.place_rows(mesh, (prompt, numbers)), key
            drawn[gather] = [np.asarray(x) for x in jax.tree.leaves(write(*arguments))]
            module = hlo.parse_module(write.lower(*arguments).compile().as_text())
            repeated = [executed for executed in loops.executed_instructions(module) if executed.times > 1]
            traffic[gather] = sum(one.instruction.op.startswith(counting.COLLECTIVES) for one in repeated)
    for a, b in zip(*drawn.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert traffic[True] < traffic[False]


def test_the_table_says_what_fits_and_what_does_not():
    memory = cost.Memory(2**30, 0, 0, 2**31, 0, 3 * 2**30, 0, CHIP.hbm)
    spent = cost.Cost(10**15, 10**12, {"all-gather": cost.Collective(3, 2 * 10**9, 0)}, {}, ())
    fits = plan.PlanRow(
        "v5e:4x4", "data=1,fsdp=16,tensor=1", 16, "a", "learn 24", 3.0, 99, cost.Analysis(memory, spent, ())
    )
    too_large = fits.analysis._replace(memory=memory._replace(peak=2**35))
    small = fits._replace(topology="v5e:2x2", devices=4, analysis=too_large)
    none = fits._replace(topology="v5e:1x1", devices=1, analysis=None, refused="its arguments alone are too much")
    inexact = fits._replace(analysis=fits.analysis._replace(cost=spent._replace(loops={"while": "unknown"})))
    shown = plan.plan_table([none, small, fits, inexact]).splitlines()
    assert "no: its arguments alone" in shown[2] and "no, 16.25 too much" in shown[3] and "| yes |" in shown[4]
    assert "| 1 | 2 | 5.08 s | compute" in shown[4]  # 1e15 / 197e12
    assert "| > 1 | > 2 | > 5.08 s | compute" in shown[5]
    assert plan.smallest_fit([none, small, fits]) == "Smallest that fits: v5e:4x4 with data=1,fsdp=16,tensor=1."
    assert "Nothing" in plan.smallest_fit([none, small])


def test_of_buckets_the_largest_is_kept():
    program = Program("write 32", None, (), 10)
    longer, other = program._replace(name="write 104", tokens=30), program._replace(name="learn", tokens=1)
    assert [program.name for program in plan.largest_buckets([program, longer, other])] == ["write 104", "learn"]


def test_what_lies_on_a_device_is_counted_by_its_shard():
    where = sharding.row_sharding(mesh_of(2, 4, 1))
    tree = {
        "a": jax.ShapeDtypeStruct((16, 8), "float32", sharding=where),
        "b": abstract_array("bfloat16", 5),
        "c": abstract_tokens(2, 3),
    }
    assert (
        sharding.bytes_per_device(tree) == sharding.bytes_per_device([tree, tree["a"]]) == 16 * 8 * 4 // 8 + 10 + 24 + 6
    )


def test_resident_arrays_are_counted_once():
    mesh = mesh_of(1, 8, 1)
    where = sharding.row_sharding(mesh)
    x, y = (jax.ShapeDtypeStruct((n, 1024), "float32", sharding=where) for n in (8, 32))
    program = Program("add", jax.jit(lambda x: x + 1, out_shardings=where), (x,), 1)
    alone, resident, repeated = (
        plan.compile_program(program._replace(resident=trees), mesh, CHIP, {})[0].memory
        for trees in ((), (x, y), (x, y, y))
    )
    assert resident.arguments - alone.arguments == resident.peak - alone.peak == 32 * 1024 * 4 // 8
    assert resident.needed == repeated.needed


def test_one_text_is_compiled_once_and_what_does_not_fit_is_not_compiled(monkeypatch):
    mesh, cache, analysed, analyse_compiled = mesh_of(1, 8, 1), {}, [], cost.analyse
    monkeypatch.setattr(cost, "analyse", lambda *words: analysed.append(words) or analyse_compiled(*words))
    program = Program("add", jax.jit(lambda x: x + 1), (abstract_array("float32", 8),), 1)
    analyses = [plan.compile_program(program._replace(name=name), mesh, CHIP, cache) for name in ("a", "b")]
    huge = program._replace(arguments=(abstract_array("float32", CHIP.hbm),))
    analysis, refused = plan.compile_program(huge, mesh, CHIP, cache)
    assert len(cache) == len(analysed) == 1 and analyses[0] == analyses[1]
    assert analysis is None and refused == "its arguments alone are 63.00 of 15.75 GiB a device"


@pytest.mark.parametrize("text", ["fsdp", "fsdp=a", "depth=2", "fsdp=1,2"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(UserError, match="is no mesh"):
        plan.parse_mesh(text)


def test_a_mesh_is_read():
    assert plan.parse_mesh("fsdp=-1,tensor=4") == sharding.Mesh(1, -1, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v9"], "unknown kind 'v9'"),
        (["--topology", "v5e:3x3"], "not offered as 3x3"),
        (["--topology", "v5e:2x2", "--only", "nothing"], "unknown stage 'nothing'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))  # which it prepares for the compilers
    assert main(["plan", FILE, *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make plan")
def test_a_stage_is_planned_for_a_tpu_that_is_not_here(environment, tmp_path):
    sets = [f"--set={name}={value}" for name, value in {**SMALL, "base.model.layers": "1"}.items()]
    words = ["plan", FILE, "--topology", "v5e:2x2", "--only", "judge", "--mesh", "fsdp=2,tensor=2", *sets]
    argv = [sys.executable, "-m", "alignjax", *words, "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "| v5e:2x2 | data=1,fsdp=2,tensor=2 | judge: learn 80 |" in done.stdout and "Smallest that fits" in done.stdout
    )
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row["program"] for row in rows] == ["learn 80", "measure"]
    for row in rows:
        assert row["fits"] and row["analysis"]["memory"]["limit"] == CHIP.hbm and row["analysis"]["cost"]["flops"] > 0
