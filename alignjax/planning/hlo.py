"""Compiled programs as XLA prints them, read back: computations, shapes in memory, and how often each part runs.

Everything is per device: shapes in a partitioned program are those of one device. XLA's own ``cost_analysis`` counts
a loop's body once; here it counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

NAME = r"[\w.\-]+"
SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
LINE = re.compile(rf"^\s+(ROOT )?%?({NAME}) = (.*)$")
SAME = ("bitcast", "copy", "convert")  # operations that leave a number what it is
HEADER = re.compile(rf"^(ENTRY )?%?({NAME}) \(.*\{{$")


class Shape(NamedTuple):
    """One array. ``order`` lists the dimensions from the fastest; ``space`` 0 is HBM, a TPU's 1 on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.dims) * bits(self.dtype) / 8)

    @property
    def padded(self) -> int:
        """Bytes with the padding of a TPU's tiles: (8, 128) rounds the two fastest dimensions up."""
        sizes = [self.dims[i] for i in reversed(self.order)] if self.order else list(self.dims)
        sizes = [1] * (len(self.tile) - len(sizes)) + sizes
        for i, tile in enumerate(reversed(self.tile), 1):
            sizes[-i] = -(-sizes[-i] // tile) * tile
        return math.ceil(math.prod(sizes) * bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    name: str
    op: str
    shapes: tuple[Shape, ...]  # a tuple's leaves
    operands: tuple[str, ...]
    text: str  # between the operation's parentheses
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from: JAX's name stack, or an argument's name."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    def called(self, *keys: str) -> list[str]:
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(?:\{{([^}}]*)\}}|%?({NAME}))", self.attributes)
        return [name.strip().lstrip("%") for many, one in found for name in (many or one).split(",")]


Computation = dict[str, Instruction]


class Module(NamedTuple):
    computations: Mapping[str, Computation]
    entry: str
    partitions: int

    def root(self, name: str) -> Instruction:
        return next(i for i in self.computations[name].values() if i.root)


class Executed(NamedTuple):
    """An instruction, its computation, how often it runs, and whether a fusion holds it and so no memory its result."""

    instruction: Instruction
    where: str
    times: int
    fused: bool


def bits(dtype: str) -> float:
    found = re.search(r"\d+", dtype)
    return 8.0 if dtype == "pred" else float(found[0]) if found else 0.0  # token[] and opaque[] are nothing


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of "(f32[8,128]{1,0:T(8,128)S(1)}, u32[])", in order."""
    out = []
    for dtype, dims, layout in SHAPE.findall(text):
        order, _, rest = layout.partition(":")
        tile, space = re.search(r"T\(([\d,]*)\)", rest), re.search(r"S\((\d+)\)", rest)
        out.append(
            Shape(
                dtype, integers(dims), integers(order), integers(tile[1]) if tile else (), int(space[1]) if space else 0
            )
        )
    return tuple(out)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def closing(text: str) -> int:
    """Where the parenthesis that opens ``text`` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def parse(text: str) -> Module:
    """``compiled.as_text()`` -> its computations, by name and in order."""
    computations: dict[str, Computation] = {}
    entry, partitions = "", re.search(r"num_partitions=(\d+)", text)
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := LINE.match(line):
            rest = found[3]
            cut = closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
            result, rest = rest[:cut], rest[cut:].strip()
            op, _, _ = rest.partition("(")
            end = closing(rest[len(op) :]) + len(op)
            inside = rest[len(op) + 1 : end]
            operands = tuple(re.findall(rf"%({NAME})", inside))
            one = Instruction(found[2], op, shapes(result), operands, inside, rest[end + 1 :], bool(found[1]))
            current[one.name] = one
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def executed(module: Module, unknown: dict[str, str] | None = None) -> Iterator[Executed]:
    """Every instruction that runs, loops multiplied out; of a conditional, every branch.

    Loops whose length the program does not fix are put into ``unknown``, by name: "at most N" and counted N times
    (``while i < N and not all done``), or "unknown" and counted once.
    """

    def visit(name: str, times: int, fused: bool) -> Iterator[Executed]:
        for one in module.computations[name].values():
            yield Executed(one, name, times, fused)
            if one.op == "fusion":
                yield from inner(one.called("calls"), times, True)
            elif one.op == "while":
                trips, exact = trip_count(module, name, one)
                if unknown is not None and not exact:
                    unknown[one.op_name or one.name] = f"at most {trips}" if trips else "unknown"
                yield from inner(one.called("condition", "body"), times * (1 if trips is None else trips), fused)
            elif one.op in ("call", "async-start"):
                yield from inner(one.called("to_apply", "calls"), times, fused)
            elif one.op == "conditional":
                yield from inner(
                    one.called("branch_computations", "true_computation", "false_computation"), times, fused
                )

    def inner(names: list[str], times: int, fused: bool) -> Iterator[Executed]:
        for name in names:
            yield from visit(name, times, fused)

    return visit(module.entry, 1, False)


