"""How often each instruction of a compiled program runs, with loops multiplied out.

XLA's own ``cost_analysis`` counts the body of a loop once; here it counts as often as it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from alignjax.planning.hlo import Computation, Instruction, Module, parse_integers

_CASTS = ("bitcast", "copy", "convert")  # operations that do not change the value of an integer


class Executed(NamedTuple):
    """An instruction and how often it runs in one execution of the program."""

    instruction: Instruction
    computation: str  # the name of the computation that holds it
    times: int
    fused: bool  # inside a fusion: its result needs no HBM


def executed_instructions(module: Module) -> Iterator[Executed]:
    """Yields every instruction that runs; of a conditional, those of every branch.

    A loop without a fixed length counts as often as ``inexact_loops`` says.
    """
    return _visit(module, module.entry, 1, False)


def inexact_loops(module: Module) -> dict[str, str]:
    """Returns the loops whose length the program does not fix, by their place in the Python program.

    A value "at most N" is counted N times, as of ``while i < N and not all_done``. A value "unknown" is counted once.
    """
    loops = {}
    for instruction, computation, _, _ in executed_instructions(module):
        if instruction.op == "while":
            count, exact = trip_count(module, computation, instruction)
            if not exact:
                loops[instruction.op_name or instruction.name] = f"at most {count}" if count else "unknown"
    return loops


def _visit(module: Module, name: str, times: int, fused: bool) -> Iterator[Executed]:
    for instruction in module.computations[name].values():
        yield Executed(instruction, name, times, fused)
        called, repeats = _called_computations(module, name, instruction)
        for inner in called:
            yield from _visit(module, inner, times * repeats, fused or instruction.op == "fusion")


def _called_computations(module: Module, name: str, instruction: Instruction) -> tuple[list[str], int]:
    """Returns (the computations that an instruction calls, how often it calls each)."""
    if instruction.op == "fusion":
        return instruction.called("calls"), 1
    if instruction.op == "while":
        count, _ = trip_count(module, name, instruction)
        return instruction.called("condition", "body"), 1 if count is None else count
    if instruction.op in ("call", "async-start"):
        return instruction.called("to_apply", "calls"), 1
    if instruction.op == "conditional":
        return instruction.called("branch_computations", "true_computation", "false_computation"), 1
    return [], 1


def trip_count(module: Module, name: str, loop: Instruction) -> tuple[int | None, bool]:
    """Returns (how often the body of a while loop runs, whether that is exact). ``name`` is the loop's computation.

    An inexact count is an upper bound, or None where nothing is known. XLA writes the count on the loop for CPUs and
    GPUs. For TPUs it follows from the loop's counter: the constant at which it starts, the constant that the body adds,
    and the constant with which the condition compares it.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1]), True
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    root = module.root(condition)
    counts = [
        count
        for index, limit in _counter_limits(module, condition, root, {})
        if (count := _count_steps(module, name, loop, body, index, limit))
    ]
    return (min(counts) if counts else None), bool(counts) and _is_comparison(module, root)


def _is_comparison(module: Module, root: Instruction) -> bool:
    """Returns whether a condition is one comparison, perhaps in a fusion, and so can end the loop in no other way."""
    if root.op == "fusion":
        return _is_comparison(module, module.root(root.called("calls")[0]))
    return root.op == "compare"


def _counter_limits(
    module: Module, name: str, node: Instruction, arguments: Mapping[str, Instruction]
) -> Iterator[tuple[int, int]]:
    """Yields (the counter's index in the loop's tuple, limit) for every ``counter < constant`` that must hold for the
    ``node`` of a condition to be true. ``arguments`` are what a fusion's parameters stand for, by their names."""
    computation = module.computations[name]

    def source(operand: str) -> Instruction:
        instruction = _skip_casts(computation, operand)
        return arguments.get(instruction.name, instruction)

    if node.op in ("and", *_CASTS):
        for operand in node.operands:
            yield from _counter_limits(module, name, computation[operand], arguments)
    elif node.op == "fusion":
        (inner,) = node.called("calls")
        parameters = [p for p in module.computations[inner].values() if p.op == "parameter"]
        inner_arguments = {p.name: source(node.operands[int(p.text)]) for p in parameters}
        yield from _counter_limits(module, inner, module.root(inner), inner_arguments)
    elif node.op == "compare" and (direction := re.search("direction=([LG])T", node.attributes)):
        left, right = map(source, node.operands if direction[1] == "L" else reversed(node.operands))
        if left.op == "get-tuple-element" and right.op == "constant":
            yield parse_integers(left.attributes)[0], int(right.text)


def _count_steps(module: Module, name: str, loop: Instruction, body: str, index: int, limit: int) -> int | None:
    """Returns how often a counter is below the limit; None unless it starts at a constant and a constant is added."""
    initial = _constant(module.computations[name], _tuple_element(module.computations[name], loop.operands[0], index))
    result = _tuple_element(module.computations[body], module.root(body).name, index)
    step = _increment(module, module.computations[body], result)
    return max(0, -(-(limit - initial) // step)) if step and initial is not None else None


def _increment(module: Module, computation: Computation, result: str | None) -> int | None:
    """Returns the constant that the instruction ``result`` adds to something, itself or in a fusion; else None."""
    if result is None:
        return None
    instruction, index = _skip_casts(computation, result), 0
    if instruction.op == "get-tuple-element":
        index, instruction = parse_integers(instruction.attributes)[0], computation[instruction.operands[0]]
    if instruction.op == "add":
        return _first_nonzero(_constant(computation, operand) for operand in instruction.operands)
    return _fused_increment(module, computation, instruction, index) if instruction.op == "fusion" else None


def _fused_increment(module: Module, computation: Computation, fusion: Instruction, index: int) -> int | None:
    """Returns the constant that the fusion's result of that index adds. It is inside the fusion or an operand of it."""
    (name,) = fusion.called("calls")
    inner, root = module.computations[name], module.root(name)
    addition = inner[root.operands[index]] if root.op == "tuple" else root
    if addition.op != "add":
        return None
    terms = (inner[operand] for operand in addition.operands)
    return _first_nonzero(
        _constant(computation, fusion.operands[int(term.text)])
        if term.op == "parameter"
        else _constant(inner, term.name)
        for term in terms
    )


def _first_nonzero(numbers: Iterator[int | None]) -> int | None:
    return next((number for number in numbers if number), None)


def _tuple_element(computation: Computation, name: str, index: int) -> str | None:
    """Returns the name of an element of the tuple ``name``, None when ``name`` does not build a tuple."""
    instruction = computation[name]
    return instruction.operands[index] if instruction.op == "tuple" else None


def _constant(computation: Computation, name: str | None) -> int | None:
    """Returns the value of an integer constant, None when the instruction is anything else."""
    if name is None:
        return None
    instruction = _skip_casts(computation, name)
    is_integer = instruction.op == "constant" and re.fullmatch(r"-?\d+", instruction.text)
    return int(instruction.text) if is_integer else None


def _skip_casts(computation: Computation, name: str) -> Instruction:
    """Returns the instruction whose value ``name`` only copies or converts."""
    instruction = computation[name]
    while instruction.op in _CASTS:
        instruction = computation[instruction.operands[0]]
    return instruction
