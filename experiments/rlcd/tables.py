"""The tables of RLCD's paper, with what a run of ours measured in the rows below the paper's.

    alignjax run experiments/rlcd/tables.py --workdir runs/tables --only table3 --set run=runs/rlcd
    alignjax run experiments/rlcd/tables.py --workdir runs/tables --only appendix_n
    ... --set run=runs/harmless7b,runs/harmless30b,runs/helpful7b     # several runs, a row each
    ... --set rlcd=nash_md                                            # our arm that stands for RLCD

``run`` is the --workdir of a finished run of experiments/rlcd/harmless_7b.py, sandbox.py or agreement.py, or of any
other with these stages: a Tournament for tables 3 and 6, a MeasureAgreement for table 5, a PairStudy for table 36. What
a run does not have is an empty cell. A run that has changed since is refused; --redo reads it again.

The paper's numbers are those of arXiv 2307.12950v3, as its readers quote them: they were not read off the paper here.
A cell that nobody was seen to quote is empty. "7B" and "30B" name the size of the LLaMA that simulates the pairs; what
is trained is always 7B. Paper and run differ in models, prompts and judges, so a row is no mark for the other.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import alignjax as aj
from alignjax.labeling.accuracy import rlaif_accuracy, rlcd_accuracy
from alignjax.labeling.statistics import Share
from alignjax.pipeline import results
from alignjax.pipeline.results import RunResults
from alignjax.reporting.tables import markdown_table

SOURCE = "arXiv 2307.12950v3"
Runs = tuple[RunResults, ...]
Paper = dict[tuple[str, str], tuple[str, ...]]
"""(Who, size) -> the cells of a row; "" is not known."""
WINS = ("Harm", "Help", "Help, helpful prompts", "Quality, outlines", "tokens")
"""The columns of tables 2, 3 and 6. Harm and Help are on harmless prompts; the tokens, the mean lengths of the two
policies' replies to harmless prompts, are from tables 34 and 35."""
AGREEMENTS = ("harm: accuracy, %", "probability", "help: accuracy, %", "probability")
LABELS = ("harm", "help")

TABLE_2: Paper = {  # (RLCD against, size) -> of 9 points, 200 examples, by people
    ("RLAIF", "7B"): ("5.62/3.38", "4.64/4.36", "5.88/3.12", "5.97/3.03", "66.5/42.1"),
    ("RLAIF", "30B"): ("4.71/4.29", "4.50/4.50", "4.51/4.49", "4.76/4.24", "73.3/78.1"),
    ("Context-Dist", "7B"): ("4.51/4.49", "", "", "", "66.5/26.5"),
    ("Context-Dist", "30B"): ("", "", "", "", "73.3/30.5"),
    ("LLaMA", "7B"): ("", "", "", "", "66.5/67.5"),
    ("LLaMA", "30B"): ("", "", "", "", "73.3/67.5"),
}
TABLE_3: Paper = {  # in percent, 1000 examples, by GPT-4
    ("LLaMA", "7B"): ("82.8/17.2", "77.0/23.0", "90.7/9.3", "76.0/24.0", "66.5/67.5"),
    ("LLaMA", "30B"): ("", "", "", "", "73.3/67.5"),
    ("RLAIF", "7B"): ("84.8/15.2", "71.0/29.0", "85.4/14.6", "78.5/21.5", "66.5/42.1"),
    ("RLAIF", "30B"): ("60.3/39.7", "55.3/44.7", "47.8/52.2", "35.9/64.1", "73.3/78.1"),
    ("Context-Dist", "7B"): ("69.7/30.3", "67.7/32.3", "89.5/10.5", "71.8/28.2", "66.5/26.5"),
    ("Context-Dist", "30B"): ("", "", "", "", "73.3/30.5"),
}
TABLE_6: Paper = {  # in percent, by GPT-4
    ("RLCD-Rescore", "7B"): ("86.0/14.0", "75.8/24.2", "86.3/13.7", "88.8/11.2", ""),
    ("RLCD-Rescore", "30B"): ("54.6/45.4", "53.2/46.8", "47.3/52.7", "36.4/63.6", ""),
}
TABLE_5: Paper = {  # harm: accuracy in percent, probability; help: the same; 2000 lines of HH
    ("RLAIF", "7B"): ("35.6", "0.492", "60.6", "0.508"),
    ("RLCD", "7B"): ("52.4", "0.516", "64.4", "0.601"),
    ("RLAIF", "30B"): ("45.7", "0.489", "66.2", "0.551"),
    ("RLCD", "30B"): ("55.9", "0.542", "66.7", "0.628"),
}
TABLE_36: Paper = {  # harm, help
    ("RLAIF", "7B"): ("0.44", "0.56"),
    ("RLCD", "7B"): ("0.54", "0.68"),
    ("RLAIF", "30B"): ("0.46", "0.66"),
    ("RLCD", "30B"): ("0.60", "0.74"),
}
APPENDIX_N = {  # where quality and the annotator's noise have the standard deviation 1
    "RLAIF": ("0.75", rlaif_accuracy()),
    "RLAIF, pairs at most 0.2 apart": ("0.528", rlaif_accuracy(hard=0.2)),
    "RLCD, gap 3": ("", rlcd_accuracy(3)),
    "RLCD, gap 3, pairs at most 0.2 apart": ("0.574", rlcd_accuracy(3, hard=0.2)),
}


