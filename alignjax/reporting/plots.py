"""Pictures of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.distributed.storage import write_picture


def win_rate_heat_map(path: Path, table: Mapping[str, Any]) -> None:
    """Writes one judge's win rates as a heat map."""
    from matplotlib.figure import Figure  # here, as below: half a second that only the end of a run needs

    names, rate = table["policies"], table["win_rate"]
    size = 1.6 + 0.9 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rate, cmap="RdBu", vmin=0, vmax=1)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
    axes.set_title(f"row beats column, judge: {table['judge']}")
    for i, row in enumerate(rate):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if abs(value - 0.5) > 0.3 else "k")
    figure.colorbar(image, shrink=0.8)
    write_picture(path, figure)


def training_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Writes one panel a logged metric, one line a stage; returns the metrics, none when nothing was trained."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(metric for rows in runs.values() for metric in rows[0] if metric != "step"))
    if not panels:
        return []
    columns = min(4, len(panels))
    grid = (-(-len(panels) // columns), columns)
    figure = Figure(figsize=(3.4 * grid[1], 2.6 * grid[0]), layout="constrained")
    axes = figure.subplots(*grid, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, panels, strict=False):
        for name, rows in runs.items():
            if metric in rows[0]:
                axis.plot([row["step"] for row in rows], [row[metric] for row in rows], label=name, linewidth=1)
        axis.set(title=metric, xlabel="step")
        axis.legend(fontsize=7)
    write_picture(path, figure)
    return panels
