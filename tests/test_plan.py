"""Plans: a stage's own programs as shapes, what the mesh does to their memory and traffic, and the table."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.cli import main
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.decoder import decoder
from alignjax.pipeline import config, stages
from alignjax.pipeline.experiment import ids_of, shape
from alignjax.pipeline.networks import gathering
from alignjax.pipeline.stages.start import layout
from alignjax.planning import cost, counting, hlo, plan, topology
from alignjax.sampling.generate import writer
from alignjax.sampling.process import Sampling
from tests.conftest import ROOT, TINY, ragged

FILE = str(ROOT / "experiments" / "quickstart.py")
SMALL = {"small": "True", "nash_md.max_new_tokens": "8", "nash_md.loop.steps": "2"}
CHIP = topology.CHIPS["v5e"]


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh(sharding.Mesh(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def compiled(name, mesh, **settings):
    """A stage's last update on that mesh, and its analysis."""
    experiment = config.load(FILE, {**SMALL, **{k.replace("__", "."): str(v) for k, v in settings.items()}})
    context = stages.Context(experiment, Path("nowhere"), name, mesh, sketched=True)
    program = [one for one in experiment.stages[name].programs(context) if one.name.startswith("update")][-1]
    found, refused = plan.compiled(program, mesh, CHIP, {})
    assert not refused
    return program, found


def sent(found):
    return sum(kind.bytes for kind in found.cost.collectives.values())


def test_every_stage_of_the_quickstart_says_what_it_compiles_before_anything_has_run():
    experiment, mesh = config.load(FILE, SMALL), mesh_of(2, 2, 2)
    names = {}
    for name, stage in experiment.stages.items():
        context = stages.Context(experiment, Path("nowhere"), name, mesh, sketched=True)
        names[name] = [program.name for program in stage.programs(context)]
    assert names["base"] == ["update"] and names["pairs"] == ["write 32", "write 104"]
    assert names["preference"] == ["update 24", "update 80", "measure"] and names["nash_md"] == ["update 24"]
    assert names["table"][:2] == ["base writes 24", "base writes 80"]
    assert names["table"][-3:] == ["the reference scores 24", "the reference scores 80", "held-out judges"]


def test_the_state_of_a_sketch_is_the_state_of_the_run():
    """Shapes, dtypes and places of what ``plan`` compiles for are those that training makes."""
    mesh = mesh_of(2, 2, 2)
    experiment = config.load(FILE, SMALL)
    stage = experiment.stages["base"]
    context = stages.Context(experiment, Path("nowhere"), "base", mesh, sketched=True)
    (program,) = stage.programs(context)
    from alignjax.models.build import build

    model = build(stage.model)
    params = jax.jit(model.init, out_shardings=layout(model, context))(context.key)
    first, _, _ = stage.learning(model).compiled(params, context.key, mesh)
    state = first(params, context.key)
    for planned, made in zip(jax.tree.leaves(program.arguments[0]), jax.tree.leaves(state), strict=True):
        assert planned.shape == made.shape and planned.dtype == made.dtype
        assert planned.sharding.is_equivalent_to(made.sharding, made.ndim)


@pytest.fixture(scope="module")
def over_fsdp():
    """(devices, batch) -> the preference model's update on fsdp alone."""
    cache = {}

    def at(devices, batch):
        if (devices, batch) not in cache:
            cache[devices, batch] = compiled("judge", mesh_of(1, devices, 1), judge__loop__batch=batch)[1]
        return cache[devices, batch]

    return at


def test_a_devices_temporaries_do_not_grow_when_the_batch_grows_with_the_mesh(over_fsdp):
    two, eight = over_fsdp(2, 16), over_fsdp(8, 64)
    assert eight.memory.temporaries <= 1.02 * two.memory.temporaries
    assert eight.memory.arguments < two.memory.arguments


def test_the_batch_is_not_what_is_sent(over_fsdp):
    """Over fsdp parameters travel and activations stay: four times the rows send little more."""
    assert sent(over_fsdp(8, 64)) < 1.3 * sent(over_fsdp(8, 16))


