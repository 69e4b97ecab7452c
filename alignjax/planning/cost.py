"""What a compiled program needs of each device: memory, arithmetic, traffic, and the least time that these allow."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignjax.planning import counting, hlo
from alignjax.planning.loops import Executed, executed_instructions, inexact_loops
from alignjax.planning.topology import GIB, Chip


class Buffers(NamedTuple):
    """Arrays of the same shape and origin that a program keeps in HBM. They need not all be alive at one time."""

    bytes: int  # of one array, with padding
    number: int  # of arrays
    shape: str
    name: str  # an argument's path, or the place in the Python program that makes the array
    argument: bool

    def __str__(self) -> str:
        """Returns one line: number, shape, MiB of one array, name."""
        return f"{self.number} x {self.shape} {self.bytes / 2**20:.1f} MiB {self.name}"


class Memory(NamedTuple):
    """Bytes of one device's HBM."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the memory of donated arguments
    temporaries: int  # 0 where all of them fit into a TPU's on-chip memory
    code: int
    peak: int  # an upper bound of the bytes in use at one time, without the code
    stated: int  # the same as XLA states it; 0 where XLA does not
    limit: int  # what a program may use

    @property
    def needed(self) -> int:
        """Bytes that the program needs."""
        return self.peak + self.code

    @property
    def free(self) -> int:
        """Bytes that are left; negative when the program does not fit."""
        return self.limit - self.needed

    @property
    def fits(self) -> bool:
        """Whether the program fits into the device."""
        return self.free >= 0

    def with_resident(self, extra: int) -> Memory:
        """Returns the memory with ``extra`` bytes of other arrays that stay on the device, added to the arguments."""
        stated = self.stated and self.stated + extra
        return self._replace(arguments=self.arguments + extra, peak=self.peak + extra, stated=stated)


class Collective(NamedTuple):
    """All collectives of one kind in a program. Bytes are what one device sends, see ``counting.bytes_sent``."""

    calls: int
    bytes: int
    network: int  # those of the bytes that cross the network between hosts


class Cost(NamedTuple):
    """One execution of a program on one device."""

    flops: int  # of matrix products, two for each multiply-add; elementwise arithmetic is not counted
    bytes: int  # read from HBM and written to it
    collectives: dict[str, Collective]  # by kind, as "all-gather"
    loops: dict[str, str]  # loops without a fixed length, see ``loops.inexact_loops``
    uncounted: tuple[str, ...]  # kernels whose arithmetic the program's text does not show


class Analysis(NamedTuple):
    """What ``analyse`` finds in a compiled program."""

    memory: Memory
    cost: Cost
    largest: tuple[Buffers, ...]


class Roofline(NamedTuple):
    """The least seconds of one execution, if each resource were the only limit. If all work at the same time, the
    largest of them is the least time."""

    compute: float  # seconds at the bfloat16 peak
    memory: float
    communication: float
    intensity: float  # FLOPs per byte of HBM traffic

    @property
    def floor(self) -> float:
        """The least seconds of one execution."""
        return max(self.compute, self.memory, self.communication)

    @property
    def bound(self) -> str:
        """The resource that limits the execution: "compute", "memory" or "communication"."""
        seconds = {"compute": self.compute, "memory": self.memory, "communication": self.communication}
        return max(seconds, key=lambda name: seconds[name])


class Refusal(NamedTuple):
    """Why the compiler refuses a program: it does not fit into a device."""

    needed: int  # bytes of one device
    limit: int  # bytes of one device
    largest: tuple[Buffers, ...]  # where the compiler lists them; libtpu 0.0.42 does not

    def __str__(self) -> str:
        """Returns one line with both figures in GiB."""
        return f"does not fit: needs {self.needed / GIB:.2f} of {self.limit / GIB:.2f} GiB a device"


def analyse(compiled: jax.stages.Compiled, chip: Chip, mesh: jax.sharding.Mesh | None = None, top: int = 8) -> Analysis:
    """Returns memory, cost and the ``top`` largest buffers of a program that was compiled for the chip.

    With the mesh, and a chip that has a network, the bytes that cross hosts are counted. Counts are exact, except for
    what ``Cost`` names.
    """
    module = hlo.parse_module(compiled.as_text() or "")
    hosts = np.array([device.process_index for device in mesh.devices.flat]) if mesh and chip.network else None
    return Analysis(read_memory(compiled, chip), count_cost(module, hosts), largest_buffers(module, top))


