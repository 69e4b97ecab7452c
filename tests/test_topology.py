"""Planning without the accelerator: counts equal the equations, and predicted memory equals measured memory."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.errors import UserError
from alignjax.planning import cost, counting, hlo, topology

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
CHIP = topology.CHIPS["v5e"]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def analysed(f, *shapes, mesh=None, **options):
    """Returns the analysis of f, compiled for float32 arguments of these (shape, spec)."""
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec) if mesh else None)
        for shape, spec in shapes
    ]
    return cost.analyse(jax.jit(f, **options).lower(*arguments).compile(), CHIP, mesh)


def over_shards(f, mesh, specs, out):
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


# Arithmetic


def test_products_in_a_scan_count_as_often_as_they_run():
    def chain(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert analysed(chain, ((16, 32), P()), ((5, 32, 32), P())).cost.flops == 5 * 2 * 16 * 32 * 32


def test_nested_loops_multiply():
    def grid(x, w):
        inner = lambda x, _: (jnp.sin(x @ w), None)  # noqa: E731
        outer = lambda x, _: (lax.scan(inner, x, length=3)[0] + 1, None)  # noqa: E731
        return lax.scan(outer, x, length=7)[0] @ w

    assert analysed(grid, ((8, 16), P()), ((16, 16), P())).cost.flops == (7 * 3 + 1) * 2 * 8 * 16 * 16


def test_batched_products_and_convolutions():
    attention = partial(jnp.einsum, "bthk,bshk->bhts")
    assert analysed(attention, ((2, 6, 3, 8), P()), ((2, 5, 3, 8), P())).cost.flops == 2 * (2 * 3 * 6 * 5) * 8

    def valid(x, w):
        return lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))

    assert analysed(valid, ((2, 11, 4), P()), ((3, 4, 6), P())).cost.flops == 2 * (2 * 5 * 6) * (3 * 4)


def test_a_training_step_takes_six_flops_a_parameter_and_token(mesh):
    layers, width, batch = 4, 64, 32

    def loss(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    spec, rows = P(None, "fsdp", "tensor"), P("fsdp", None)
    both = analysed(jax.grad(loss, (0, 1)), ((layers, width, width), spec), ((batch, width), rows), mesh=mesh)
    assert both.cost.flops * mesh.size == pytest.approx(6 * layers * width**2 * batch, rel=1e-9)


# Loops


def test_a_loop_that_may_stop_early_counts_as_its_longest():
    def body(state):
        i, x, w = state
        return i + 1, jnp.tanh(x @ w), w

    def until(x, w):
        return lax.while_loop(lambda s: (s[0] < 9) & (s[1].sum() < 5), body, (0, x, w))[1]

    found = analysed(until, ((8, 8), P()), ((8, 8), P())).cost
    assert found.flops == 9 * 2 * 8**3
    assert list(found.loops.values()) == ["at most 9"]


def test_a_loop_without_a_bound_counts_once_and_is_named():
    def until(x, w):
        return lax.while_loop(lambda x: x.sum() < 5, lambda x: jnp.tanh(x @ w), x)

    found = analysed(until, ((8, 8), P()), ((8, 8), P())).cost
    assert found.flops == 2 * 8**3
    assert list(found.loops.values()) == ["unknown"]


# Communication


@pytest.mark.parametrize(
    ("kind", "operation", "sent"),
    [
        ("all-reduce", lambda x: lax.psum(x, "fsdp"), 2 * 3 / 4),
        ("all-gather", lambda x: lax.all_gather(x, "fsdp").sum(0), 3),
        ("reduce-scatter", lambda x: jnp.tile(lax.psum_scatter(x, "fsdp", tiled=True), (4, 1)), 3 / 4),
        ("all-to-all", lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True).reshape(x.shape), 3 / 4),
        ("collective-permute", lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 2)]), 1),
    ],
)
def test_collectives_in_a_scan_move_known_bytes(mesh, kind, operation, sent):
    def loop(x):
        return lax.scan(lambda x, _: (jnp.sin(operation(x)), None), x, length=6)[0]

    spec = P("fsdp", "tensor")
    found = analysed(over_shards(loop, mesh, spec, spec), ((64, 32), spec), mesh=mesh).cost.collectives
    assert found == {kind: cost.Collective(6, int(6 * sent * (16 * 16 * 4)), 0)}


def test_bytes_between_hosts_count_as_network(mesh):
    """Two hosts of four devices: over fsdp (4 devices, 2 on each host) half of a device's operand leaves its host."""
    spec = P("fsdp", "tensor")
    reduce = over_shards(lambda x: lax.psum(x, "fsdp"), mesh, spec, spec)
    text = jax.jit(reduce).lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text()
    found = cost.count_cost(hlo.parse_module(text), np.repeat([0, 1], 4)).collectives["all-reduce"]
    assert found == cost.Collective(1, 2 * 1024 * 3 // 4, 2 * 1024 // 2 // 2)


@pytest.mark.parametrize(
    "groups",
    ["[2,4]<=[4,2]T(1,0)", "{{0,2,4,6},{1,3,5,7}}", "mesh['a'=4,'b'=2] {'a'}"],
)
def test_every_way_to_write_groups(groups):
    instruction = hlo.Instruction("r", "all-reduce", (), (), "", f", replica_groups={groups}, to_apply=%add", False)
    np.testing.assert_array_equal(counting.device_groups(instruction, 8), [[0, 2, 4, 6], [1, 3, 5, 7]])


# Memory and traffic


def test_the_largest_arrays_are_found_by_name():
    def f(x, y):
        return jnp.sort(jnp.outer(x, y), 0)[0] + y

    found = analysed(f, ((512,), P()), ((1024,), P()))
    assert found.largest[0].bytes == 512 * 1024 * 4
    assert not found.largest[0].argument and "jit(f)" in found.largest[0].name
    assert {(h.shape, h.name) for h in found.largest if h.argument} >= {("f32[1024]", "y")}
    assert found.memory.temporaries >= 512 * 1024 * 4
    assert found.memory.fits and found.memory.free == CHIP.hbm - found.memory.needed


def test_donated_arguments_are_held_once():
    plain = analysed(lambda x: x + 1, ((1 << 16,), P())).memory
    donated = analysed(lambda x: x + 1, ((1 << 16,), P()), donate_argnums=0).memory
    assert plain.peak - donated.peak == donated.aliased == 4 << 16


def test_a_scan_reads_its_stack_once():
    x, stack = ((256,), P()), ((50, 256), P())
    once = analysed(lambda x: jnp.sin(x) + 1, x).cost.bytes
    assert once == 2 * 256 * 4
    scanned = analysed(lambda x, w: lax.scan(lambda x, w: (jnp.sin(x + w), None), x, w)[0], x, stack).cost.bytes
    assert 50 * 3 * 1024 <= scanned < 2 * 50 * 3 * 1024


TPU = """HloModule step, is_scheduled=true, num_partitions=4

%inner (a: bf16[4,8,16], b: bf16[4,16,32]) -> bf16[4,8,32] {
  %a = XX parameter(0)
  %b = WW parameter(1)
  ROOT %c = bf16[4,8,32]TT convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, \
dim_labels=0bf_0io->0bf, metadata={op_name="jit(step)/dot_general"}
}

%all-reduce-scatter (input: bf16[4,8,32]) -> bf16[1,8,32] {
  %input = bf16[4,8,32]TT parameter(0)
  %all-reduce = bf16[4,8,32]TT all-reduce(%input), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %cut = bf16[1,8,32]TT dynamic-slice(%all-reduce, %id, %zero, %zero), dynamic_slice_sizes={1,8,32}
}

%body (state: (s32[], bf16[4,8,16], bf16[4,16,32])) -> (s32[], bf16[4,8,16], bf16[4,16,32]) {
  %state = (II, XX, /*index=2*/WW) parameter(0)
  %i = II get-tuple-element(%state), index=0
  %x = XX get-tuple-element(%state), index=1
  %w = WW get-tuple-element(%state), index=2
  %product = bf16[4,8,32]TT fusion(%x, %w), kind=kOutput, calls=%inner
  %sum = bf16[1,8,32]TT fusion(%product), kind=kCustom, calls=%all-reduce-scatter
  %one = II constant(1)
  %next = II add(%i, %one)
  %again = II copy(%next)
  ROOT %out = (II, XX, WW) tuple(%again, %x, %w)
}

%condition (state.1: (s32[], bf16[4,8,16], bf16[4,16,32])) -> pred[] {
  %state.1 = (II, XX, WW) parameter(0)
  %i.1 = II get-tuple-element(%state.1), index=0
  %end = II constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (x: bf16[4,8,16], w: bf16[4,16,32]) -> bf16[4,16,32] {
  %x.1 = XX parameter(0)
  %w.1 = WW parameter(1), metadata={op_name="p[\\'w\\']"}
  %start = II constant(0)
  %first = (II, XX, WW) tuple(%start, %x.1, %w.1)
  %while = (II, XX, WW) while(%first), \
condition=%condition, body=%body
  ROOT %last = WW get-tuple-element(%while), index=2
}
"""
for short, long in (
    ("XX", "bf16[4,8,16]TTS(1)"),
    ("WW", "bf16[4,16,32]TT"),
    ("II", "s32[]{:T(128)}"),
    ("TTS(1)", "{2,1,0:T(8,128)(2,1)S(1)}"),
    ("TT", "{2,1,0:T(8,128)(2,1)}"),
):
    TPU = TPU.replace(short, long)


def test_programs_as_a_tpu_compiler_writes_them():
    """A batched product is a dilated convolution, a reduce-scatter is a fusion, a loop has no note of its length, tiles
    are 8 x 128, and an operand is in on-chip memory."""
    module = hlo.parse_module(TPU)
    found = cost.count_cost(module)
    assert found.flops == 6 * 2 * 4 * 8 * 16 * 32
    assert found.collectives == {"reduce-scatter": cost.Collective(6, 6 * 3 * 8 * 32 * 2, 0)}
    tile = 8 * 128 * 2
    assert found.bytes == 6 * (4 * 2 * tile + 4 * tile + 4 * tile + tile)  # w, product out and in, sum
    assert not found.loops
    assert str(cost.largest_buffers(module, 1)[0]) == "1 x bf16[4,16,32] 0.0 MiB p['w']"


PART = """
%partN (shardN: SS, roomN: WW, xN: XX) -> (XX, SS, WW) {
  %shardN = SS parameter(0)
  %roomN = WW parameter(1)
  %xN = XX parameter(2)
  %sineN = XX sine(%xN)
  %gatherN = WW all-gather(%shardN), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"N"}}
  ROOT %partsN = (XX, SS, WW) tuple(%sineN, %shardN, %gatherN)
}
"""
SPREAD = f"""HloModule step, is_scheduled=true, num_partitions=4
{PART.replace("N", "1")}{PART.replace("N", "2")}
ENTRY %main (shard: SS, room: WW, x: XX) -> WW {{
  %shard = SS parameter(0)
  %room = WW parameter(1)
  %x = XX parameter(2)
  %first = (XX, SS, WW) fusion(%shard, %room, %x), kind=kLoop, calls=%part1
  %y = XX get-tuple-element(%first), index=0
  %same = SS get-tuple-element(%first), index=1
  %half = WW get-tuple-element(%first), index=2
  %second = (XX, SS, WW) fusion(%same, %half, %y), kind=kLoop, calls=%part2
  ROOT %all = WW get-tuple-element(%second), index=2
}}
"""


def test_a_collective_spread_over_fusions_counts_once():
    """Each part takes the whole collective's arrays and returns them; the other things it computes are its own."""
    shapes = {"SS": "bf16[8,128]", "WW": "bf16[32,128]", "XX": "bf16[16,128]"}
    text = SPREAD
    for short, shape in shapes.items():
        text = text.replace(short, shape + "{1,0:T(8,128)(2,1)}")
    found = cost.count_cost(hlo.parse_module(text))
    shard, gathered, x = 2 * 8 * 128, 2 * 32 * 128, 2 * 16 * 128
    assert found.collectives == {"all-gather": cost.Collective(1, 3 * shard, 0)}
    assert found.bytes == shard + gathered + 2 * (x + x)


def test_the_roofline_divides_by_the_chip():
    moved = {"all-gather": cost.Collective(1, 900, 0), "all-reduce": cost.Collective(2, 300, 200)}
    chip = topology.Chip("test", 10**9, flops=1000.0, bandwidth=100.0, link=10.0, network=1.0)
    found = cost.roofline(cost.Cost(2000, 400, moved, {}, ()), chip)
    assert found == (2.0, 4.0, 200.0, 5.0)
    assert found.bound == "communication" and found.floor == 200.0
    assert cost.roofline(cost.Cost(8000, 400, {}, {}, ()), chip).bound == "compute"


# The compiler's refusal


def test_a_refusal_states_both_figures():
    brief = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.52G) exceeds "
        "available HBM (15.75G)."
    )
    found = cost.parse_refusal(RuntimeError(brief))
    assert found is not None and str(found) == "does not fit: needs 20.52 of 15.75 GiB a device"
    long = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.01G of 15.48G hbm. Exceeded hbm capacity "
        "by 8.53G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 8.00G\n"
        '     Operator: op_name="jit(f)/dot_general" source_file="x.py"\n     Shape: f32[2048,1048576]{1,0:T(8,128)}\n'
        "  2. Size: 512.00M\n     Shape: bf16[256]{0}\n"
    )
    found = cost.parse_refusal(RuntimeError(long))
    assert found is not None and (found.needed, found.limit) == (round(24.01 * 2**30), round(15.48 * 2**30))
    assert [(h.bytes, h.shape, h.name) for h in found.largest] == [
        (8 << 30, "f32[2048,1048576]", "jit(f)/dot_general"),
        (512 << 20, "bf16[256]", ""),
    ]
    assert cost.parse_refusal(RuntimeError("INTERNAL: something else")) is None