def win_table(
    title: str, paper: Paper, judge: str, runs: Runs, names: Mapping[str, str], help_judge: str = ""
) -> aj.Finding:
    """Returns win rates of RLCD: of each opponent the paper's rows, then a row for each run of ours and its judges.

    ``names`` are the policies of a run: "RLCD" and the paper's opponents -> their names in its tournaments. All judges
    of a run ask for the task's own attribute, but ``help_judge`` asks for helpfulness on harmless prompts.
    """
    rows: list[list[str]] = []
    for opponent in dict.fromkeys(opponent for opponent, _ in paper):
        rows += [[opponent, f"paper, {s}", judge, *cells] for (name, s), cells in paper.items() if name == opponent]
        ours = [row for run in runs for row in our_wins(run, names["RLCD"], names[opponent], help_judge)]
        rows += ours or empty_row(opponent, WINS)
    note = (
        "RLCD / the other. Tokens: the mean lengths of the replies, because judges may like longer ones. Ours: the\n"
        "networks that the run began with; percent of wins, ties 1/2, in brackets the exact 95% interval.\n"
    )
    return finding(title, ("RLCD against", "size", "judge", *WINS), rows, note)


def our_wins(run: RunResults, policy: str, other: str, help_judge: str) -> Iterator[list[str]]:
    """Yields a row for every judge of the run that compares the two policies."""
    for found in results.read_win_rates(run, policy, other):
        if (column := column_of(found.task)) is not None:
            cells = dict.fromkeys(WINS, "")
            cells["Help" if (column, found.judge) == ("Harm", help_judge) else column] = versus(found.rate)
            cells["tokens"] = "/".join(f"{count:.1f}" for count in found.tokens)
            who, size = f"{other}, by {policy}", f"ours, {results.network_sizes(run)}"
            yield [who, size, f"{found.judge} (n={found.rate.n})", *cells.values()]


def column_of(task: str) -> str | None:
    """Returns the column of ``WINS`` of a task's own attribute; None for a task that the paper does not have."""
    ends = {"-harmless": "Harm", "-helpful": "Help, helpful prompts", "outline": "Quality, outlines"}
    return next((column for end, column in ends.items() if task.endswith(end)), None)


def table_2() -> aj.Finding:
    """Returns the paper's comparison by people. No stage here asks people, so ours is empty."""
    names = dict.fromkeys(["RLCD", *(opponent for opponent, _ in TABLE_2)], "")
    return win_table("Table 2: points by people, which sum to 9", TABLE_2, "people (n=200)", (), names)


def table_5(runs: Runs) -> aj.Finding:
    """Returns how preference models agree with people, or with the labels that a run measured them on."""
    rows = [[name, f"paper, {size}", "people (n=2000)", *cells] for (name, size), cells in TABLE_5.items()]
    for run in runs:
        for found in results.read_agreements(run):
            cells = interval(found.accuracy, 100, 1), interval(found.mean_probability, 1, 3)
            labels = f"{found.labels} (n={found.accuracy.n})"
            rows += placed([found.model, f"ours, {results.network_sizes(run)}", labels], found.task, cells)
    note = (
        "Accuracy: P(preferred) above 1/2, strictly, with the exact 95% interval. Probability: the mean P(preferred),\n"
        "with Student's 95% interval. The paper measured on dialogues whose prompts the models' pairs came from.\n"
    )
    header = ("preference model", "size", "labels", *AGREEMENTS)
    return finding("Table 5: preference models and people", header, with_ours(rows, AGREEMENTS), note)


