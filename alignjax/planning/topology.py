"""Accelerators that this machine does not have: their devices, for compiling ahead of time, and their limits."""

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

GIB = 2.0**30  # bytes


class Chip(NamedTuple):
    """The limits of one JAX device of a kind."""

    kind: str
    hbm: int  # bytes a program may use; for TPUs what libtpu 0.0.42 allows, 1 to 5% below the data sheet's capacity
    flops: float  # bfloat16 FLOPs a second, two for each multiply-add
    bandwidth: float  # HBM bytes a second
    # Bytes a second that a device sends to its neighbours over all its links, in one direction. That is half of the
    # "bidirectional ICI bandwidth per chip", and half of the NVLink figure.
    link: float
    network: float | None = None  # bytes a second to hosts that the links do not reach; None where they reach all


# Google Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture":
# peak bf16, HBM bandwidth, bidirectional ICI bandwidth per chip. v4's page states the all-reduce bandwidth of a pod
# alone, 1.1 PB/s over 4096 chips; for v5e and v6e the same quotient is exactly the one-directional figure.
# A TPU7x chip is two JAX devices, so its figures are halved. H100 SXM: NVIDIA H100 data sheet, bf16 without
# sparsity, NVLink 900 GB/s both ways, and DGX H100's one 400 Gb/s adapter a GPU. CUDA leaves 79.1 GiB of 80 GB to
# programs (JAX takes three quarters of it at start-up unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise).
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
_PODS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # the most chips of the kinds whose links form a 3D torus
_FLAT_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e, as Google Cloud offers them
_SUBCUBE_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # below 4x4x4; above it, ascending multiples of 4


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """Returns kind and sizes: those of "v5p:4x4x8" are ("v5p", (4, 4, 8)).

    Raises UserError when the kind is unknown, or when the shape is malformed or not offered.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology {topology!r}: unknown kind {kind!r}; choose one of {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"topology {topology!r}: write KIND:SHAPE, as v5e:4x4, v5p:4x4x8 or h100:2x8 (hosts x GPUs)")
    sizes = tuple(int(size) for size in shape.split("x"))
    if kind in _PODS:
        cubes = all(size % 4 == 0 for size in sizes) and sizes == tuple(sorted(sizes))
        fits = shape in _SUBCUBE_SHAPES or (len(sizes) == 3 and cubes and math.prod(sizes) <= _PODS[kind])
        offered = f"{', '.join(_SUBCUBE_SHAPES)} or AxBxC, A <= B <= C multiples of 4, at most {_PODS[kind]} chips"
    elif kind == "h100":
        fits, offered = len(sizes) <= 2 and sizes[-1] <= 8, "GPUs or HOSTSxGPUs, at most 8 GPUs a host"
    else:
        fits, offered = shape in _FLAT_SHAPES, ", ".join(_FLAT_SHAPES)
    if not fits:
        raise UserError(f"topology {topology!r}: {kind} is not offered as {shape}; choose {offered}")
    return kind, sizes


def chip_of(topology: str) -> Chip:
    """Returns the limits of the topology's devices. Raises UserError as ``parse_topology`` does."""
    return CHIPS[parse_topology(topology)[0]]


_TPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any value avoids a warning of libtpu's; the topology decides
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock keeps two processes from using one TPU, and none is used
}
_GPU_VARIABLES = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
_GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")


def prepare_environment(topologies: Iterable[str]) -> None:
    """Sets the environment variables for compiling; call it before JAX's backends start.

    Arrays stay on the CPU, libtpu asks no metadata server, and the CUDA compiler measures no kernels. Variables and
    flags that are already set are kept. Raises UserError as ``parse_topology`` does.
    """
    kinds = {parse_topology(topology)[0] for topology in topologies}
    variables = dict(_TPU_VARIABLES)
    if "h100" in kinds:
        variables |= _GPU_VARIABLES
        flags = os.environ.get("XLA_FLAGS", "")
        for flag in _GPU_FLAGS:
            if flag.partition("=")[0] not in flags:
                flags += f" {flag}"
        os.environ["XLA_FLAGS"] = flags.strip()
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # JAX defines it at run time
        jax.config.update("jax_platforms", "cpu")


def compile_only_devices(topology: str) -> list[jax.Device]:
    """Returns the topology's devices. Programs can be compiled for them and cannot run on them.

    Call ``prepare_environment`` before. Raises UserError as ``parse_topology`` does, and when the compiler (libtpu, or
    JAX's CUDA plugin) is not installed or does not know the topology.
    """
    kind, sizes = parse_topology(topology)
    _check_compiler(topology, kind)
    try:
        return list(_describe(topology, kind, sizes).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology!r}: {reason}; choose another shape, or update jax and libtpu") from None


def _describe(topology: str, kind: str, sizes: tuple[int, ...]) -> Any:
    """Returns JAX's description of the topology."""
    if kind == "h100":
        hosts, gpus = (1, *sizes)[-2:]
        return topologies.get_topology_desc(
            "gpu", platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=_gpu_description()
        )
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return topologies.get_topology_desc(topology, platform="tpu", **options)


def _check_compiler(topology: str, kind: str) -> None:
    if kind == "h100":  # the plugin alone: the extra "gpu" has gigabytes of libraries that compiling does not need
        modules, product = ["jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"], "JAX's CUDA plugin"
        packages = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    else:
        modules, product, packages = ["libtpu"], "libtpu", "'alignjax[plan]'"
    if not any(map(_is_installed, modules)):
        raise UserError(f"topology {topology!r} needs {product}, which is not installed; pip install {packages}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def arrange_devices(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """Returns the devices as an array of that shape. Devices that differ in the last axes alone are nearest to each
    other: on TPUs along the torus, on GPUs within a host.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh {'x'.join(map(str, shape))} does not make up {len(devices)} devices; change its sizes")
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.array(ordered, dtype=object).reshape(shape)


# H100 SXM5 in the fields of XLA's GpuDeviceInfoProto (xla/stream_executor/device_description.proto); values from
# NVIDIA's H100 architecture white paper and CUDA's table of compute capability 9.0.
_H100 = {
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


def _gpu_description() -> str:
    """Returns the description of an H100 for XLA's compiler: a GpuTargetConfigProto in text form."""
    facts = " ".join(f"{name}: {value}" for name, value in _H100.items())
    return (
        f"gpu_device_info {{ {facts} cuda_compute_capability {{ major: 9 minor: 0 }} }} "
        'platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" '
        "dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }"
    )
