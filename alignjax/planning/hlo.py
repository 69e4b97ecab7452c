"""Parses compiled programs as XLA prints them: computations, instructions, and shapes with their layout in memory.

Everything is per device: the shapes in a partitioned program are those of one device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_NAME = r"[\w.\-]+"
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(rf"^\s+(ROOT )?%?({_NAME}) = (.*)$")
_HEADER = re.compile(rf"^(ENTRY )?%?({_NAME}) \(.*\{{$")


class Shape(NamedTuple):
    """The shape of one array and its layout in memory."""

    dtype: str  # as XLA writes it: bf16, s32, pred
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()  # the dimensions, from the one that varies fastest in memory
    tile: tuple[int, ...] = ()  # on a TPU, as (8, 128)
    space: int = 0  # memory space: 0 is HBM, and 1 is a TPU's on-chip memory

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return math.ceil(math.prod(self.dims) * bits_per_element(self.dtype) / 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory. A TPU's tile of (8, 128) rounds the two fastest dimensions up to multiples of 8 and 128."""
        sizes = [self.dims[i] for i in reversed(self.order)] if self.order else list(self.dims)
        sizes = [1] * (len(self.tile) - len(sizes)) + sizes
        for i, tile in enumerate(reversed(self.tile), 1):
            sizes[-i] = -(-sizes[-i] // tile) * tile
        return math.ceil(math.prod(sizes) * bits_per_element(self.dtype) / 8)

    def __str__(self) -> str:
        """Returns dtype and dimensions, as "bf16[8,128]"."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a computation: ``%name = shapes op(text), attributes``."""

    name: str
    op: str
    shapes: tuple[Shape, ...]  # of the result; several when it is a tuple
    operands: tuple[str, ...]  # names of instructions of the same computation
    text: str  # between the parentheses after the op
    attributes: str
    root: bool  # whether its result is the computation's

    @property
    def op_name(self) -> str:
        """The place in the Python program: JAX's name stack, or the name of an argument; may be empty."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", match[1]) if match else ""

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations that are listed in the attributes of these keys."""
        matches = re.findall(rf"\b(?:{'|'.join(keys)})=(?:\{{([^}}]*)\}}|%?({_NAME}))", self.attributes)
        return [name.strip().lstrip("%") for several, single in matches for name in (several or single).split(",")]


Computation = dict[str, Instruction]
"""The instructions of a computation by name, in order."""


class Module(NamedTuple):
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: str  # the name of the computation at which the program starts
    partitions: int  # the number of devices

    def root(self, name: str) -> Instruction:
        """Returns the root instruction of the computation of that name."""
        return next(instruction for instruction in self.computations[name].values() if instruction.root)


def parse_module(text: str) -> Module:
    """Returns the program that ``compiled.as_text()`` prints."""
    computations: dict[str, Computation] = {}
    entry, partitions = "", re.search(r"num_partitions=(\d+)", text)
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            current[match[2]] = _parse_instruction(match[2], match[3], root=bool(match[1]))
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_instruction(name: str, text: str, root: bool) -> Instruction:
    """Parses "shapes op(operands), attributes"."""
    cut = _closing_parenthesis(text) + 1 if text.startswith("(") else text.index(" ")
    result, call = text[:cut], text[cut:].strip()
    op, _, _ = call.partition("(")
    end = _closing_parenthesis(call[len(op) :]) + len(op)
    inside = call[len(op) + 1 : end]
    operands = tuple(re.findall(rf"%({_NAME})", inside))
    return Instruction(name, op, parse_shapes(result), operands, inside, call[end + 1 :], root)


def _closing_parenthesis(text: str) -> int:
    """Returns the position at which the parenthesis that opens ``text`` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a result's text, as "(f32[8,128]{1,0:T(8,128)S(1)}, u32[])", in order."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        order, _, rest = layout.partition(":")
        tile, space = re.search(r"T\(([\d,]*)\)", rest), re.search(r"S\((\d+)\)", rest)
        tile_dims = parse_integers(tile[1]) if tile else ()
        shapes.append(
            Shape(dtype, parse_integers(dims), parse_integers(order), tile_dims, int(space[1]) if space else 0)
        )
    return tuple(shapes)


def parse_integers(text: str) -> tuple[int, ...]:
    """Returns the runs of digits in a text as numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def bits_per_element(dtype: str) -> float:
    """Returns the bits of one element; 0 for ``token`` and ``opaque``, which hold no data."""
    digits = re.search(r"\d+", dtype)
    return 8.0 if dtype == "pred" else float(digits[0]) if digits else 0.0
