"""A win-rate table -> ratings of its policies: the game among policies."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program
from alignjax.pipeline.stages.study import Finding, write_finding
from alignjax.pipeline.stages.tournament import Tournament
from alignjax.preferences.rating_intervals import RatedPool, rate_fully
from alignjax.reporting.pools import tournament_pools
from alignjax.reporting.rating_report import rating_numbers, rating_picture, rating_section


@dataclasses.dataclass(frozen=True)
class RatePool:
    """Rates the policies of a finished Tournament, by each of its judges.

    It reads the tournament's judgments and nothing else: no network, no prompt, no reply. ``alignjax rate`` says the
    same of a folder or a file.
    """

    table: str = stage_input(Kind.TABLES)
    bootstrap: int = 1000  # resamples of the prompts; 0: no intervals
    probabilities: bool = False  # whether a rate is the mean of the judge's probabilities, and not of its votes
    seed: int = 0
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        check_range(self, 0, 10**6, "bootstrap")

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from findings."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when the tournament has one policy."""
        stage = context.experiment.stages[self.table]
        if isinstance(stage, Tournament) and len(stage.policies) < 2:
            raise UserError(f"{context.name}: {self.table!r} has one policy, and a pool needs two; add policies to it")

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: a pool is small, and is rated on the host."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Rates the pool of each judge and writes what was found."""
        pools = tournament_pools(context.folder_of(self.table), self.probabilities)
        seed = context.seed(self.seed)
        write_finding(context, rating_finding([rate_fully(title, pool, self.bootstrap, seed) for title, pool in pools]))
        return {}


def rating_finding(rated: list[RatedPool]) -> Finding:
    """Returns the sections, pictures and numbers of rated pools."""
    pictures = {one.title.removeprefix("judge: "): rating_picture(one) for one in rated}
    return Finding("\n".join(map(rating_section, rated)), pictures, [rating_numbers(one) for one in rated])