def read_memory(compiled: jax.stages.Compiled, chip: Chip) -> Memory:
    """Returns the memory that XLA's buffer assignment gives the program.

    The peak is arguments + outputs - aliased + temporaries, or what XLA states where that is more. For CPUs the peak
    that XLA states leaves out the temporaries, which are one block. For TPUs XLA has stated up to a fifth less than
    the sum; there a program that the compiler accepts fits.
    """
    stats = compiled.memory_analysis()
    assert stats is not None  # every backend that is planned for gives them
    arguments, outputs = int(stats.argument_size_in_bytes), int(stats.output_size_in_bytes)
    aliased, temporaries = int(stats.alias_size_in_bytes), int(stats.temp_size_in_bytes)
    code, stated = int(stats.generated_code_size_in_bytes), int(stats.peak_memory_in_bytes)
    peak = max(arguments + outputs - aliased + temporaries, stated)
    return Memory(arguments, outputs, aliased, temporaries, code, peak, stated, chip.hbm)


def count_cost(module: hlo.Module, hosts: np.ndarray | None = None) -> Cost:
    """Returns the cost of one execution. ``hosts`` [devices] is each device's host, where a network joins hosts."""
    tpu, executed = _is_for_tpu(module), list(executed_instructions(module))
    collective_calls = list(_collective_calls(executed))
    flops = traffic = 0
    for instruction, name, times, fused in executed:
        flops += times * counting.dot_flops(instruction, module.computations[name])
        traffic += 0 if fused else times * counting.hbm_bytes(module, instruction, name, tpu)
    for call in collective_calls:
        if _part_channel(call):
            part_of = module.computations[call.computation]
            traffic += call.times * counting.collective_hbm_bytes(call.instruction, part_of)
    collectives = _sum_collectives(module, collective_calls, hosts)
    return Cost(flops, traffic, collectives, inexact_loops(module), _uncounted_kernels(executed))


def _is_for_tpu(module: hlo.Module) -> bool:
    """Returns whether arrays have tiles, and so memory space 1 is on the chip."""
    entry = module.computations[module.entry].values()
    return any(shape.tile for instruction in entry for shape in instruction.shapes)


def _uncounted_kernels(executed: Iterable[Executed]) -> tuple[str, ...]:
    """Returns the custom kernels that run, as "3 x tpu_custom_call"."""
    kernels: collections.Counter[str] = collections.Counter()
    pattern = re.compile(r'custom_call_target="([^"]*(?:tpu_custom_call|cudnn|triton|mosaic)[^"]*)"')
    for instruction, _, times, _ in executed:
        if match := pattern.search(instruction.attributes):
            kernels[match[1]] += times
    return tuple(f"{times} x {name}" for name, times in kernels.items())


def _part_channel(call: Executed) -> str | None:
    """Returns the channel of a collective that is spread over several fusions, None for any other."""
    if not (call.fused and counting.is_collective_part(call.instruction)):
        return None
    channel = re.search(r"channel_id=(\d+)", call.instruction.attributes)
    return channel[1] if channel else None


def _collective_calls(executed: Iterable[Executed]) -> Iterator[Executed]:
    """Yields the collectives; of one that is spread over several fusions, the first part alone."""
    channels: set[str] = set()
    for step in executed:
        if step.instruction.op.removesuffix("-start") in counting.COLLECTIVES:
            channel = _part_channel(step)
            if channel not in channels:
                yield step
            channels |= {channel} if channel else set()


def _sum_collectives(module: hlo.Module, calls: Iterable[Executed], hosts: np.ndarray | None) -> dict[str, Collective]:
    sums: dict[str, Collective] = {}
    for instruction, name, times, fused in calls:
        is_scatter = fused and "all-reduce-scatter" in name  # a TPU's compiler writes it as a fusion of that name
        kind = "reduce-scatter" if is_scatter else instruction.op.removesuffix("-start")
        sent, network = counting.bytes_sent(module, kind, instruction, module.computations[name], hosts)
        total = sums.get(kind, Collective(0, 0, 0))
        sums[kind] = Collective(total.calls + times, total.bytes + times * sent, total.network + times * network)
    return sums


