"""What one instruction of a compiled program computes, reads, writes and sends: FLOPs and bytes of one device."""

from __future__ import annotations

import math
import re

import numpy as np

from alignjax.planning.hlo import Computation, Instruction, Module, Shape, parse_integers

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes of HBM: they rename memory, or start what another instruction finishes and counts.
NO_TRAFFIC = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional|after-all|opt-barrier|add-dependency|"
    "partition-id|replica-id|async-(start|update|done)|(slice|copy|dynamic-slice)-start|.*-update"
)
_NO_TRAFFIC_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")


# Arithmetic


def dot_flops(instruction: Instruction, computation: Computation) -> int:
    """Returns the FLOPs of a matrix product, 0 for any other instruction.

    A product of [m, k] and [k, n] takes 2 m n k: two for each multiply-add. Products are dots, calls of cuBLAS, and
    convolutions, which a TPU's compiler makes of dots.
    """
    if instruction.op == "convolution":
        return _convolution_flops(instruction, computation)
    contracted = re.search(r'"?lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)', instruction.attributes)
    if not contracted or not (instruction.op == "dot" or _is_cublas(instruction)):
        return 0
    left = computation[instruction.operands[0]].shapes[0].dims
    return 2 * math.prod(instruction.shapes[0].dims) * math.prod(left[i] for i in parse_integers(contracted[1]))