def table_36(runs: Runs) -> aj.Finding:
    """Returns how often simulated labels are right, by a judge that was not fitted to them."""
    rows = [[name, f"paper, {size}", "held-out reward", *cells] for (name, size), cells in TABLE_36.items()]
    for run in runs:
        for found in results.read_label_accuracies(run):
            who = [found.labels, f"ours, {results.network_sizes(run)}", f"{found.judge} (n={found.accuracy.n})"]
            rows += placed(who, found.task, (interval(found.accuracy, 1, 3),))
    note = "Ours: of the pairs that the judge does not call equal, with the exact 95% interval.\n"
    header = ("labels", "size", "judge", *LABELS)
    return finding("Table 36: accuracy of simulated labels", header, with_ours(rows, LABELS), note)


def placed(who: list[str], task: str, cells: tuple[str, ...]) -> list[list[str]]:
    """Returns a row with the cells under harm or help, by the task; no row for a task that the paper does not have."""
    empty = ("",) * len(cells)
    if task.endswith("-harmless"):
        return [[*who, *cells, *empty]]
    return [[*who, *empty, *cells]] if task.endswith("-helpful") else []


def appendix_n() -> aj.Finding:
    """Returns the paper's label accuracies in its model of simulated labels, and the closed forms."""
    rows = [[what, paper, f"{here:.5f}"] for what, (paper, here) in APPENDIX_N.items()]
    note = (
        "Qualities are N(m, 1). RLAIF: both replies have one mean, and the annotator sees each quality with noise of\n"
        "N(0, 1). RLCD: the means are 3 apart, and the label is which prompt.\n"
    )
    return finding("App. N: how often simulated labels are right", ("labels", "paper", "closed form"), rows, note)


def versus(rate: Share) -> str:
    """Returns a win rate in percent as the paper writes it, with its interval."""
    percent, low, high = (100 * value for value in (rate.value or 0.0, rate.low, rate.high))
    return f"{percent:.1f}/{100 - percent:.1f} [{low:.1f}, {high:.1f}]"


def interval(share: Share, unit: int, digits: int) -> str:
    """Returns a share in a unit with its interval; empty where it is a share of nothing."""
    if share.value is None:
        return ""
    value, low, high = (f"{unit * value:.{digits}f}" for value in share[:3])
    return f"{value} [{low}, {high}]"


def empty_row(who: str, columns: tuple[str, ...]) -> list[list[str]]:
    """Returns the row of what no run has."""
    return [[who, "ours", "", *[""] * len(columns)]]


def with_ours(rows: list[list[str]], columns: tuple[str, ...]) -> list[list[str]]:
    """Returns the rows, with an empty one where none is ours."""
    return rows if any(row[1].startswith("ours") for row in rows) else rows + empty_row("", columns)


def finding(title: str, header: tuple[str, ...], rows: list[list[str]], note: str) -> aj.Finding:
    """Returns a table with its source; the numbers are its cells."""
    text = f"## {title}\n\n{markdown_table(header, rows)}\n{note}Paper: {SOURCE}. An empty cell is not known.\n"
    return aj.Finding(text, {}, {"header": header, "rows": rows})


def get_config(
    run: str = "",
    rlcd: str = "rlcd",
    rlaif: str = "rlaif",
    rescore: str = "rescore",
    distilled: str = "distilled",
    base: str = "base",
) -> aj.Experiment:
    """Returns a stage a table; ``run`` are work folders with commas between, the other fields policies' names there."""
    runs = tuple(RunResults(folder) for folder in run.split(",") if folder)
    names = {"RLCD": rlcd, "LLaMA": base, "RLAIF": rlaif, "Context-Dist": distilled}
    gpt4 = partial(win_table, judge="GPT-4 (n=1000)", runs=runs, help_judge="help")
    wins, again = "percent of wins", {"RLCD": rlcd, "RLCD-Rescore": rescore}
    tables = {
        "table2": table_2,
        "table3": partial(gpt4, title=f"Table 3: {wins}", paper=TABLE_3, names=names),
        "table5": partial(table_5, runs=runs),
        "table6": partial(gpt4, title=f"Table 6: {wins}", paper=TABLE_6, names=again),
        "table36": partial(table_36, runs=runs),
        "appendix_n": appendix_n,
    }
    return aj.Experiment(task=None, stages={name: aj.Study(function) for name, function in tables.items()})
