"""What a compiled program takes of each device: memory, arithmetic, traffic, and the time they allow at best."""

from __future__ import annotations

import collections
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from alignjax.planning import counting, hlo
from alignjax.planning.topology import GIB, Chip


class Held(NamedTuple):
    """Arrays that a program keeps in HBM, of one shape and origin. Not all of them are alive at one time."""

    bytes: int  # of one of them, padding included
    number: int
    shape: str
    name: str  # an argument's path, or where in the Python program the array is made
    argument: bool

    def __str__(self) -> str:
        return f"{self.number} x {self.shape} {self.bytes / 2**20:.1f} MiB {self.name}"


class Memory(NamedTuple):
    """Bytes of one device's HBM."""

    arguments: int
    outputs: int
    aliased: int  # outputs that lie where donated arguments lay
    temporaries: int  # 0 where all of them fit into a TPU's on-chip memory
    code: int
    peak: int  # the most at one time, code left out: an upper bound
    stated: int  # the same as XLA states it, 0 where it does not
    limit: int  # what a program may use

    @property
    def needed(self) -> int:
        return self.peak + self.code

    def beside(self, more: int) -> Memory:
        """With so many bytes that live beside the program, counted among its arguments."""
        stated = self.stated and self.stated + more
        return self._replace(arguments=self.arguments + more, peak=self.peak + more, stated=stated)

    @property
    def free(self) -> int:
        """What is left; negative by how much it does not fit."""
        return self.limit - self.needed

    @property
    def fits(self) -> bool:
        return self.free >= 0


class Collective(NamedTuple):
    """All collectives of one kind. Bytes are what a device sends, by the best algorithm for a ring or a torus."""

    calls: int
    bytes: int
    network: int  # of a device's bytes, those between hosts that its links do not join


class Cost(NamedTuple):
    """One execution of the program on one device."""

    flops: int  # of matrix products, multiply-adds counted as two; elementwise arithmetic is left out
    bytes: int  # read from and written to HBM
    collectives: dict[str, Collective]
    loops: dict[str, str]  # loops without a fixed length: "at most N", counted N times; "unknown", counted once
    uncounted: tuple[str, ...]  # kernels whose arithmetic cannot be seen


class Analysis(NamedTuple):
    memory: Memory
    cost: Cost
    largest: tuple[Held, ...]


class Roofline(NamedTuple):
    """Seconds that one execution takes at least, were each the only limit; all overlapped, the largest is the floor."""

    compute: float  # at the bfloat16 peak
    memory: float
    communication: float
    intensity: float  # FLOPs a byte of HBM traffic

    @property
    def floor(self) -> float:
        return max(self.compute, self.memory, self.communication)

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "communication"), key=lambda name: getattr(self, name))


class Refusal(NamedTuple):
    """A program that the compiler refuses because it does not fit."""

    needed: int  # bytes of a device
    limit: int
    largest: tuple[Held, ...]  # where the compiler lists them; libtpu 0.0.42 does not

    def __str__(self) -> str:
        return f"does not fit: needs {self.needed / GIB:.2f} of {self.limit / GIB:.2f} GiB a device"


def analyse(compiled: jax.stages.Compiled, chip: Chip, mesh: jax.sharding.Mesh | None = None, top: int = 8) -> Analysis:
    """Reads a program compiled for the chip. With the mesh, and a chip that has a network, collectives that join
    hosts count towards it. Costs are exact up to what ``Cost`` names; see ``counting`` for how."""
    module = hlo.parse(compiled.as_text() or "")
    hosts = np.array([device.process_index for device in mesh.devices.flat]) if mesh and chip.network else None
    return Analysis(memory(compiled, chip), cost(module, hosts), largest(module, top))


