"""Tables of a finished run, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, leaf) of nested dicts."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with padded columns, so that it reads on a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def win_rate_table(table: Mapping[str, Any]) -> str:
    """Returns one judge's table: row beats column with its 95% interval; each policy's length, KL and score."""
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
    note = (
        f"The judge is {table['judge_description']}. In brackets: the 95% Clopper-Pearson interval over the prompts.\n"
        "Ties count 1/2. The judge's own errors are not in the interval. Of the row's replies: mean tokens; mean\n"
        f"log-ratio to {table['reference']}, which estimates the KL; the task's own score, higher is better.\n"
    )
    note += judge_line(table.get("judge_figures", {}))
    return f"## Win rate of row over column, judge: {judge}\n\n{markdown_table(header, rows)}\n{note}"


def judge_line(figures: Mapping[str, Any]) -> str:
    """Returns the judge's own figures as a line; nothing where it counts nothing. What was not measured is left out."""
    words = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items() if value is not None]
    return f"Of the judge: {'; '.join(words)}.\n" if words else ""


def baseline_table(table: Mapping[str, Any]) -> str:
    """Returns one judge's comparison of each policy with the baseline; empty for tables of older versions."""
    if "baseline" not in table:
        return ""
    names, baseline = table["policies"], table["policies"].index(table["baseline"])
    rows = []
    for i, name in enumerate(names):
        low, high = table["probability_interval"][i]
        rates = [f"{table['mean_probability'][i][baseline]:.3f} [{low:.3f}, {high:.3f}]"]
        rates.append(f"{table['length_controlled'][i][baseline]:.3f}")
        cells = ["-", "-"] if i == baseline else rates
        rows.append([name, *cells, f"{table['mean_characters'][i]:.1f}"])
    header = [f"{table['judge']} (n={table['n']})", "mean probability", "length-controlled", "characters"]
    note = (
        f"Of the row against {table['baseline']}: the mean of the judge's probabilities, in brackets Student's 95%\n"
        "interval over the prompts; what that mean would be if both replies were equally long, by a logistic\n"
        "regression on the difference in characters (2404.04475). Mean characters of the row's replies.\n"
    )
    return f"## The row against {table['baseline']}, judge: {table['judge']}\n\n{markdown_table(header, rows)}\n{note}"


def regularized_table(table: Mapping[str, Any]) -> str:
    """Returns one judge's regularised preferences; empty where the table has no tau."""
    if "regularized" not in table:
        return ""
    names, found = table["policies"], table["regularized"]
    rows = []
    for i, name in enumerate(names):
        columns = zip(found["preference"][i], found["low"][i], found["high"][i], strict=True)
        cells = [f"{p:.3f} [{'-' if low is None else f'{low:.3f}, {high:.3f}'}]" for p, low, high in columns]
        rows.append([name, *cells[:i], "-", *cells[i + 1 :]])
    note = (
        f"P_tau = P - tau KL(row) + tau KL(column), with tau = {found['tau']:g} and the KL to {table['reference']}\n"
        "(2312.00886, Eq. 2); P is the mean of the judge's probabilities. In brackets: Student's 95% interval over\n"
        "the prompts.\n"
    )
    header = [f"{table['judge']} (n={table['n']})", *names]
    return f"## P_tau of row over column, judge: {table['judge']}\n\n{markdown_table(header, rows)}\n{note}"


def missing_note(names: Sequence[str]) -> str:
    """Returns a line that names the policies which a table lacks; empty without any."""
    return f"NOT in this table, because they were not finished when it was made: {', '.join(names)}.\n" if names else ""


def replies_table(table: Mapping[str, Any]) -> str:
    """Returns what each policy's replies look like, whoever judges; empty for tables of older versions."""
    if "perplexity" not in table:
        return ""
    columns = [["-" if x is None else f"{x:.3f}" for x in table[f"distinct_{n}"]] for n in (1, 2, 3)]
    columns.append([two_digits(value) for value in table["perplexity"]])
    columns.append([two_digits(value) for value in table.get("entropy", [None] * len(table["policies"]))])
    rows = [[name, *cells] for name, *cells in zip(table["policies"], *columns, strict=True)]
    note = (
        "distinct-n: the share of different n-grams of words, in the first 20 words of each reply, in equally many\n"
        f"words of each policy, at most 10,000 (2307.12950). Perplexity of the replies under {table['reference']}.\n"
        "Entropy: the mean of -log pi(y), in nats a response.\n"
    )
    header = ["replies", "distinct-1", "distinct-2", "distinct-3", "perplexity", "entropy, nats"]
    return f"## What the replies look like\n\n{markdown_table(header, rows)}\n{note}"


def two_digits(value: float | None) -> str:
    """Returns the value with two digits and without a negative zero; a dash where it could not be measured."""
    return "-" if value is None else f"{value + 0.0 if abs(value) >= 0.005 else 0.0:.2f}"


def figures_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns every stage's figures with their meanings, as the stage declares them; empty without figures."""
    rows = []
    for name, record in records.items():
        for figure, value in flatten(record["figures"]):
            meaning = record["meanings"].get(figure, "")
            rows.append([name, figure.replace(".", " ").replace("_", " "), _short(value), meaning])
    return f"## Figures\n\n{markdown_table(['stage', 'figure', 'value', 'meaning'], rows)}" if rows else ""


def _short(value: Any) -> str:
    """Returns a figure as text, a float with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def time_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns how long every stage took."""
    total = sum(record["seconds"] for record in records.values()) or 1.0
    rows = [[n, f"{r['seconds']:.1f}", f"{100 * r['seconds'] / total:.0f}%"] for n, r in records.items()]
    rows.append(["all", f"{total:.1f}", "100%"])
    code = next(iter(records.values())).get("code", "")
    return f"## Where the time went\n\n{markdown_table(['stage', 'seconds', 'share'], rows)}\nCode: {code}\n"


def samples_section(samples: Sequence[Mapping[str, str]]) -> str:
    """Returns replies side by side: every sample is {"prompt": text, policy: reply, ...}."""
    lines = ["## Samples\n"]
    for sample in samples:
        prompt, *replies = sample.items()
        lines.append("\n".join(f"> {line}" for line in prompt[1].splitlines()) + "\n")
        lines += [f"- **{name}**: {' '.join(text.split()) or '(nothing)'}" for name, text in replies]
        lines.append("")
    return "\n".join(lines)
