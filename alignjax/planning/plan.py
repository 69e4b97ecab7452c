"""What a stage needs on accelerators that this machine does not have: its own programs, compiled ahead of time."""

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
from alignjax.errors import UserError, one_line
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
"""Kind of accelerator -> the shapes that a search tries, smallest first, up to 256 chips."""

_ERROR_CHARACTERS = 200  # of a compiler's error, in a table

Compiled = tuple[cost.Analysis | None, str]
"""(what a program needs, ""), or (None, why it is not known)."""


class PlanRow(NamedTuple):
    """One program on one mesh."""

    topology: str
    mesh: str
    devices: int
    stage: str
    program: str
    seconds: float  # that compilation took
    tokens: int  # of one call
    analysis: cost.Analysis | None
    refused: str = ""  # why there is no analysis

    @property
    def fits(self) -> bool:
        """Whether the program fits into every device."""
        return self.analysis is not None and self.analysis.memory.fits


class _Target(NamedTuple):
    """One mesh of one topology, as rows name it."""

    topology: str
    mesh_text: str
    devices: int
    mesh: jax.sharding.Mesh
    chip: topology.Chip

    def row(self, stage: str, program: str, seconds: float, tokens: int, compiled: Compiled) -> PlanRow:
        """Returns the row of a program on this mesh."""
        return PlanRow(self.topology, self.mesh_text, self.devices, stage, program, seconds, tokens, *compiled)


def plan(
    experiment: Any,
    topologies: Sequence[str],
    meshes: Sequence[sharding.Mesh],
    only: Sequence[str] = (),
    every_bucket: bool = False,
) -> Iterator[PlanRow]:
    """Yields a row for every program of the stages, on every mesh over every topology.

    Without ``meshes`` the experiment's own is used; with ``only``, only those stages. Of programs that differ in their
    bucket alone, the one of the largest bucket is compiled, unless ``every_bucket``. A topology that is a kind alone
    ("v5e") stands for its SHAPES, until all programs fit. ``topology.prepare_environment`` must be called before.
    Raises UserError when a stage or a topology is unknown.
    """
    names = [name for name in order(experiment.stages) if not only or name in only]
    if unknown := set(only) - set(names):
        raise UserError(f"unknown stage {min(unknown)!r}; this experiment has {', '.join(experiment.stages)}")
    for requested in topologies:
        for name in expand_topology(requested):
            fits = False
            for sizes in meshes or [experiment.mesh]:
                rows = []
                for row in _plan_mesh(experiment, name, sizes, names, every_bucket, searching=name != requested):
                    rows.append(row)
                    yield row
                fits = fits or all(row.fits for row in rows)
            if fits:
                break


def expand_topology(name: str) -> list[str]:
    """Returns the topology alone, or, of a kind, all topologies that a search tries."""
    return [name] if ":" in name or name not in SHAPES else [f"{name}:{shape}" for shape in SHAPES[name]]


def _plan_mesh(
    experiment: Any, name: str, sizes: sharding.Mesh, stages: Sequence[str], every_bucket: bool, searching: bool
) -> Iterator[PlanRow]:
    """Yields the rows of one mesh. A search needs no row after the first that does not fit."""
    devices = topology.compile_only_devices(name)
    try:
        target = _open_target(name, sizes, devices)
    except UserError as error:
        mesh_text = ",".join(f"{axis}={getattr(sizes, axis)}" for axis in sharding.AXES)
        yield PlanRow(name, mesh_text, len(devices), "", "", 0.0, 0, None, str(error))
        return
    cache: dict[str, Compiled] = {}
    for stage in stages:
        for row in _plan_stage(experiment, stage, target, every_bucket, cache):
            yield row
            if searching and not row.fits:
                return