def largest_buffers(module: hlo.Module, top: int) -> tuple[Buffers, ...]:
    """Returns the ``top`` groups of equal arguments and results that take most of the HBM."""
    tpu = _is_for_tpu(module)
    numbers: collections.Counter[tuple[int, str, str, bool]] = collections.Counter()
    first_runs = {(step.computation, step.instruction.name): step for step in _allocating(module)}
    for instruction, _, _, _ in first_runs.values():
        argument = instruction.op == "parameter"
        for shape in _new_arrays(instruction):
            if shape.space == 0 or not tpu:
                numbers[shape.padded_bytes, str(shape), _origin(module, instruction), argument] += 1
    groups = [Buffers(size, n, shape, name, argument) for (size, shape, name, argument), n in numbers.items()]
    return tuple(sorted(groups, key=lambda group: (-group.bytes * group.number, group.name))[:top])


def _allocating(module: hlo.Module) -> Iterator[Executed]:
    """Yields the program's arguments and the instructions whose results need memory of their own."""
    for step in executed_instructions(module):
        op = step.instruction.op
        is_argument = op == "parameter" and step.computation == module.entry
        is_result = not (counting.NO_TRAFFIC.fullmatch(op) or op.endswith("-done"))
        if not step.fused and (is_argument or is_result) and not _updates_in_place(module, step.instruction):
            yield step


def _new_arrays(instruction: hlo.Instruction) -> Sequence[hlo.Shape]:
    """Returns the shapes that an instruction allocates. The result of a start lists its operand before its result."""
    starts = instruction.op.endswith("-start") and len(instruction.shapes) > 1
    return instruction.shapes[1:2] if starts else instruction.shapes


def _origin(module: hlo.Module, instruction: hlo.Instruction) -> str:
    """Returns the place in the Python program that makes an array; for a fusion without one, the last place inside."""
    is_fusion = instruction.op == "fusion"
    inner = list(module.computations[instruction.called("calls")[0]].values()) if is_fusion else []
    return next((i.op_name for i in (instruction, *reversed(inner)) if i.op_name), instruction.name)


def _updates_in_place(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    """Returns whether an instruction updates a part of its operand, and so allocates nothing."""
    if instruction.op == "fusion":
        return _updates_in_place(module, module.root(instruction.called("calls")[0]))
    return instruction.op == "dynamic-update-slice"


def roofline(cost: Cost, chip: Chip) -> Roofline:
    """Returns the least seconds of one execution: FLOPs, HBM bytes and bytes sent, each divided by the chip's rate.
    The links within a host or slice and the network between hosts are taken to work at the same time."""
    sent = sum(collective.bytes - collective.network for collective in cost.collectives.values())
    network = sum(collective.network for collective in cost.collectives.values())
    return Roofline(
        compute=cost.flops / chip.flops,
        memory=cost.bytes / chip.bandwidth,
        communication=max(sent / chip.link, network / chip.network if chip.network else 0.0),
        intensity=cost.flops / cost.bytes if cost.bytes else float("inf"),
    )


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FIGURE = r"([\d.]+)([KMGT]?)i?B?"


def parse_refusal(error: Exception) -> Refusal | None:
    """Returns what a compiler's RESOURCE_EXHAUSTED says about a program, None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    figures = re.search(rf"Used {_FIGURE} of {_FIGURE} hbm", text) or re.search(
        rf"required[^(]*\({_FIGURE}\) exceeds available HBM \({_FIGURE}\)", text
    )
    if figures is None:
        return None
    listed = re.findall(
        rf'Size: {_FIGURE}\s(?:\s*Operator: (?:op_type="[^"]*" )?op_name="([^"]*)"[^\n]*\n)?\s*Shape: (\w+\[[\d,]*\])',
        text,
    )
    largest = tuple(Buffers(_to_bytes(n, unit), 1, shape, name, False) for n, unit, name, shape in listed)
    return Refusal(_to_bytes(figures[1], figures[2]), _to_bytes(figures[3], figures[4]), largest)


def _to_bytes(figure: str, unit: str) -> int:
    return round(float(figure) * _UNITS[unit])