def test_gathered_weights_leave_the_decoding_loop_nothing_to_gather():
    """The same samples; and no parameter travels once a token."""
    model, mesh, key = transformer(TINY), mesh_of(1, 8, 1), jax.random.key(3)
    prompt, numbers = ragged([[3 + i, 4 + i, 5] for i in range(8)]), np.arange(8)
    drawn, traffic = {}, {}
    with jax.set_mesh(mesh):
        where = sharding.shardings(jax.eval_shape(model.init, key), model.rules, mesh)
        params = jax.jit(lambda k: jax.tree.map(lambda x: 1.5 * x, model.init(k)), out_shardings=where)(key)
        for name, one in {"lying": model, "gathered": gathering(model)}.items():
            write = writer(one, stop=((2,),), max_new_tokens=6, sampling=Sampling(), mesh=mesh)
            arguments = params, *sharding.place_rows(mesh, (prompt, numbers)), key
            drawn[name] = [np.asarray(x) for x in jax.tree.leaves(write(*arguments))]
            module = hlo.parse(write.lower(*arguments).compile().as_text())
            loops = [one for one in hlo.executed(module) if one.times > 1]
            traffic[name] = sum(one.instruction.op.startswith(counting.COLLECTIVES) for one in loops)
    for a, b in zip(*drawn.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert traffic["gathered"] < traffic["lying"]


def test_the_table_says_what_fits_and_what_does_not():
    memory = cost.Memory(2**30, 0, 0, 2**31, 0, 3 * 2**30, 0, CHIP.hbm)
    spent = cost.Cost(10**15, 10**12, {"all-gather": cost.Collective(3, 2 * 10**9, 0)}, {}, ())
    fits = plan.Row(
        "v5e:4x4", "data=1,fsdp=16,tensor=1", 16, "a", "update 24", 3.0, 99, cost.Analysis(memory, spent, ())
    )
    small = fits._replace(topology="v5e:2x2", devices=4, found=fits.found._replace(memory=memory._replace(peak=2**35)))
    none = fits._replace(topology="v5e:1x1", devices=1, found=None, refused="its arguments alone are too much")
    once = fits._replace(found=fits.found._replace(cost=spent._replace(loops={"while": "unknown"})))
    shown = plan.table([none, small, fits, once]).splitlines()
    assert "no: its arguments alone" in shown[2] and "no, 16.25 too much" in shown[3] and "| yes |" in shown[4]
    assert "| 1 | 2 | 5.08 s | compute" in shown[4]  # 1e15 / 197e12
    assert "| > 1 | > 2 | > 5.08 s | compute" in shown[5]
    assert plan.smallest([none, small, fits]) == "Smallest that fits: v5e:4x4 with data=1,fsdp=16,tensor=1."
    assert "Nothing" in plan.smallest([none, small])


def test_of_buckets_the_largest_is_kept():
    one = stages.experiment.Program("write 32", None, (), 10)
    kept = plan.longest([one, one._replace(name="write 104", tokens=30), one._replace(name="update", tokens=1)])
    assert [program.name for program in kept] == ["write 104", "update"]


def test_what_lies_on_a_device_is_counted_by_its_shard():
    where = sharding.row_sharding(mesh_of(2, 4, 1))
    tree = {"a": jax.ShapeDtypeStruct((16, 8), "float32", sharding=where), "b": shape("bfloat16", 5), "c": ids_of(2, 3)}
    assert (
        sharding.bytes_per_device(tree) == sharding.bytes_per_device([tree, tree["a"]]) == 16 * 8 * 4 // 8 + 10 + 24 + 6
    )


def test_what_lives_beside_a_program_is_counted_once():
    mesh = mesh_of(1, 8, 1)
    where = sharding.row_sharding(mesh)
    x, y = (jax.ShapeDtypeStruct((n, 1024), "float32", sharding=where) for n in (8, 32))
    program = stages.experiment.Program("add", jax.jit(lambda x: x + 1, out_shardings=where), (x,), 1)
    alone, beside, again = (
        plan.compiled(program._replace(beside=trees), mesh, CHIP, {})[0].memory for trees in ((), (x, y), (x, y, y))
    )
    assert beside.arguments - alone.arguments == beside.peak - alone.peak == 32 * 1024 * 4 // 8
    assert beside.needed == again.needed


@pytest.mark.parametrize("text", ["fsdp", "fsdp=a", "depth=2", "fsdp=1,2"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="is no mesh"):
        plan.read_mesh(text)


def test_a_mesh_is_read():
    assert plan.read_mesh("fsdp=-1,tensor=4") == sharding.Mesh(1, -1, 4)


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
        "| v5e:2x2 | data=1,fsdp=2,tensor=2 | judge: update 80 |" in done.stdout and "Smallest that fits" in done.stdout
    )
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row["program"] for row in rows] == ["update 80", "measure"]
    for row in rows:
        assert row["fits"] and row["found"]["memory"]["limit"] == CHIP.hbm and row["found"]["cost"]["flops"] > 0
