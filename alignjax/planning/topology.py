"""Accelerators that are not here: their devices for compiling ahead of time, and what one of them can do."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from alignjax.errors import UserError

GIB = 2.0**30


class Chip(NamedTuple):
    """What one JAX device of a kind can do at most. Rates are a second; bytes are bytes, not GiB.

    ``hbm`` is what a program may use: for TPUs the limit that libtpu 0.0.42 states when it refuses a program,
    1 to 5% below the data sheet's capacity. ``link`` is what a device sends to its neighbours, one direction, all
    its links together: half of the "bidirectional ICI bandwidth per chip" and of the NVLink figure.
    ``network`` is the same between hosts, where the links do not reach; None where a slice has no such hop.
    """

    kind: str
    hbm: int  # bytes a program may use
    flops: float  # bfloat16 multiply-adds count two
    bandwidth: float  # HBM, bytes
    link: float  # bytes out of a device
    network: float | None = None  # bytes out of a device


# Google Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture":
# peak bf16, HBM bandwidth, bidirectional ICI bandwidth per chip. v4's page states the all-reduce bandwidth of a pod
# alone, 1.1 PB/s over 4096 chips; for v5e and v6e the same quotient is exactly the one-directional figure.
# A TPU7x chip is two JAX devices, so its figures are halved. H100 SXM: NVIDIA H100 data sheet, bf16 without
# sparsity, NVLink 900 GB/s both ways, and DGX H100's one 400 Gb/s adapter a GPU; 79.1 GiB is what CUDA leaves of 80 GB
# (JAX takes three quarters of it at start-up unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise).
CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1200e9, 1.1e15 / 4096),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9),
        Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 400e9),
        Chip("tpu7x", int(94.75 * GIB), 2307e12 / 2, 7380e9 / 2, 600e9 / 2),
        Chip("h100", int(79.1 * GIB), 989.4e12, 3350e9, 450e9, 50e9),
    )
}
PODS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips; three-dimensional tori
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e, as Google Cloud offers them
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # below a cube of 4x4x4; above, multiples of 4 in rising order


def split(topology: str) -> tuple[str, tuple[int, ...]]:
    """v5p:4x4x8 -> ("v5p", (4, 4, 8)). Raises UserError for unknown kinds and for shapes malformed or not offered."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology {topology!r}: unknown kind {kind!r}; choose one of {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"topology {topology!r}: write KIND:SHAPE, as v5e:4x4, v5p:4x4x8 or h100:2x8 (hosts x GPUs)")
    sizes = tuple(int(size) for size in shape.split("x"))
    if kind in PODS:
        cubes = all(size % 4 == 0 for size in sizes) and sizes == tuple(sorted(sizes))
        fits = shape in SMALL or (len(sizes) == 3 and cubes and math.prod(sizes) <= PODS[kind])
        offered = f"{', '.join(SMALL)} or AxBxC, A <= B <= C multiples of 4, at most {PODS[kind]} chips"
    elif kind == "h100":
        fits, offered = len(sizes) <= 2 and sizes[-1] <= 8, "GPUs or HOSTSxGPUs, at most 8 GPUs a host"
    else:
        fits, offered = shape in FLAT, ", ".join(FLAT)
    if not fits:
        raise UserError(f"topology {topology!r}: {kind} is not offered as {shape}; choose {offered}")
    return kind, sizes


def chip(topology: str) -> Chip:
    return CHIPS[split(topology)[0]]


def prepare_environment(topologies: Iterable[str]) -> None:
    """Sets what has to be set before JAX's backends start: arrays stay on the CPU, libtpu asks no metadata server, the
    CUDA compiler measures nothing. Variables that are set already are kept."""
    kinds = {split(topology)[0] for topology in topologies}
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: it keeps libtpu from a warning; the topology decides
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock keeps two processes from one TPU, and there is none
    }
    if "h100" in kinds:
        wanted |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        flags = os.environ.get("XLA_FLAGS", "")
        for flag in ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"):
            if flag.partition("=")[0] not in flags:
                flags += f" {flag}"
        os.environ["XLA_FLAGS"] = flags.strip()
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")


def devices(topology: str) -> list[jax.Device]:
    """Devices that programs can be compiled for and that nothing can run on. Call ``prepare_environment`` before.

    Raises UserError as ``split`` does, and when the compiler (libtpu, the CUDA plugin) is not installed.
    """
    kind, sizes = split(topology)
    needs = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13") if kind == "h100" else ("libtpu",)
    if not any(map(installed, needs)):
        what, words = "libtpu", "'alignjax[plan]'"
        if kind == "h100":  # without its extra's gigabytes of libraries, which compiling does not need
            what, words = (
                "JAX's CUDA plugin",
                f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}",
            )
        raise UserError(f"topology {topology!r} needs {what}, which is not installed; pip install {words}")
    try:
        if kind == "h100":
            hosts, gpus = (1, *sizes)[-2:]
            described = topologies.get_topology_desc(
                "gpu", platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=gpu_description()
            )
        else:
            extra: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
            if math.prod(sizes) == 1:
                extra["chips_per_host_bounds"] = [1, 1, 1]
            described = topologies.get_topology_desc(topology, platform="tpu", **extra)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology!r}: {reason}; choose another shape, or update jax and libtpu") from None
    return list(described.devices)


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def arrange(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """[*shape] devices, the last axes nearest: on a TPU along the torus, on GPUs within a host.

    Raises UserError when the sizes do not make up the devices.
    """
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh {'x'.join(map(str, shape))} does not make up {len(devices)} devices; change its sizes")
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    nearest = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.array(nearest, dtype=object).reshape(shape)


# H100 SXM5 in the fields of XLA's GpuDeviceInfoProto (xla/stream_executor/device_description.proto); values from
# NVIDIA's H100 architecture white paper and CUDA's table of compute capability 9.0.
H100 = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "device_memory_size": CHIPS["h100"].hbm,
    "memory_bandwidth": int(CHIPS["h100"].bandwidth),
    "l2_cache_size": 50 * 2**20,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_core": 228 * 2**10,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
}


def gpu_description() -> str:
    """An H100 for XLA's compiler, as a GpuTargetConfigProto in text form."""
    facts = " ".join(f"{name}: {value}" for name, value in H100.items())
    return (
        f"gpu_device_info {{ {facts} cuda_compute_capability {{ major: 9 minor: 0 }} }} "
        'platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" '
        "dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }"
    )
