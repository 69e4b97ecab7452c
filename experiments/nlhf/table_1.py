"""Table 1 of Nash learning (2312.00886), with what a run of ours measured in the rows below the paper's.

    alignjax run experiments/nlhf/table_1.py --workdir runs/table_1 --set run=runs/tldr
    ... --set run=runs/tldr,runs/tldr1b         # several runs, rows for each
    ... --only p_star                           # p_tau: the regularised preference
    ... --set "p_tau.function.tau=0.01"         # of the regularisation of ours

``run`` is the --workdir of a run of experiments/nlhf/tldr_t5_xl.py, tldr_decoder.py, or of any other whose Tournament
names its policies as that does: sft, rlhf, sp, md1 to md6, br, ema1, ema2, ema1_avg, ema2_avg. What a run does not have
is an empty cell. A run that has changed since is refused; --redo reads it again.

The paper's numbers are those that its readers quote: they were not read off the paper here, and a cell that nobody was
seen to quote is empty.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import alignjax as aj
from alignjax.errors import UserError
from alignjax.labeling.statistics import Share
from alignjax.pipeline import results
from alignjax.pipeline.results import RunResults, WinRate
from alignjax.reporting.tables import markdown_table

SOURCE = "arXiv 2312.00886, table 1"
MIXTURES = tuple(f"MD{i}" for i in range(1, 7))
COLUMNS = ("RLHF", "SP", *MIXTURES, "BR", "EMA1", "EMA2", "EMA1*", "EMA2*")
ROWS = ("SFT", *COLUMNS)
Cells = Mapping[tuple[str, str], str]
"""(row, column) -> how often the column's policy beats the row's."""
_SFT = (".990", ".983", ".982", ".989", ".987", ".985", ".982", ".965", ".943", ".970", ".961", ".977", ".980")
_RLHF = (".500", ".489", ".598", ".519", ".561", ".501", ".436", ".284", ".148", ".468", ".320", ".477", ".510")
P_STAR: Cells = {
    **{("SFT", column): cell for column, cell in zip(COLUMNS, _SFT, strict=True)},
    **{("RLHF", column): cell for column, cell in zip(COLUMNS, _RLHF, strict=True)},
    ("SP", "MD1"): ".592", ("MD2", "MD1"): ".575", ("MD3", "MD1"): ".530", ("MD4", "MD1"): ".631",
    ("BR", "MD1"): ".837", ("EMA2*", "MD1"): ".553",
}  # fmt: skip
P_TAU: Cells = {
    ("RLHF", "MD1"): ".769", ("RLHF", "SP"): ".741", ("BR", "RLHF"): ".833", ("BR", "MD1"): ".921",
    ("EMA1*", "MD1"): ".652",
}  # fmt: skip


def table_1(title: str, paper: Cells, n: int, runs: Sequence[RunResults], tau: float) -> aj.Finding:
    """Returns P of the column's policy over the row's: of each row the paper's cells, then those of each run's judges.

    With ``tau`` it is P_tau(pi > pi') = P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu) (Eq. 2), KL in nats. P is the
    share of the judge's votes, as in the paper's tables; the P_tau of a Tournament is of mean probabilities.
    """
    if not 0 <= tau < math.inf:
        raise UserError(f"tau={tau} must be finite and not negative; set p_tau.function.tau, e.g. 0.008")
    rows: list[list[str]] = []
    for row in ROWS:
        cells = [paper.get((row, column), "") for column in COLUMNS]
        own = [[row, "paper, T5-L", f"larger model (n={n})", *cells]] if any(cells) else []
        rows += [*own, *(ours for run in runs for ours in our_rows(run, row, tau))]
    if not any("ours" in row[1] for row in rows):
        rows.append(["", "ours", "", *[""] * len(COLUMNS)])
    note = (
        "How often the column's policy beats the row's. Ours: the networks that the run began with, ties 1/2, in\n"
        "brackets the exact 95% interval over the prompts"
        + (f", moved by {tau:g} (KL of row - KL of column) as the rate is; the KL's own error is not in it.\n" if tau
           else ".\n")
        + "Paper and run differ in scale, in what was fine-tuned and in the judge, which in the paper is a larger\n"
        "language model of its own: compare the order of policies within a row, not the numbers.\n"
    )  # fmt: skip
    header = ("row", "size", "judge", *COLUMNS)
    text = f"## {title}\n\n{markdown_table(header, rows)}\n{note}Paper: {SOURCE}. An empty cell is not known.\n"
    return aj.Finding(text, {}, {"header": header, "rows": rows})


def our_rows(run: RunResults, row: str, tau: float) -> Iterator[list[str]]:
    """Yields the cells of one row for every judge of the run that compares its policy with another of the table."""
    judged: dict[tuple[str, str, int], dict[str, str]] = {}
    for column in COLUMNS:
        if column != row:
            for found in results.read_win_rates(run, policy_name(column), policy_name(row)):
                key = found.task, found.judge, found.rate.n
                judged.setdefault(key, {})[column] = cell_of(found, tau)
    for (task, judge, n), cells in judged.items():
        size = f"ours, {task}, {results.network_sizes(run)}"
        yield [row, size, f"{judge} (n={n})", *(cells.get(column, "") for column in COLUMNS)]


def cell_of(found: WinRate, tau: float) -> str:
    """Returns a rate with its interval, both regularised by ``tau``; empty where tau is not 0 and a KL is not known."""
    own, other = found.kl
    if not tau:
        return interval(found.rate, 0.0)
    return "" if own is None or other is None else interval(found.rate, tau * (other - own))


def interval(rate: Share, shift: float) -> str:
    """Returns a rate and its interval, moved by ``shift``."""
    value, low, high = (f"{x + shift:.3f}" for x in (rate.value or 0.0, rate.low, rate.high))
    return f"{value} [{low}, {high}]"


def policy_name(column: str) -> str:
    """Returns what a run calls the policy of a column: "EMA1*" is ema1_avg."""
    return column.lower().replace("*", "_avg")


def get_config(run: str = "") -> aj.Experiment:
    """Returns both halves of the table; ``run`` are work folders with commas between."""
    runs = tuple(RunResults(folder) for folder in run.split(",") if folder)
    star = partial(table_1, title="Table 1: P*", paper=P_STAR, n=2000, runs=runs, tau=0.0)
    regularised = partial(table_1, title="Table 1, regularised: P_tau", paper=P_TAU, n=1000, runs=runs, tau=0.008)
    return aj.Experiment(task=None, stages={"p_star": aj.Study(star), "p_tau": aj.Study(regularised)})
