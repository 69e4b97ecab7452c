"""Mathematics without a model, as a stage: a function and what it found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax

from alignjax.distributed import storage
from alignjax.fields import Kind
from alignjax.pipeline.experiment import Context, Exposure, Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Finding(NamedTuple):
    """What a study found."""

    text: str  # Markdown, for the screen and the report
    pictures: dict[str, Figure]  # by name
    numbers: Any  # as JSON


@dataclasses.dataclass(frozen=True)
class Study:
    """Calls ``function()`` in float64 and writes ``section.md``, ``numbers.json`` and ``WORKDIR/<name>-*.png``."""

    function: Callable[[], Finding]
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {}

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: a study reads no pairs."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Does nothing."""

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: the function compiles what it likes."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Calls the function and writes what it found."""
        with jax.enable_x64(True):
            finding = self.function()
        write_finding(context, finding)
        return {}


def write_finding(context: Context, finding: Finding) -> None:
    """Writes ``section.md``, ``numbers.json`` and ``WORKDIR/<stage>-<picture>.png``."""
    sections = [finding.text]
    for name, picture in finding.pictures.items():
        file = f"{context.name}-{name}.png"
        storage.write_picture(context.folder.parent / file, picture)
        sections.append(f"![{name}]({file})\n")
    storage.write_json(context.folder / "numbers.json", finding.numbers)
    storage.write_atomic(context.folder / "section.md", "\n".join(sections))