# Topologies


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:2x2", "unknown kind"),
        ("v5e", "write KIND:SHAPE"),
        ("v5e:0x2", "write KIND:SHAPE"),
        ("v5e:3x3", "not offered as 3x3; choose"),
        ("v5p:4x8x4", "multiples of 4"),
        ("v4:16x16x32", "at most 4096 chips"),
        ("h100:2x16", "at most 8 GPUs"),
    ],
)
def test_bad_topologies_are_refused_in_one_line(name, words):
    with pytest.raises(UserError, match=words) as caught:
        topology.compile_only_devices(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:8"])
def test_a_missing_compiler_is_named_with_its_package(name, monkeypatch):
    monkeypatch.setattr(topology, "_is_installed", lambda module: False)
    with pytest.raises(
        UserError, match=r"not installed; pip install ('alignjax\[plan\]'|jax-cuda12-plugin==[\d.]+ jax-)"
    ):
        topology.compile_only_devices(name)


def test_preparing_the_environment_keeps_what_is_set_and_can_be_repeated(monkeypatch):
    environ = {"TPU_MIN_LOG_LEVEL": "0", "XLA_FLAGS": "--xla_gpu_autotune_level=4"}
    monkeypatch.setattr(topology.os, "environ", environ)
    for _ in range(2):
        topology.prepare_environment(["v5e:2x4", "h100:2x8"])
    assert environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=false"
    assert environ["TPU_SKIP_MDS_QUERY"] == environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert environ["TPU_MIN_LOG_LEVEL"] == "0"


def test_meshes_keep_hosts_together():
    assert topology.arrange_devices(jax.devices()[::-1], (4, 2))[0, 1] is jax.devices()[1]
    with pytest.raises(UserError, match="does not make up 8 devices"):
        topology.arrange_devices(jax.devices(), (3, 2))


@LIBTPU
def test_a_program_for_a_tpu_that_this_machine_does_not_have():
    topology.prepare_environment(["v5e:2x2"])
    mesh = jax.sharding.Mesh(
        topology.arrange_devices(topology.compile_only_devices("v5e:2x2"), (2, 2)), ("fsdp", "tensor")
    )

    def chain(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(jnp.einsum("btd,bde->bte", x, w)), None), x, w)[0]

    shapes = ((8, 128, 256), P("fsdp")), ((3, 8, 256, 256), P(None, "fsdp", None, "tensor"))
    found = analysed(chain, *shapes, mesh=mesh)
    assert found.cost.flops == 3 * 2 * 4 * 128 * 256 * 128
    assert found.cost.collectives["all-gather"].calls >= 3 and not found.cost.loops
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        analysed(lambda x: jnp.sort(x, 0).sum(), ((1 << 17, 1 << 17), P("fsdp")), mesh=mesh)
    refused = cost.parse_refusal(caught.value)
    assert refused is not None and refused.limit == CHIP.hbm < refused.needed


# Prediction against measurement


def test_predicted_memory_is_what_the_process_takes(environment):
    """A training step of 290 MB: XLA's assignment against the peak of the resident set, in a new process."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to measure")
    # Freed arrays go back to the system at once.
    limits = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment() | limits, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, measured = json.loads(done.stdout)
    assert predicted > 250e6
    assert measured == pytest.approx(predicted, rel=0.15)


MEASURE = """
import json, re
from pathlib import Path
import jax, jax.numpy as jnp, optax
from alignjax.planning import cost, topology

def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

optimiser = optax.adam(1e-3)

def initial():
    params = jnp.full((4, 2048, 2048), 0.01)
    return params, optimiser.init(params), jnp.ones((64, 2048))

def step(params, state, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    gradient = jax.grad(lambda params: jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2))(params)
    updates, state = optimiser.update(gradient, state)
    return optax.apply_updates(params, updates), state

begin = jax.jit(initial).lower().compile()
compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(initial)).compile()
baseline = status("VmRSS")
arguments = jax.block_until_ready(begin())
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set
result = jax.block_until_ready(compiled(*arguments))
print(json.dumps([cost.read_memory(compiled, topology.CHIPS["v5e"]).needed, status("VmHWM") - baseline]))
"""
