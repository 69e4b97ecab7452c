"""Tables and pictures of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignjax.distributed.storage import read_json, write_atomic, write_picture
from alignjax.training.metrics import read_metrics

CURVES = {  # metric -> what a panel shows
    "nll": "nats a token of text",
    "loss": "cross-entropy, nats a pair",
    "accuracy": "share of labels that the preference model agrees with",
    "preference": "P(y > opponent's y'); the opponent may move with the policy, so that a good one can stay near 1/2",
    "kl": "of the policy to the reference, nats a reply, from its samples",
    "objective": "what Nash-MD maximises: preference - tau * kl",
    "length": "tokens a reply",
}
MEANINGS = {  # figure -> what it says
    "documents": "packed into rows",
    "too long": "left out: longer than a row or than every bucket",
    "pairs": "kept",
    "dropped": "prompts without a pair: refused by the filter to the last try, or too long",
    "tries per prompt": "replies drawn for a prompt, both sides together",
    "skipped": "rows of the file that compare nothing",
    "different prompts": "among the pairs",
    "oracle ties": "share of the pairs that the task's oracle calls equal",
    "label accuracy": "share of the labels that the oracle agrees with, where it does not tie",
    "held out accuracy": "share of held-out labels that the preference model agrees with",
    "held out calibration error": "mean gap between its probabilities and the labels, ten bins",
    "held out cross entropy": "nats a pair",
    "best step": "whose save is the result",
    "held out n": "held-out pairs",
}


def write(workdir: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes ``report.md``, one heat map a judge and ``curves.png``; returns the tables as text. What a stage
    left as ``section.md`` is part of both."""
    tournaments = [name for name, record in records.items() if record["config"]["kind"] == "Tournament"]
    sections, shown = [f"# {workdir.name}\n"], []
    for name in tournaments:
        for table in read_json(workdir / name / "win_rates.json"):
            text = win_table(table, records[name]["config"])
            picture = f"{name}-{table['judge']}.png"
            heat_map(workdir / picture, table)
            shown.append(text)
            sections += [text, f"![row beats column]({picture})\n"]
    for name in records:
        if (section := workdir / name / "section.md").exists():
            sections.append(section.read_text())
            shown.append("\n".join(line for line in sections[-1].splitlines() if not line.startswith("![")))
    for name in tournaments:
        sections.append(side_by_side(read_json(workdir / name / "samples.json")))
    if curves(workdir / "curves.png", workdir, list(records)):
        legend = "\n".join(f"- {metric}: {words}" for metric, words in CURVES.items())
        sections.append(f"## Training\n\n![training curves](curves.png)\n\n{legend}\n")
    sections += [figures_table(records), time_table(records)]
    write_atomic(workdir / "report.md", "\n".join(sections))
    return "\n".join([*shown, f"report: {workdir / 'report.md'}"])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns padded, so that it reads on a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def win_table(table: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Row beats column, with the 95% interval; then each policy's length, KL and score."""
    names, judge = table["policies"], table["judge"]
    rows = []
    for i, name in enumerate(names):
        cells = [
            "-" if i == j else f"{table['win_rate'][i][j]:.3f} [{table['low'][i][j]:.3f}, {table['high'][i][j]:.3f}]"
            for j in range(len(names))
        ]
        measures = [table["mean_length"][i], table["kl_to_reference"][i], table["mean_score"][i]]
        rows.append([name, *cells, *map(two_digits, measures)])
    header = [f"{judge} (n={table['n']})", *names, "tokens", "KL, nats", "score"]
    source = config["judges"][judge]
    who = "the task's exact oracle" if source.startswith("oracle:") else f"the preference model of stage {source}"
    note = (
        f"The judge is {who}. In brackets: 95% Clopper-Pearson over the n prompts, ties 1/2; a judge's own\n"
        f"errors are not in it. Of the row's replies: mean tokens; mean log-ratio to {config['reference']}, which\n"
        "estimates the KL; the task's own score, higher is better.\n"
    )
    return f"## Win rate of row over column, judge: {judge}\n\n{markdown(header, rows)}\n{note}"


def two_digits(value: float | None) -> str:
    """Without a negative zero; what could not be measured is a dash."""
    return "-" if value is None else f"{value + 0.0 if abs(value) >= 0.005 else 0.0:.2f}"


def heat_map(path: Path, table: Mapping[str, Any]) -> None:
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


def curves(path: Path, workdir: Path, names: list[str]) -> bool:
    """One panel a metric, one line a stage; False when nothing was trained."""
    from matplotlib.figure import Figure

    runs = {name: rows for name in names if (rows := read_metrics(workdir / name / "metrics.jsonl"))}
    panels = [metric for metric in CURVES if any(metric in rows[0] for rows in runs.values())]
    if not panels:
        return False
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
    return True


def side_by_side(samples: list[Mapping[str, str]]) -> str:
    lines = ["## Samples\n"]
    for sample in samples:
        prompt, *replies = sample.items()
        lines.append("\n".join(f"> {line}" for line in prompt[1].splitlines()) + "\n")
        lines += [f"- **{name}**: {' '.join(text.split()) or '(nothing)'}" for name, text in replies]
        lines.append("")
    return "\n".join(lines)


def figures_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, record in records.items():
        for figure, value in record["figures"].items():
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            for part, number in inner:
                text = f"{number:.4g}" if isinstance(number, float) else str(number)
                what = f"{figure} {part}".strip().replace("_", " ")
                rows.append([name, what, text, MEANINGS.get(what, "")])
    return f"## Figures\n\n{markdown(['stage', 'figure', 'value', 'meaning'], rows)}" if rows else ""


def time_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    total = sum(record["seconds"] for record in records.values()) or 1.0
    rows = [[n, f"{r['seconds']:.1f}", f"{100 * r['seconds'] / total:.0f}%"] for n, r in records.items()]
    rows.append(["all", f"{total:.1f}", "100%"])
    code = next(iter(records.values())).get("code", "")
    return f"## Where the time went\n\n{markdown(['stage', 'seconds', 'share'], rows)}\nCode: {code}\n"
