"""The report of a finished run: Markdown with its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignjax.distributed.storage import read_json, read_text, write_atomic
from alignjax.reporting import plots, tables
from alignjax.training.metrics import read_metrics


def write_report(workdir: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes ``report.md``, one heat map a judge and ``curves.png``; returns the tables as text.

    ``records`` are the stages' records by name. What a stage left as ``section.md`` is part of both.
    """
    tournaments = [name for name, record in records.items() if record["config"]["kind"] == "Tournament"]
    sections, shown = [f"# {workdir.name}\n"], []
    for name in tournaments:
        for table in read_json(workdir / name / "win_rates.json"):
            picture = f"{name}-{table['judge']}.png"
            plots.win_rate_heat_map(workdir / picture, table)
            shown.append(tables.win_rate_table(table))
            sections += [shown[-1], f"![row beats column]({picture})\n"]
    for name in records:
        if section := read_text(workdir / name / "section.md"):
            sections.append(section)
            shown.append("\n".join(line for line in section.splitlines() if not line.startswith("![")))
    sections += [tables.samples_section(read_json(workdir / name / "samples.json")) for name in tournaments]
    sections += [curves_section(workdir, records), tables.figures_table(records), tables.time_table(records)]
    write_atomic(workdir / "report.md", "\n".join(section for section in sections if section))
    return "\n".join([*shown, f"report: {workdir / 'report.md'}"])


def curves_section(workdir: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes the training curves; returns their section with every metric's meaning, empty when nothing was trained."""
    runs = {name: rows for name in records if (rows := read_metrics(workdir / name / "metrics.jsonl"))}
    metrics = plots.training_curves(workdir / "curves.png", runs)
    if not metrics:
        return ""
    meanings = {"gradient_norm": "global norm of the gradient before clipping"}
    for name in runs:
        meanings |= {metric: words for metric, words in records[name]["meanings"].items() if metric not in meanings}
    legend = "\n".join(f"- {metric}: {meanings.get(metric, 'no meaning is declared')}" for metric in metrics)
    return f"## Training\n\n![training curves](curves.png)\n\n{legend}\n"
