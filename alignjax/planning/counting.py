"""What one instruction of a compiled program multiplies, reads, writes and exchanges: FLOPs and bytes of a device."""

from __future__ import annotations

import math
import re

import numpy as np

from alignjax.planning import hlo

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What neither reads nor writes: names for memory, and starts whose work is counted where they are done.
FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional|after-all|opt-barrier|add-dependency|"
    "partition-id|replica-id|async-(start|update|done)|(slice|copy|dynamic-slice)-start|.*-update"
)
NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")


def dot_flops(one: hlo.Instruction, here: hlo.Computation) -> int:
    """Two for each multiply-add of a dot, a convolution (what a TPU makes of dots) or a cuBLAS call; else 0."""
    if one.op == "convolution":
        return convolution_flops(one, here)
    contracted = re.search(r'"?lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)', one.attributes)
    if (one.op != "dot" and not (one.op == "custom-call" and '"__cublas' in one.attributes)) or not contracted:
        return 0
    left = here[one.operands[0]].shapes[0].dims
    return 2 * math.prod(one.shapes[0].dims) * math.prod(left[i] for i in hlo.integers(contracted[1]))


def convolution_flops(one: hlo.Instruction, here: hlo.Computation) -> int:
    """2 x batch x features out x features in x, per spatial dimension, the pairs of an output and a kernel place whose
    input is an element and not padding or a hole of dilation: a batched dot is a convolution made of such holes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None  # every convolution says which dimension is which
    left, kernel, out = labels.groups()
    inputs, weights, results = (here[one.operands[0]].shapes[0], here[one.operands[1]].shapes[0], one.shapes[0])
    written = re.search(r"window=\{([^}]*)\}", one.attributes)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", written[1] if written else ""))
    total = results.dims[out.index("b")] * results.dims[out.index("f")] * weights.dims[kernel.index("i")]
    for i in range(len(out) - 2):
        part = {key: value.split("x")[i] for key, value in window.items()}
        spread, gap = int(part.get("lhs_dilate", 1)), int(part.get("rhs_dilate", 1))
        low = int(part.get("pad", "0_0").split("_")[0])
        size = inputs.dims[left.index(str(i))]
        places = np.arange(results.dims[out.index(str(i))])[:, None] * int(part.get("stride", 1))
        at = places + np.arange(int(part.get("size", 1)))[None] * gap - low
        total *= int(((at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)).sum())
    return 2 * total


def traffic(module: hlo.Module, one: hlo.Instruction, where: str, tpu: bool) -> int:
    """Bytes of HBM that an instruction outside fusions reads and writes, scalars left out. Slices of a stack count as
    slices, and an operand as read once, however often a kernel reads it."""
    if FREE.fullmatch(one.op) or any(f'"{target}"' in one.attributes for target in NO_WORK):
        return 0
    here = module.computations[where]

    def slow(shape: hlo.Shape) -> bool:
        return bool(shape.dims) and (shape.space == 0 or (shape.space == 1 and not tpu))

    sources = [here[name].shapes for name in one.operands]
    if re.fullmatch("(copy|slice|dynamic-slice)-done", one.op):
        start = here[one.operands[0]]
        sides = (here[start.operands[0]].shapes[0], one.shapes[0])
        return sum(one.shapes[0].padded for side in sides if slow(side))
    if one.op == "fusion":
        (inside,) = one.called("calls")
        reads = [min(read(module, inside, i), size(s)) for i, s in enumerate(sources)]
        writes = written(module, inside, module.root(inside))
    else:
        reads, writes = [operand_bytes(one, i, s) for i, s in enumerate(sources)], result_bytes(one, here)
    total = sum(n for n, s in zip(reads, sources, strict=True) if all(map(slow, s)))
    if not one.op.endswith("-start"):
        total += sum(n for n, s in zip(writes, one.shapes, strict=True) if slow(s))
    return 0 if one.op.endswith("-done") and not writes else total


def size(of: tuple[hlo.Shape, ...]) -> int:
    return sum(shape.padded for shape in of)


def operand_bytes(one: hlo.Instruction, index: int, source: tuple[hlo.Shape, ...]) -> int:
    """What an instruction reads of an operand."""
    if one.op.endswith("-done") or (one.op == "dynamic-update-slice" and index == 0):
        return 0
    if one.op in ("dynamic-slice", "slice", "gather") and index == 0:
        return min(size(one.shapes), size(source))
    return size(source)


def result_bytes(one: hlo.Instruction, here: hlo.Computation) -> list[int]:
    if one.op == "dynamic-update-slice":
        return [size(here[one.operands[1]].shapes)]
    if one.op == "custom-call" and '"__cublas' in one.attributes:  # the second result is a workspace
        return [one.shapes[0].padded] + [0] * (len(one.shapes) - 1)
    return [shape.padded for shape in one.shapes]


def read(module: hlo.Module, where: str, index: int) -> int:
    """Bytes that a fusion reads of its operand: all of it, unless all that happens to it is slicing. What is handed on
    as it is is not read, and what a collective of several parts moves is counted once for all, see ``whole``."""
    here = module.computations[where]
    given = next(one for one in here.values() if one.op == "parameter" and int(one.text) == index)
    total, names = 0, [given.name]
    while names:
        name = names.pop()
        for one in here.values():
            for place in (i for i, operand in enumerate(one.operands) if operand == name):
                if one.op == "bitcast":
                    names.append(one.name)
                elif one.op == "fusion":
                    total += read(module, one.called("calls")[0], place)
                elif not (one.op == "tuple" or is_part(one)):
                    total += operand_bytes(one, place, given.shapes)
    return total


def written(module: hlo.Module, where: str, root: hlo.Instruction) -> list[int]:
    """Bytes that a fusion writes, result by result; an update in place writes the update."""
    here = module.computations[where]
    if root.op == "tuple":
        made = [here[name] for name in root.operands]  # a parameter is handed on where it lies
        return [n for one in made for n in ([0] if one.op == "parameter" else written(module, where, one))]
    if is_part(root):
        return [0] * len(root.shapes)
    if root.op == "bitcast":
        return written(module, where, here[root.operands[0]])
    if root.op == "fusion":
        (inside,) = root.called("calls")
        return written(module, inside, module.root(inside))
    return result_bytes(root, here)


def is_part(one: hlo.Instruction) -> bool:
    """Whether this is one of several fusions' part of a collective, as a TPU spreads it over them; the parts share a
    channel."""
    return one.op.removesuffix("-start") in COLLECTIVES and "async_collective_fusion" in one.attributes


def whole(one: hlo.Instruction, here: hlo.Computation) -> int:
    """Bytes of HBM that a collective of several parts reads and writes, all together."""
    sides = [here[name].shapes for name in one.operands] + [one.shapes]
    return sum(shape.padded for side in sides for shape in side if shape.dims and shape.space == 0)


def groups(one: hlo.Instruction, partitions: int) -> np.ndarray:
    """[groups, devices of a group]: which partitions take part together in a collective."""
    text = one.attributes
    if one.op.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return np.array(hlo.integers(pairs[1] if pairs else ""), np.int64).reshape(-1, 2)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        devices = np.arange(partitions).reshape(hlo.integers(found[2]))
        return devices.transpose(hlo.integers(found[3]) if found[3] else None).reshape(hlo.integers(found[1]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        mine = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[2])]
        order = [i for i in range(len(axes)) if i not in mine] + mine
        taking_part = math.prod(list(axes.values())[i] for i in mine)
        return np.arange(partitions).reshape(list(axes.values())).transpose(order).reshape(-1, taking_part)
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        rows = [hlo.integers(row) for row in re.findall(r"\{([^}]*)\}", found[1])]
        return np.array([row for row in rows if len(row) == len(rows[0])], np.int64)
    return np.arange(partitions)[None]
