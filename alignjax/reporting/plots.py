"""Pictures of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.distributed.storage import write_picture

_LINES, _LEGEND_COLUMNS = ("-", "--", ":", "-."), 8


def win_rate_heat_map(path: Path, table: Mapping[str, Any]) -> None:
    """Writes one judge's win rates as a heat map; ``table`` is what a Tournament writes (win_rates.json)."""
    from matplotlib.figure import Figure  # imported here, as below: it takes half a second, and a run needs it last

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


def score_against_kl(path: Path, table: Mapping[str, Any]) -> bool:
    """Writes every policy's score by the task over its KL to the reference; returns whether they were measured.

    Policies whose names differ only behind a space ("ppo 0.02", "ppo 0.1") make one curve.
    """
    from matplotlib.figure import Figure

    rows = zip(table["policies"], table["kl_to_reference"], table["mean_score"], strict=True)
    points = [(name, kl, score) for name, kl, score in rows if kl is not None and score is not None]
    if not points:
        return False
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for name, kl, score in points:
        curve, _, setting = name.partition(" ")
        curves.setdefault(curve, []).append((kl, score, setting))
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for curve, places in curves.items():
        kls, scores, settings = zip(*sorted(places), strict=True)
        axes.plot(kls, scores, marker="o", label=curve, linewidth=1)
        for kl, score, setting in zip(kls, scores, settings, strict=True):
            axes.annotate(setting, (kl, score), textcoords="offset points", xytext=(4, -8), fontsize=7)
    axes.set(xlabel=f"KL to {table['reference']}, nats a response", ylabel="score by the task")
    axes.legend(fontsize=8)
    write_picture(path, figure)
    return True


def judges_against_kl(path: Path, tables: Sequence[Mapping[str, Any]]) -> bool:
    """Writes P(policy > baseline), over the KL, as every judge of a tournament sees it.

    It is the mean of each judge's probabilities. Votes would not compare: a model that is seldom at 1/2 makes a whole
    vote of a small margin, and people's ties count half. Policies whose names differ only behind a space ("br 20",
    "br 40") make one curve. Where the curve of the model that a policy was trained against rises and that of a held-out
    judge falls, the policy exploits its model. Returns whether there are several judges and a curve.
    """
    from matplotlib.figure import Figure

    first = tables[0]
    curves: dict[str, list[tuple[float, int]]] = {}  # curve -> (KL, number of the policy)
    for number, name in enumerate(first["policies"]):
        curve, _, setting = name.partition(" ")
        if setting and first["kl_to_reference"][number] is not None:
            curves.setdefault(curve, []).append((first["kl_to_reference"][number], number))
    curves = {curve: sorted(points) for curve, points in curves.items() if len(points) > 1}
    if len(tables) < 2 or not curves:
        return False
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for color, (curve, points) in enumerate(curves.items()):
        for table, line in zip(tables, _LINES * len(tables), strict=False):
            baseline = table["policies"].index(table["baseline"])
            means = [table["mean_probability"][number][baseline] for _, number in points]
            axes.plot([kl for kl, _ in points], means, line, color=f"C{color}", marker="o", markersize=3,
                      label=f"{curve}, by {table['judge']}")  # fmt: skip
    axes.set(xlabel=f"KL to {first['reference']}, nats a response", ylabel=f"mean probability over {first['baseline']}")
    axes.legend(fontsize=8)
    write_picture(path, figure)
    return True


def logged_metrics(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Returns the names of all metrics that stages logged, in the order of their first rows. ``runs`` are rows by
    stage."""
    return list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row if name != "step"))


def training_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Writes a picture with one panel for each logged metric and one line for each stage that logged it."""
    from matplotlib.figure import Figure

    panels = logged_metrics(runs)
    columns = min(4, len(panels))
    grid = (-(-len(panels) // columns), columns)
    legend_rows = -(-len(runs) // _LEGEND_COLUMNS)
    figure = Figure(figsize=(3.4 * grid[1], 2.6 * grid[0] + 0.2 * legend_rows), layout="constrained")
    axes = figure.subplots(*grid, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    lines = {}  # a stage looks alike in all panels
    for axis, metric in zip(axes.flat, panels, strict=False):
        for number, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                style = {"color": f"C{number % 10}", "linestyle": _LINES[number // 10 % len(_LINES)]}
                (lines[name],) = axis.plot(*zip(*points, strict=True), label=name, linewidth=1, **style)
        axis.set(title=metric, xlabel="step")
    figure.legend(
        [*lines.values()], [*lines], loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(lines)), fontsize=7
    )
    write_picture(path, figure)
