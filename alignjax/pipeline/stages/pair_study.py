"""Labelled pairs -> figures: a judge looks at the pairs of several stages, and a function says what it found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from alignjax.errors import UserError
from alignjax.fields import Kind, stage_input
from alignjax.labeling import statistics
from alignjax.labeling.statistics import JudgedPairs, Share
from alignjax.pipeline.experiment import Context, Exposure, Program
from alignjax.pipeline.judges import JudgeSpec
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.pair_batches import read_stage_pairs
from alignjax.pipeline.stages.study import Finding, write_finding
from alignjax.pipeline.store import read_record
from alignjax.reporting.tables import markdown_table, two_digits

Describe = Callable[[Mapping[str, JudgedPairs], str], Finding]
"""(name -> its pairs, who judges) -> what is found."""


@dataclasses.dataclass(frozen=True)
class PairStudy:
    """Asks a judge about the training pairs of several stages; ``function`` says what follows.

    By default it is ``label_card``. The judge sees pairs that models were fitted to, so nothing is chosen by it.
    """

    judge: JudgeSpec
    sizes: JudgeSizes  # what the judge is compiled for
    pairs: dict[str, str] = stage_input(Kind.PAIRS)  # name in the table -> stage
    function: Describe | None = None  # None: label_card
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if not self.pairs:
            raise UserError("PairStudy.pairs is empty; name a stage of pairs")

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from findings."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when the judge is not there."""
        self.judge.check(context)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the judge's programs."""
        return self.judge.programs(context, "judge", self.sizes)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Asks the judge and writes what was found."""
        judge, found = self.judge.open(context, programs, self.sizes), {}
        for name, stage in self.pairs.items():
            rows = read_stage_pairs(context, stage, "train")
            judged = judge(*([row[column] for row in rows] for column in ("prompt", "first", "second")))
            record = read_record(context.folder_of(stage))
            found[name] = JudgedPairs(rows, judged, record["figures"].get("dropped") if record else None)
        write_finding(context, (self.function or label_card)(found, self.judge.describe()))
        return {}


def label_card(arms: Mapping[str, JudgedPairs], judge: str) -> Finding:
    """Returns the statistics of each way to label, and how often two of them agree on the pairs that both have."""
    figures = {name: statistics.pair_statistics(pairs) for name, pairs in arms.items()}
    agreements = {a: {b: statistics.agreement(arms[a].rows, arms[b].rows) for b in arms} for a in arms}
    sections = ["## The labels\n", markdown_table(_HEADER, [_card_row(*item) for item in figures.items()]), ""]
    sections.append(f"{_NOTE}The judge is {judge}.\n")
    if any(agreements[a][b].n for a in arms for b in arms if a != b):
        rows = [[a, *("-" if a == b else share_text(agreements[a][b]) for b in arms)] for a in arms]
        sections += [markdown_table(["agreement", *arms], rows), "Of the pairs of replies that both have labelled.\n"]
    numbers = {
        "arms": figures,
        "agreement": {a: {b: s._asdict() for b, s in row.items()} for a, row in agreements.items()},
    }
    return Finding("\n".join(sections), {}, numbers)


_HEADER = ["labels", "pairs", "dropped", "accuracy", "ties", "positive below", "P(first)", "confidence", "preferred"]
_HEADER += ["other"]
_NOTE = """Accuracy: the share of labels that the judge agrees with, of the pairs where neither calls the replies equal;
in brackets the exact 95% interval. Ties: the share that the judge calls equal. Positive below: how often it calls the
reply under the positive affix worse. P(first): the mean label of the reply that stands first, 1/2 without a bias to a
position. Confidence: the mean of |2 p - 1|. Preferred and other: mean characters.
"""


def _card_row(name: str, figures: Mapping[str, Any]) -> Sequence[str]:
    dropped = "-" if figures["dropped"] is None else str(figures["dropped"])
    shares = [share_text(Share(**figures["accuracy"])), two_digits(figures["judge_ties"])]
    shares.append(share_text(Share(**figures["positive_below"])))
    plain = [figures[key] for key in ("first_preferred", "confidence", "preferred_characters", "other_characters")]
    return [name, str(figures["pairs"]), dropped, *shares, *map(two_digits, plain)]


def share_text(value: Share) -> str:
    """Returns a share with its interval; a dash where it is a share of nothing."""
    return "-" if value.value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