def _is_cublas(instruction: Instruction) -> bool:
    return instruction.op == "custom-call" and '"__cublas' in instruction.attributes


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """Returns 2 x batch x output features x input features x (per spatial dimension: ``_window_products``)."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None  # every convolution says which dimension is which
    left, kernel, out = labels.groups()
    inputs, weights = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    results = instruction.shapes[0].dims
    window_text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", window_text[1] if window_text else ""))
    total = results[out.index("b")] * results[out.index("f")] * weights[kernel.index("i")]
    for i in range(len(out) - 2):
        settings = {key: value.split("x")[i] for key, value in window.items()}
        total *= _window_products(inputs[left.index(str(i))], results[out.index(str(i))], settings)
    return 2 * total


def _window_products(input_size: int, output_size: int, settings: dict[str, str]) -> int:
    """Returns how many pairs (output position, kernel position) of one dimension read an element of the input.

    The other pairs read padding, or a hole that dilation makes between elements. A TPU's compiler writes a batched dot
    as a convolution with such holes.
    """
    dilation, kernel_dilation = int(settings.get("lhs_dilate", 1)), int(settings.get("rhs_dilate", 1))
    padding = int(settings.get("pad", "0_0").split("_")[0])
    outputs = np.arange(output_size)[:, None] * int(settings.get("stride", 1))
    positions = outputs + np.arange(int(settings.get("size", 1)))[None] * kernel_dilation - padding
    inside = (positions >= 0) & (positions < (input_size - 1) * dilation + 1)
    return int((inside & (positions % dilation == 0)).sum())


# Memory traffic


def hbm_bytes(module: Module, instruction: Instruction, name: str, tpu: bool) -> int:
    """Returns the bytes of HBM that an instruction outside fusions reads and writes.

    ``name`` is the instruction's computation; ``tpu`` says that memory space 1 is on-chip memory. Scalars count
    nothing. Reading or updating a slice counts the slice. An operand counts as read once, even where a kernel reads it
    several times.
    """
    if NO_TRAFFIC.fullmatch(instruction.op) or any(f'"{t}"' in instruction.attributes for t in _NO_TRAFFIC_TARGETS):
        return 0
    computation = module.computations[name]
    if re.fullmatch("(copy|slice|dynamic-slice)-done", instruction.op):
        return _finished_copy_bytes(instruction, computation, tpu)
    sources = [computation[operand].shapes for operand in instruction.operands]
    if instruction.op == "fusion":
        (inner,) = instruction.called("calls")
        reads = [min(_fusion_read_bytes(module, inner, i), _padded_bytes(s)) for i, s in enumerate(sources)]
        writes = _fusion_written_bytes(module, inner, module.root(inner))
    else:
        reads = [_operand_bytes(instruction, i, s) for i, s in enumerate(sources)]
        writes = _result_bytes(instruction, computation)
    if instruction.op.endswith("-done") and not writes:
        return 0
    total = sum(n for n, shapes in zip(reads, sources, strict=True) if all(_in_hbm(s, tpu) for s in shapes))
    if not instruction.op.endswith("-start"):
        total += sum(n for n, shape in zip(writes, instruction.shapes, strict=True) if _in_hbm(shape, tpu))
    return total


def _in_hbm(shape: Shape, tpu: bool) -> bool:
    """Returns whether an array that is no scalar lies in HBM."""
    return bool(shape.dims) and (shape.space == 0 or (shape.space == 1 and not tpu))


def _padded_bytes(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.padded_bytes for shape in shapes)


def _finished_copy_bytes(done: Instruction, computation: Computation, tpu: bool) -> int:
    """Returns the bytes that an asynchronous copy or slice reads and writes: its result's, once for each side in
    HBM."""
    start = computation[done.operands[0]]
    sides = (computation[start.operands[0]].shapes[0], done.shapes[0])
    return sum(done.shapes[0].padded_bytes for side in sides if _in_hbm(side, tpu))


def _operand_bytes(instruction: Instruction, index: int, shapes: tuple[Shape, ...]) -> int:
    """Returns the bytes that an instruction reads of its operand of that index, whose shapes are given."""
    if instruction.op.endswith("-done") or (instruction.op == "dynamic-update-slice" and index == 0):
        return 0
    if instruction.op in ("dynamic-slice", "slice", "gather") and index == 0:
        return min(_padded_bytes(instruction.shapes), _padded_bytes(shapes))
    return _padded_bytes(shapes)


def _result_bytes(instruction: Instruction, computation: Computation) -> list[int]:
    """Returns the bytes that an instruction writes, for each of its results."""
    if instruction.op == "dynamic-update-slice":
        return [_padded_bytes(computation[instruction.operands[1]].shapes)]
    if _is_cublas(instruction):  # the second result is a workspace
        return [instruction.shapes[0].padded_bytes] + [0] * (len(instruction.shapes) - 1)
    return [shape.padded_bytes for shape in instruction.shapes]


def _fusion_read_bytes(module: Module, name: str, index: int) -> int:
    """Returns the bytes that the fusion of computation ``name`` reads of its operand of that index.

    That is the whole operand for each instruction that uses it, except that a slice reads its own size. Putting the
    operand into the result reads nothing. Parts of a collective count nothing here, see ``collective_hbm_bytes``.
    """
    computation = module.computations[name]
    parameter = next(p for p in computation.values() if p.op == "parameter" and int(p.text) == index)
    total, aliases = 0, [parameter.name]
    while aliases:
        alias = aliases.pop()
        for user in computation.values():
            for position in (i for i, operand in enumerate(user.operands) if operand == alias):
                if user.op == "bitcast":
                    aliases.append(user.name)
                elif user.op == "fusion":
                    total += _fusion_read_bytes(module, user.called("calls")[0], position)
                elif not (user.op == "tuple" or is_collective_part(user)):
                    total += _operand_bytes(user, position, parameter.shapes)
    return total


def _fusion_written_bytes(module: Module, name: str, root: Instruction) -> list[int]:
    """Returns the bytes that a fusion writes, for each of its results. An update in place writes the update alone."""
    computation = module.computations[name]
    if root.op == "tuple":
        results = [computation[operand] for operand in root.operands]
        return [n for r in results for n in ([0] if r.op == "parameter" else _fusion_written_bytes(module, name, r))]
    if is_collective_part(root):
        return [0] * len(root.shapes)
    if root.op == "bitcast":
        return _fusion_written_bytes(module, name, computation[root.operands[0]])
    if root.op == "fusion":
        (inner,) = root.called("calls")
        return _fusion_written_bytes(module, inner, module.root(inner))
    return _result_bytes(root, computation)


# Communication


def is_collective_part(instruction: Instruction) -> bool:
    """Returns whether the instruction is a part of a collective that a TPU's compiler has spread over several fusions.
    The parts share a channel."""
    is_collective = instruction.op.removesuffix("-start") in COLLECTIVES
    return is_collective and "async_collective_fusion" in instruction.attributes


def collective_hbm_bytes(instruction: Instruction, computation: Computation) -> int:
    """Returns the bytes of HBM that all parts of a collective read and write together; ``instruction`` is any part."""
    sides = [computation[operand].shapes for operand in instruction.operands] + [instruction.shapes]
    return sum(shape.padded_bytes for side in sides for shape in side if shape.dims and shape.space == 0)


def bytes_sent(
    module: Module, kind: str, instruction: Instruction, computation: Computation, hosts: np.ndarray | None
) -> tuple[int, int]:
    """Returns (bytes that a device sends in one collective, those of them that cross the network between hosts).

    With n devices in a group and B bytes of operand on each, the best algorithm for a ring or torus sends

        all-gather (n-1) B, reduce-scatter and all-to-all (n-1)/n B, all-reduce 2 (n-1)/n B, permutation B.

    Over the network, h hosts with n/h devices each: devices first exchange within their host, then each device sends
    its share to the other hosts. ``hosts`` [devices] is each device's host; None where no network joins them.
    """
    operand = sum(shape.bytes for name in instruction.operands for shape in computation[name].shapes)
    groups = device_groups(instruction, module.partitions)
    if kind == "collective-permute":
        moving = groups[groups[:, 0] != groups[:, 1]]
        crosses = hosts is not None and (hosts[moving[:, 0]] != hosts[moving[:, 1]]).any()
        return (operand if len(moving) else 0), (operand if crosses else 0)
    n = groups.shape[1]
    host_count = 1 if hosts is None else max(len(set(hosts[row])) for row in groups)
    total = {"all-gather": n * operand, "all-reduce": 2 * operand}.get(kind, operand)
    sharers = 1 if kind == "all-to-all" else n // host_count  # devices of a host that share its traffic
    return total * (n - 1) // n, total * (host_count - 1) // (host_count * sharers)


def device_groups(instruction: Instruction, partitions: int) -> np.ndarray:
    """Returns [groups, n] int: the devices that take part in a collective together. For a permutation, [pairs, 2] of
    source and target. XLA writes groups in four ways; without any, all devices are one group."""
    text = instruction.attributes
    if instruction.op.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return np.array(parse_integers(pairs[1] if pairs else ""), np.int64).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        devices = np.arange(partitions).reshape(parse_integers(iota[2]))
        return devices.transpose(parse_integers(iota[3]) if iota[3] else None).reshape(parse_integers(iota[1]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        return _mesh_groups(mesh[1], mesh[2], partitions)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        rows = [parse_integers(row) for row in re.findall(r"\{([^}]*)\}", listed[1])]
        return np.array([row for row in rows if len(row) == len(rows[0])], np.int64)
    return np.arange(partitions)[None]


def _mesh_groups(mesh: str, names: str, partitions: int) -> np.ndarray:
    """Returns the groups along the named axes of a mesh, as "'a'=4,'b'=2" and "'a'"."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    sizes, along = list(axes.values()), [list(axes).index(name) for name in re.findall(r"'(\w+)'", names)]
    order = [i for i in range(len(axes)) if i not in along] + along
    return np.arange(partitions).reshape(sizes).transpose(order).reshape(-1, math.prod(sizes[i] for i in along))
