"""Mathematics without a model, as a stage: a function and what it found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax

from alignjax.distributed import storage
from alignjax.pipeline.experiment import FINDINGS, Context

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Finding(NamedTuple):
    """What a study tells: Markdown for the screen and the report, pictures by name, and the numbers as JSON."""

    text: str
    pictures: dict[str, Figure]
    numbers: Any


@dataclasses.dataclass(frozen=True)
class Study:
    """Calls ``function()`` in float64 and writes ``section.md``, ``numbers.json`` and ``WORKDIR/<name>-*.png``."""

    makes: ClassVar = FINDINGS
    function: Callable[[], Finding]

    def inputs(self) -> tuple[str, ...]:
        return ()

    def run(self, context: Context) -> dict[str, Any]:
        with jax.enable_x64(True):
            finding = self.function()
        shown = [finding.text]
        for name, picture in finding.pictures.items():
            file = f"{context.name}-{name}.png"
            storage.write_picture(context.workdir / file, picture)
            shown.append(f"![{name}]({file})\n")
        storage.write_json(context.folder / "numbers.json", finding.numbers)
        storage.write_atomic(context.folder / "section.md", "\n".join(shown))
        return {}