def memory(compiled: jax.stages.Compiled, chip: Chip) -> Memory:
    """From XLA's buffer assignment. The peak is arguments + outputs - aliased + temporaries, or what XLA states where
    that is more: the temporaries are one block, which the peak that XLA states for CPUs leaves out. On TPUs XLA has
    stated up to a fifth less; there the compiler that accepts a program has found room for it."""
    stats: Any = compiled.memory_analysis()
    arguments, outputs, aliased, temporaries, code = (
        int(getattr(stats, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    )
    stated = int(getattr(stats, "peak_memory_in_bytes", 0))
    peak = max(arguments + outputs - aliased + temporaries, stated)
    return Memory(arguments, outputs, aliased, temporaries, code, peak, stated, chip.hbm)


def on_tpu(module: hlo.Module) -> bool:
    """Whether arrays lie in tiles, and memory space 1 is on the chip."""
    return any(s.tile for one in module.computations[module.entry].values() for s in one.shapes)


def cost(module: hlo.Module, hosts: np.ndarray | None = None) -> Cost:
    """``hosts`` [partitions]: each partition's host, where hosts are joined by a network."""
    loops: dict[str, str] = {}
    flops = moved = 0
    sums: dict[str, Collective] = {}
    kernels, tpu, seen = collections.Counter[str](), on_tpu(module), set()
    for one, where, times, fused in hlo.executed(module, loops):
        flops += times * counting.dot_flops(one, module.computations[where])
        if not fused:
            moved += times * counting.traffic(module, one, where, tpu)
        if found := re.search(
            r'custom_call_target="([^"]*(?:tpu_custom_call|cudnn|triton|mosaic)[^"]*)"', one.attributes
        ):
            kernels[found[1]] += times
        kind = one.op.removesuffix("-start")
        if kind in counting.COLLECTIVES:
            part = re.search(r"channel_id=(\d+)", one.attributes) if fused and counting.is_part(one) else None
            if part and part[1] in seen:
                continue
            if part:
                seen.add(part[1])
                moved += times * counting.whole(one, module.computations[where])
            kind = "reduce-scatter" if fused and "all-reduce-scatter" in where else kind
            sent, network = sends(module, kind, one, where, hosts)
            old = sums.get(kind, Collective(0, 0, 0))
            sums[kind] = Collective(old.calls + times, old.bytes + times * sent, old.network + times * network)
    return Cost(flops, moved, sums, loops, tuple(f"{times} x {name}" for name, times in kernels.items()))


def sends(module: hlo.Module, kind: str, one: hlo.Instruction, where: str, hosts: np.ndarray | None) -> tuple[int, int]:
    """(bytes a device sends in one collective, those of them over the network).

    With n devices in a group and B bytes of operand: all-gather (n-1)B, reduce-scatter and all-to-all (n-1)/n B,
    all-reduce 2(n-1)/n B, a permutation B. Over the network, h hosts with n/h devices each: first within each host,
    then between hosts, every device with its share.
    """
    here = module.computations[where]
    operand = sum(shape.bytes for name in one.operands for shape in here[name].shapes)
    together = counting.groups(one, module.partitions)
    if kind == "collective-permute":
        moving = together[together[:, 0] != together[:, 1]]
        crossing = hosts is not None and (hosts[moving[:, 0]] != hosts[moving[:, 1]]).any()
        return (operand if len(moving) else 0), (operand if crossing else 0)
    n = together.shape[1]
    joined = 1 if hosts is None else max(len(set(hosts[row])) for row in together)
    inside = n // joined
    whole = {"all-gather": n * operand, "all-reduce": 2 * operand}.get(kind, operand)
    share = 1 if kind == "all-to-all" else inside
    return whole * (n - 1) // n, whole * (joined - 1) // (joined * share)


def largest(module: hlo.Module, top: int) -> tuple[Held, ...]:
    """The arguments and results that take most of the HBM, equal ones together."""
    tpu = on_tpu(module)
    found: collections.Counter[tuple[int, str, str, bool]] = collections.Counter()
    seen = set()
    for one, where, _, fused in hlo.executed(module):
        argument = one.op == "parameter" and where == module.entry
        made = argument or (not counting.FREE.fullmatch(one.op) and not one.op.endswith("-done"))
        if fused or not made or (where, one.name) in seen or in_place(module, one):
            continue
        seen.add((where, one.name))
        results = one.shapes[1:2] if one.op.endswith("-start") and len(one.shapes) > 1 else one.shapes
        for shape in results:
            if shape.space == 0 or not tpu:
                found[shape.padded, str(shape), origin(module, one), argument] += 1
    held = [Held(size, n, shape, name, argument) for (size, shape, name, argument), n in found.items()]
    return tuple(sorted(held, key=lambda h: (-h.bytes * h.number, h.name))[:top])


def origin(module: hlo.Module, one: hlo.Instruction) -> str:
    """Where an array is made; of a fusion without a name, what it computes last that has one."""
    inside = module.computations[one.called("calls")[0]].values() if one.op == "fusion" else ()
    return next((i.op_name for i in (one, *reversed(list(inside))) if i.op_name), one.name)


def in_place(module: hlo.Module, one: hlo.Instruction) -> bool:
    """Whether it updates a part of its operand where that lies, and makes no array."""
    if one.op == "fusion":
        return in_place(module, module.root(one.called("calls")[0]))
    return one.op == "dynamic-update-slice"


def roofline(cost: Cost, chip: Chip) -> Roofline:
    """The bounds of one execution. Links and network are taken to work at the same time."""
    sent = sum(one.bytes - one.network for one in cost.collectives.values())
    network = sum(one.network for one in cost.collectives.values())
    return Roofline(
        compute=cost.flops / chip.flops,
        memory=cost.bytes / chip.bandwidth,
        communication=max(sent / chip.link, network / chip.network if chip.network else 0.0),
        intensity=cost.flops / cost.bytes if cost.bytes else float("inf"),
    )


UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FIGURE = r"([\d.]+)([KMGT]?)i?B?"


def refusal(error: Exception) -> Refusal | None:
    """What a compiler's RESOURCE_EXHAUSTED says of a program; None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    two = re.search(rf"Used {FIGURE} of {FIGURE} hbm", text) or re.search(
        rf"required[^(]*\({FIGURE}\) exceeds available HBM \({FIGURE}\)", text
    )
    if two is None:
        return None
    listed = re.findall(
        rf'Size: {FIGURE}\s(?:\s*Operator: (?:op_type="[^"]*" )?op_name="([^"]*)"[^\n]*\n)?\s*Shape: (\w+\[[\d,]*\])',
        text,
    )
    arrays = tuple(Held(scaled(n, unit), 1, shape, name, False) for n, unit, name, shape in listed)
    return Refusal(scaled(two[1], two[2]), scaled(two[3], two[4]), arrays)


def scaled(figure: str, unit: str) -> int:
    return round(float(figure) * UNITS[unit])
