"""What a stage will take on machines that are not here: its own programs, compiled ahead of time for their devices."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.pipeline.experiment import Context, Program, order
from alignjax.planning import cost, topology

SHAPES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "h100": ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8"),
}
"""Of each kind what a search goes through, smallest first, up to 256 chips."""


class Row(NamedTuple):
    """One program on one mesh."""

    topology: str
    mesh: str
    devices: int
    stage: str
    program: str
    seconds: float  # to compile
    tokens: int  # in one call
    found: cost.Analysis | None
    refused: str = ""  # why there is none

    @property
    def fits(self) -> bool:
        return self.found is not None and self.found.memory.fits


def plan(
    experiment: Any,
    topologies: Sequence[str],
    meshes: Sequence[sharding.Mesh],
    only: Sequence[str] = (),
    every: bool = False,
) -> Iterator[Row]:
    """A row for every program of the stages on every mesh (none: the experiment's own) over every topology; of those
    that differ in the prompts' bucket alone the one of the largest, unless ``every`` is wanted. A kind alone ("v5e")
    goes through its SHAPES until all programs fit. ``topology.prepare_environment`` must have been called. Raises
    UserError on what is unknown."""
    names = [name for name in order(experiment.stages) if not only or name in only]
    if missing := set(only) - set(names):
        raise UserError(f"unknown stage {min(missing)!r}; this experiment has {', '.join(experiment.stages)}")
    for where in topologies:
        for shape in shapes(where):
            fits = False
            for sizes in meshes or [experiment.mesh]:
                rows = []
                for row in on_mesh(experiment, shape, sizes, names, every, impatient=where != shape):
                    rows.append(row)
                    yield row
                fits = fits or all(row.fits for row in rows)
            if fits:
                break


def shapes(where: str) -> list[str]:
    """The topology, or all that a search for a kind goes through."""
    return [where] if ":" in where or where not in SHAPES else [f"{where}:{shape}" for shape in SHAPES[where]]


def on_mesh(
    experiment: Any, where: str, sizes: sharding.Mesh, names: Sequence[str], every: bool, impatient: bool
) -> Iterator[Row]:
    """The rows of one mesh; the ``impatient`` wants none after the first that does not fit."""
    devices, chip = topology.compile_only_devices(where), topology.chip_of(where)
    told = ",".join(f"{axis}={getattr(sizes, axis)}" for axis in sharding.AXES)
    try:
        shape = sharding.mesh_shape(sizes, len(devices))
    except UserError as error:
        yield Row(where, told, len(devices), "", "", 0.0, 0, None, str(error))
        return
    told = ",".join(f"{axis}={size}" for axis, size in zip(sharding.AXES, shape, strict=True))
    arranged = topology.arrange_devices(devices, shape)
    mesh = jax.sharding.Mesh(arranged, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    seen: dict[str, tuple[cost.Analysis | None, str]] = {}
    for name in names:
        context = Context(experiment, None, name, mesh)
        try:
            programs = list(experiment.stages[name].programs(context))
            programs = programs if every else longest(programs)
        except UserError as error:
            yield Row(where, told, len(devices), name, "", 0.0, 0, None, str(error))
            if impatient:
                return
            continue
        for program in programs:
            begun = time.perf_counter()
            found, refused = compiled(program, mesh, chip, seen)
            seconds = time.perf_counter() - begun
            row = Row(where, told, len(devices), name, program.name, seconds, program.tokens, found, refused)
            yield row
            if impatient and not row.fits:
                return


def longest(programs: Sequence[Program]) -> list[Program]:
    """Of programs whose names differ in their last number alone, the one with most tokens."""
    kept: dict[str, Program] = {}
    for program in programs:
        name = re.sub(r" \d+$", "", program.name)
        if name not in kept or program.tokens > kept[name].tokens:
            kept[name] = program
    return list(kept.values())


def compiled(
    program: Program, mesh: jax.sharding.Mesh, chip: topology.Chip, seen: dict[str, tuple[cost.Analysis | None, str]]
) -> tuple[cost.Analysis | None, str]:
    """(what it costs, with what lives beside it among its arguments, or None and why not). Programs that are the same
    text are compiled once."""
    if (held := sharding.bytes_per_device((program.arguments, program.resident))) > chip.hbm:
        return None, f"its arguments alone are {held / topology.GIB:.2f} of {chip.hbm / topology.GIB:.2f} GiB a device"
    with jax.set_mesh(mesh):
        try:
            lowered = program.function.lower(*program.arguments)
        except UserError as error:
            return None, str(error)
        text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if text not in seen:
            try:
                seen[text] = cost.analyse(lowered.compile(), chip, mesh), ""
            except jax.errors.JaxRuntimeError as error:
                reason = cost.parse_refusal(error) or f"the compiler failed: {' '.join(str(error).split())[:200]}"
                seen[text] = None, str(reason)
    found, refused = seen[text]
    if found:
        found = found._replace(memory=found.memory.with_resident(held - sharding.bytes_per_device(program.arguments)))
    return found, refused


HEAD = ("topology", "mesh", "stage: program", "arguments", "temporaries", "peak", "of", "fits", "PFLOP", "sends GB",
        "at best", "bound", "compiled")  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: GiB a device, floating-point operations and bytes sent by collectives a device, and the roofline's
    least time of one call; with ">" where a loop of unknown length counts once, or a kernel's arithmetic not at all."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        start = [row.topology, row.mesh, f"{row.stage}: {row.program}"]
        if row.found is None:
            cells = [*start, "", "", "", "", f"no: {row.refused}", "", "", "", "", ""]
        else:
            memory, spent = row.found.memory, row.found.cost
            best = cost.roofline(spent, topology.chip_of(row.topology))
            sent = sum(kind.bytes for kind in spent.collectives.values())
            more = "> " if "unknown" in spent.loops.values() or spent.uncounted else ""
            cells = [
                *start, gib(memory.arguments), gib(memory.temporaries), gib(memory.needed), gib(memory.limit),
                "yes" if memory.fits else f"no, {gib(-memory.free)} too much", f"{more}{spent.flops / 1e15:.3g}",
                f"{more}{sent / 1e9:.3g}", f"{more}{best.floor:.3g} s", best.bound, f"{row.seconds:.0f} s",
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / topology.GIB:.2f}"


def smallest(rows: Sequence[Row]) -> str:
    """One line: of each kind the fewest devices on which every program fits."""
    kinds: dict[str, tuple[int, str]] = {}
    for where, mesh in dict.fromkeys((row.topology, row.mesh) for row in rows):
        mine = [row for row in rows if (row.topology, row.mesh) == (where, mesh)]
        kind, size = where.partition(":")[0], (mine[0].devices, f"{where} with {mesh}")
        if all(row.fits for row in mine) and size < kinds.get(kind, (size[0] + 1, "")):
            kinds[kind] = size
    if not kinds:
        return "Nothing of this fits; give larger topologies, more fsdp or tensor, a smaller batch or remat."
    return "Smallest that fits: " + "; ".join(text for _, text in kinds.values()) + "."


def largest(rows: Sequence[Row]) -> str:
    """Each program's largest arrays, for finding what to shrink."""
    lines = []
    for row in rows:
        if row.found:
            lines.append(f"\n{row.topology} {row.mesh} {row.stage}: {row.program}")
            lines += [f"  {held}" for held in row.found.largest]
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row]) -> None:
    """The rows as JSON, with collectives by kind, loops and the largest arrays."""
    plain = [
        {**row._asdict(), "fits": row.fits, "found": row.found and {
            "memory": row.found.memory._asdict(),
            "cost": {**row.found.cost._asdict(), "collectives": {
                kind: one._asdict() for kind, one in row.found.cost.collectives.items()}},
            "largest": [held._asdict() for held in row.found.largest],
        }} for row in rows
    ]  # fmt: skip
    storage.write_json(path, plain)


def read_mesh(text: str) -> sharding.Mesh:
    """A Mesh from "data=1,fsdp=-1,tensor=4". Raises UserError on anything else."""
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
        return dataclasses.replace(sharding.Mesh(data=1), **sizes)
    except (ValueError, TypeError):
        raise UserError(
            f"--mesh {text!r} is no mesh; write sizes of {', '.join(sharding.AXES)}, as fsdp=8,tensor=2"
        ) from None