def _open_target(name: str, sizes: sharding.Mesh, devices: Sequence[Any]) -> _Target:
    """Returns the mesh of these sizes over the topology's devices. Raises UserError when it does not divide them."""
    shape = sharding.mesh_shape(sizes, len(devices))
    mesh_text = ",".join(f"{axis}={size}" for axis, size in zip(sharding.AXES, shape, strict=True))
    arranged = topology.arrange_devices(devices, shape)
    mesh = jax.sharding.Mesh(arranged, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    return _Target(name, mesh_text, len(devices), mesh, topology.chip_of(name))


def _plan_stage(
    experiment: Any, stage: str, target: _Target, every_bucket: bool, cache: dict[str, Compiled]
) -> Iterator[PlanRow]:
    """Yields the rows of one stage; a stage that refuses the mesh has one row that says why."""
    try:
        programs = experiment.stages[stage].programs(Context(experiment, None, stage, target.mesh))
    except UserError as error:
        yield target.row(stage, "", 0.0, 0, (None, str(error)))
        return
    for program in programs if every_bucket else largest_buckets(programs):
        begin = time.perf_counter()
        compiled = compile_program(program, target.mesh, target.chip, cache)
        yield target.row(stage, program.name, time.perf_counter() - begin, program.tokens, compiled)


def largest_buckets(programs: Sequence[Program]) -> list[Program]:
    """Returns, of programs whose names differ in their last number alone, the one with the most tokens."""
    kept: dict[str, Program] = {}
    for program in programs:
        name = re.sub(r" \d+$", "", program.name)
        if name not in kept or program.tokens > kept[name].tokens:
            kept[name] = program
    return list(kept.values())


def compile_program(
    program: Program, mesh: jax.sharding.Mesh, chip: topology.Chip, cache: dict[str, Compiled]
) -> Compiled:
    """Returns what a program needs, its resident arrays counted among its arguments; or None and why it is not known.

    Programs with one text are compiled once: ``cache`` keeps their analyses.
    """
    bytes_alive = sharding.bytes_per_device((program.arguments, program.resident))
    if bytes_alive > chip.hbm:
        return None, f"its arguments alone are {_gib(bytes_alive)} of {_gib(chip.hbm)} GiB a device"
    with jax.set_mesh(mesh):
        try:
            lowered = program.function.lower(*program.arguments)
        except UserError as error:
            return None, str(error)
        text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if text not in cache:
            cache[text] = _analyse(lowered, chip, mesh)
    analysis, refused = cache[text]
    if analysis is None:
        return None, refused
    resident = bytes_alive - sharding.bytes_per_device(program.arguments)
    return analysis._replace(memory=analysis.memory.with_resident(resident)), ""


def _analyse(lowered: Any, chip: topology.Chip, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles a lowered program and returns its analysis, or None and the compiler's reason."""
    try:
        return cost.analyse(lowered.compile(), chip, mesh), ""
    except jax.errors.JaxRuntimeError as error:
        reason = cost.parse_refusal(error) or f"the compiler failed: {one_line(error)[:_ERROR_CHARACTERS]}"
        return None, str(reason)


_HEADER = ("topology", "mesh", "stage: program", "arguments", "temporaries", "peak", "of", "fits", "PFLOP", "sends GB",
           "at best", "bound", "compiled")  # fmt: skip


def plan_table(rows: Sequence[PlanRow]) -> str:
    """Returns the rows as Markdown.

    Memory is in GiB a device; floating-point operations and bytes that collectives send are of one device; "at best" is
    the roofline's least time of one call. A ">" says that a loop of unknown length is counted once, or that a kernel's
    arithmetic is not counted.
    """
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    for row in rows:
        cells = [row.topology, row.mesh, f"{row.stage}: {row.program}", *_measure_cells(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measure_cells(row: PlanRow) -> list[str]:
    """Returns the cells behind a row's name."""
    if row.analysis is None:
        return ["", "", "", "", f"no: {row.refused}", "", "", "", "", ""]
    memory, spent = row.analysis.memory, row.analysis.cost
    roofline = cost.roofline(spent, topology.chip_of(row.topology))
    sent = sum(kind.bytes for kind in spent.collectives.values())
    more = "> " if "unknown" in spent.loops.values() or spent.uncounted else ""
    return [
        _gib(memory.arguments), _gib(memory.temporaries), _gib(memory.needed), _gib(memory.limit),
        "yes" if memory.fits else f"no, {_gib(-memory.free)} too much", f"{more}{spent.flops / 1e15:.3g}",
        f"{more}{sent / 1e9:.3g}", f"{more}{roofline.floor:.3g} s", roofline.bound, f"{row.seconds:.0f} s",
    ]  # fmt: skip


def _gib(size: float) -> str:
    """Returns bytes as GiB with two digits."""
    return f"{size / topology.GIB:.2f}"


def smallest_fit(rows: Sequence[PlanRow]) -> str:
    """Returns one line: of each kind the fewest devices on which every program fits."""
    smallest: dict[str, tuple[int, str]] = {}
    for name, mesh in dict.fromkeys((row.topology, row.mesh) for row in rows):
        members = [row for row in rows if (row.topology, row.mesh) == (name, mesh)]
        kind, size = name.partition(":")[0], (members[0].devices, f"{name} with {mesh}")
        if all(row.fits for row in members) and size < smallest.get(kind, (size[0] + 1, "")):
            smallest[kind] = size
    if not smallest:
        return "Nothing of this fits; give larger topologies, more fsdp or tensor, a smaller batch or remat."
    return "Smallest that fits: " + "; ".join(text for _, text in smallest.values()) + "."


def largest_arrays(rows: Sequence[PlanRow]) -> str:
    """Returns each program's largest arrays, one a line: what to shrink."""
    lines = []
    for row in rows:
        if row.analysis:
            lines.append(f"\n{row.topology} {row.mesh} {row.stage}: {row.program}")
            lines += [f"  {buffers}" for buffers in row.analysis.largest]
    return "\n".join(lines)


def write_plan(path: Path, rows: Sequence[PlanRow]) -> None:
    """Writes the rows as JSON, with collectives by kind, loops and the largest arrays."""
    storage.write_json(path, [_row_json(row) for row in rows])


def _row_json(row: PlanRow) -> dict[str, Any]:
    """Returns a row as JSON."""
    plain = {**row._asdict(), "fits": row.fits}
    if row.analysis is None:
        return plain
    memory, spent, largest = row.analysis
    collectives = {kind: collective._asdict() for kind, collective in spent.collectives.items()}
    analysis = {
        "memory": memory._asdict(),
        "cost": {**spent._asdict(), "collectives": collectives},
        "largest": [buffers._asdict() for buffers in largest],
    }
    return {**plain, "analysis": analysis}


def parse_mesh(text: str) -> sharding.Mesh:
    """Returns the Mesh of "data=1,fsdp=-1,tensor=4". Raises UserError on anything else."""
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
        return dataclasses.replace(sharding.Mesh(data=1), **sizes)
    except (ValueError, TypeError):
        raise UserError(
            f"--mesh {text!r} is no mesh; write sizes of {', '.join(sharding.AXES)}, as fsdp=8,tensor=2"
        ) from None
