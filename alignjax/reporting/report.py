"""The report of a finished run: Markdown with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.distributed.storage import read_json, read_text, write_atomic
from alignjax.reporting import plots, tables
from alignjax.reporting.exchange import WIN_RATES
from alignjax.training.learn import LEARN_MEANINGS
from alignjax.training.metrics import read_metrics


def write_report(workdir: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes ``report.md``, a heat map for each judge and ``curves.png``; returns the tables as text.

    ``records`` are the records of the stages by name. A stage's ``section.md`` becomes part of both.
    """
    tournaments = [name for name, record in records.items() if record["config"]["kind"] == "Tournament"]
    sections, shown = [f"# {workdir.name}\n"], []
    for name in tournaments:
        judged, missing = read_json(workdir / name / WIN_RATES), records[name].get("missing", ())
        shown += tournament_tables(judged, missing)
        for table in judged:
            picture = f"{name}-{table['judge']}.png"
            plots.win_rate_heat_map(workdir / picture, table)
            rates, *others = judge_tables(table, missing)
            sections += [rates, f"![row beats column]({picture})\n", *others]
        sections.append(tables.replies_table(judged[0]))
        if plots.score_against_kl(workdir / f"{name}-score.png", judged[0]):
            sections.append(f"![score by the task over KL]({name}-score.png)\n")
        if plots.judges_against_kl(workdir / f"{name}-judges.png", judged):
            sections.append(f"![mean probability by every judge over KL]({name}-judges.png)\n")
    for name in records:
        if section := read_text(workdir / name / "section.md"):
            sections.append(section)
            shown.append(without_pictures(section))
    sections += [tables.samples_section(read_json(workdir / name / "samples.json")) for name in tournaments]
    sections += [curves_section(workdir, records), tables.figures_table(records), tables.time_table(records)]
    write_atomic(workdir / "report.md", "\n".join(section for section in sections if section))
    return "\n".join([*filter(None, shown), f"report: {workdir / 'report.md'}"])


def judge_tables(table: Mapping[str, Any], missing: Sequence[str]) -> list[str]:
    """Returns what one judge says. The win rates, which come first, name the policies that are ``missing``."""
    rates = tables.win_rate_table(table) + tables.missing_note(missing)
    return [rates, tables.baseline_table(table), tables.regularized_table(table)]


def tournament_tables(judged: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> list[str]:
    """Returns the tables of a Tournament, as text for the screen."""
    return [*(text for table in judged for text in judge_tables(table, missing)), tables.replies_table(judged[0])]


def stage_tables(folder: Path, record: Mapping[str, Any]) -> str:
    """Returns what a finished stage has to say in the report, without its pictures; empty where that is nothing."""
    if record["config"]["kind"] == "Tournament":
        return "\n".join(filter(None, tournament_tables(read_json(folder / WIN_RATES), record.get("missing", ()))))
    return without_pictures(read_text(folder / "section.md") or "")


def without_pictures(section: str) -> str:
    """Returns Markdown without the lines of pictures, for the screen."""
    return "\n".join(line for line in section.splitlines() if not line.startswith("!["))


def curves_section(workdir: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes the training curves; returns their section with every metric's meaning, empty when nothing was trained."""
    runs = {name: rows for name in records if (rows := read_metrics(workdir / name / "metrics.jsonl"))}
    if not (metrics := plots.logged_metrics(runs)):
        return ""
    plots.training_curves(workdir / "curves.png", runs)
    legend = "\n".join(f"- {metric}: {metric_meaning(metric, runs, records)}" for metric in metrics)
    return f"## Training\n\n![training curves](curves.png)\n\n{legend}\n"


def metric_meaning(metric: str, runs: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what a metric shows, as the stages that logged it declare; different meanings with their stages."""
    stages: dict[str, list[str]] = {}  # meaning -> stages
    for name, rows in runs.items():
        if any(metric in row for row in rows):
            declared = {**LEARN_MEANINGS, **records[name]["meanings"]}
            stages.setdefault(declared.get(metric, "no meaning is declared"), []).append(name)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{meaning} ({', '.join(names)})" for meaning, names in stages.items())