def trip_count(module: Module, where: str, loop: Instruction) -> tuple[int | None, bool]:
    """(how often a while loop's body runs or a bound on it or None, whether that is exact).

    XLA notes it on the loop for CPUs and GPUs; for TPUs it follows from the counter: its start in the loop's
    operand, its step in the body and the comparison in the condition.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1]), True
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    root = module.root(condition)
    found = [
        n for index, limit in limits(module, condition, root) if (n := steps(module, where, loop, body, index, limit))
    ]
    return (min(found) if found else None), bool(found) and exact(module, root)


def exact(module: Module, root: Instruction) -> bool:
    return root.op == "compare" or (root.op == "fusion" and exact(module, module.root(root.called("calls")[0])))


def limits(
    module: Module, where: str, node: Instruction, names: Mapping[str, Instruction] | None = None
) -> Iterator[tuple[int, int]]:
    """(counter's place in the loop's tuple, limit) of every ``counter < constant`` that the condition asks for."""
    here = module.computations[where]

    def follow(name: str) -> Instruction:
        one = here[name]
        while one.op in SAME:
            one = here[one.operands[0]]
        return names[one.name] if names and one.name in names else one

    if node.op in ("and", "convert", "bitcast", "copy"):
        for name in node.operands:
            yield from limits(module, where, here[name], names)
    elif node.op == "fusion":
        (inside,) = node.called("calls")
        inner = module.computations[inside].values()
        given = {p.name: follow(node.operands[int(p.text)]) for p in inner if p.op == "parameter"}
        yield from limits(module, inside, module.root(inside), given)
    elif node.op == "compare":
        left, right = map(follow, node.operands)
        if "direction=GT" in node.attributes:
            left, right = right, left
        if re.search("direction=[LG]T", node.attributes) and left.op == "get-tuple-element" and right.op == "constant":
            yield integers(left.attributes)[0], int(right.text)


def steps(module: Module, where: str, loop: Instruction, body: str, index: int, limit: int) -> int | None:
    """How often a counter that starts at a constant and grows by a constant stays below the limit."""
    start = number(module.computations[where], element(module.computations[where], loop.operands[0], index))
    step = increment(module, body, element(module.computations[body], module.root(body).name, index))
    return max(0, -(-(limit - start) // step)) if step and start is not None else None


def increment(module: Module, where: str, name: str | None) -> int | None:
    """The constant that an addition adds, be it within a fusion."""
    here = module.computations[where]
    one, index = here.get(name or ""), 0
    while one is not None and one.op in SAME:
        one = here.get(one.operands[0])
    if one is not None and one.op == "get-tuple-element":
        index, one = integers(one.attributes)[0], here.get(one.operands[0])
    if one is None or one.op not in ("add", "fusion"):
        return None
    if one.op == "add":
        return next((n for operand in one.operands if (n := number(here, operand))), None)
    (inside,) = one.called("calls")
    inner = module.computations[inside]
    last = module.root(inside)
    last = inner[last.operands[index]] if last.op == "tuple" else last
    if last.op != "add":
        return None
    given = (inner[operand] for operand in last.operands)
    places = ((here, one.operands[int(i.text)]) if i.op == "parameter" else (inner, i.name) for i in given)
    return next((n for place in places if (n := number(*place))), None)


def element(here: Computation, name: str, index: int) -> str | None:
    one = here[name]
    return one.operands[index] if one.op == "tuple" else None


def number(here: Computation, name: str | None) -> int | None:
    one = here.get(name or "")
    while one is not None and one.op in SAME:
        one = here[one.operands[0]]
    return int(one.text) if one is not None and one.op == "constant" and re.fullmatch(r"-?\d+", one.text) else None
