"""Preference models side by side: a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from alignjax.reporting.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = {
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "cross_entropy": "cross-entropy",
    "position_bias": "position bias",
    "changed": "changed",
    "cyclic": "cyclic triples",
    "weakest_link": "weakest link",
    "reproduced": "reproduced",
}
_NOTE = """In brackets: Student's 95% interval over the prompts. All models are asked about the same replies.
Position bias: the mean of P(y > y') + P(y' > y) - 1, each asked in its own order; above 0 the reply that is shown first
is favoured. Changed: the share of pairs whose winner changes with the order. Cyclic triples: the share of the triples
of replies to one prompt that beat each other in a circle, each with P above {above:g}; weakest link: the mean of the
least P in such a circle. A reward model has none. One order: as the model is fitted, each pair shown once; both orders:
as judges and policies ask it.
"""
_JUDGE_NOTE = """Accuracy, calibration error and cross-entropy (nats a pair) are against the judge's probabilities;
accuracy is over the pairs that it does not tie. Reproduced: the share of the judge's circles that are circles of the
model's too, in the same direction. The best reward is fitted to the judge's probabilities of the replies to each
prompt: no reward model has a lower cross-entropy on them, but one may be more accurate. The judge is {judge}.
"""


def comparison_rows(numbers: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (name, figures) of the judge, of the best reward, and of every model in the orders in which it is asked.

    ``numbers`` are what a CompareModels stage writes.
    """
    if numbers["judge"]:
        yield "the judge", numbers["judge"]
        yield "the best reward", numbers["best_reward"]
    for name, orders in numbers["models"].items():
        if orders["one_order"]:
            yield f"{name}, one order", orders["one_order"]
            yield f"{name}, both orders", orders["both_orders"]
        else:
            yield name, orders["both_orders"]


def comparison_section(numbers: Mapping[str, Any]) -> str:
    """Returns the numbers as Markdown."""
    found = list(comparison_rows(numbers))
    columns = [column for column in _COLUMNS if column in found[0][1]]
    rows = [[name, *(_cell(figures[column]) for column in columns)] for name, figures in found]
    header = [f"n={numbers['prompts']} prompts", *(_COLUMNS[column] for column in columns)]
    note = _NOTE.format(above=0.5 + numbers["threshold"])
    if numbers["judge"]:
        note += _JUDGE_NOTE.format(judge=numbers["judge_description"])
        note += f"It ties {numbers['judge_ties']} of {numbers['pairs']} pairs.\n"
    return f"## What the preference models say\n\n{markdown_table(header, rows)}\n{note}"


def _cell(figure: Any) -> str:
    """Returns a figure, with its interval where it has one; a dash where there is nothing to measure."""
    if isinstance(figure, float):
        return f"{figure:.3f}"
    if figure["value"] is None:
        return "-"
    value, low, high = (f"{round(figure[key], 3) + 0.0:.3f}" for key in ("value", "low", "high"))  # no negative zero
    return f"{value} [{low}, {high}]"


def comparison_picture(numbers: Mapping[str, Any]) -> Figure:
    """Returns a panel for accuracy, for the winners that change with the order, and for cyclic triples.

    Models whose names differ only behind a space ("pairwise 48", "pairwise 96") make one curve.
    """
    from matplotlib.figure import Figure

    panels = ["accuracy", "changed", "cyclic", "reproduced"] if numbers["judge"] else ["changed", "cyclic"]
    picture = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for axis, panel in zip(picture.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for curve, points in _curves(numbers, panel).items():
            settings, values, low, high = zip(*points, strict=True)
            reach = [
                [v - a for v, a in zip(values, low, strict=True)],
                [b - v for v, b in zip(values, high, strict=True)],
            ]
            axis.errorbar(settings, values, reach, marker="o", capsize=3, linewidth=1, label=curve)
        if numbers["judge"] and (level := numbers["judge"][panel]["value"]) is not None:
            axis.axhline(level, color="k", linestyle="--", linewidth=1, label="the judge")
        axis.set(title=_COLUMNS[panel])
        axis.legend(fontsize=7)
    return picture


def _curves(numbers: Mapping[str, Any], panel: str) -> dict[str, list[tuple[str, float, float, float]]]:
    """Returns (setting, value, low, high) of one figure of the models, by curve."""
    curves: dict[str, list[tuple[str, float, float, float]]] = {}
    for name, orders in numbers["models"].items():
        curve, _, setting = name.partition(" ")
        for order, figures in orders.items():
            if figures and (found := figures[panel])["value"] is not None:
                label = f"{curve}, one order" if order == "one_order" else curve
                curves.setdefault(label, []).append((setting, found["value"], found["low"], found["high"]))
    return curves
