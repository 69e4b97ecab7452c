"""What the stages of a finished run found, read from its work folder: the cells of a table over several runs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.labeling.statistics import Share
from alignjax.pipeline.store import RECORD, read_record
from alignjax.reporting.exchange import WIN_RATES

_NUMBERS = "numbers.json"


@dataclasses.dataclass(frozen=True)
class RunResults:
    """The finished stages of a work folder. Raises UserError when there is none."""

    workdir: str
    digest: str = dataclasses.field(init=False)  # of what is read, so that a table of it follows it

    def __post_init__(self) -> None:
        files = [self.folder / name / file for name in self.records() for file in (RECORD, WIN_RATES, _NUMBERS)]
        if not files:
            raise UserError(f"{self.workdir} holds no finished stage; name the --workdir of a finished run")
        content = "\n".join(storage.read_text(path) or "" for path in files)
        object.__setattr__(self, "digest", hashlib.sha256(content.encode()).hexdigest()[:16])

    @property
    def folder(self) -> Path:
        """The work folder as a path."""
        return storage.parse_path(self.workdir)

    def records(self) -> dict[str, dict[str, Any]]:
        """Returns the records of the finished stages by name."""
        paths = [path for path in storage.list_files(self.folder) if path.name == RECORD]
        names = sorted(path.parent.name for path in paths if path.parent.parent == self.folder)
        records = {name: read_record(self.folder / name) for name in names if not name.startswith(".")}
        return {name: record for name, record in records.items() if record.get("finished")}

    def findings(self, kind: str, file: str = _NUMBERS) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yields (record, what its file holds) of every finished stage of a class."""
        for name, record in self.records().items():
            if record["config"]["kind"] == kind:
                yield record, storage.read_json(self.folder / name / file)


class WinRate(NamedTuple):
    """How often one policy beats another, by one judge of a Tournament."""

    task: str
    judge: str  # its name in the table
    rate: Share
    tokens: tuple[float, float]  # mean lengths of the two policies' replies
    kl: tuple[float | None, float | None]  # of the two policies to the table's reference, nats; None: not measured


class Agreement(NamedTuple):
    """How a preference model agrees with labels (MeasureAgreement)."""

    task: str
    model: str
    labels: str  # the stage of pairs
    accuracy: Share
    mean_probability: Share  # with Student's interval


class LabelAccuracy(NamedTuple):
    """How often labels are right (PairStudy)."""

    task: str
    labels: str
    judge: str
    accuracy: Share


def read_win_rates(run: RunResults, policy: str, other: str) -> Iterator[WinRate]:
    """Yields how every judge of the run compares two policies; nothing where a table does not have both."""
    for record, tables in run.findings("Tournament", WIN_RATES):
        for table in tables:
            if {policy, other} <= set(table["policies"]):
                i, j = (table["policies"].index(name) for name in (policy, other))
                rate = Share(table["win_rate"][i][j], table["low"][i][j], table["high"][i][j], table["n"])
                tokens, kl = ((table[name][i], table[name][j]) for name in ("mean_length", "kl_to_reference"))
                yield WinRate(record["task"]["name"], table["judge"], rate, tokens, kl)


def read_agreements(run: RunResults) -> Iterator[Agreement]:
    """Yields the agreement of every preference model that the run measured."""
    for record, numbers in run.findings("MeasureAgreement"):
        for name, m in numbers["models"].items():
            accuracy = Share(m["accuracy"], m["low"], m["high"], m["n"])
            mean = Share(m["mean_probability"], m["probability_low"], m["probability_high"], m["n"])
            yield Agreement(record["task"]["name"], name, numbers["pairs"], accuracy, mean)


def read_label_accuracies(run: RunResults) -> Iterator[LabelAccuracy]:
    """Yields the accuracy of every way to label that the run studied by ``label_card``."""
    for record, numbers in run.findings("PairStudy"):
        if isinstance(numbers, dict) and "arms" in numbers:
            judge = next(str(value) for value in record["config"]["judge"].values())  # its name, or its stage
            for name, figures in numbers["arms"].items():
                yield LabelAccuracy(record["task"]["name"], name, judge, Share(**figures["accuracy"]))


def network_sizes(run: RunResults) -> str:
    """Returns the networks that the run began with and their parameters, as "base 6.7B, labeller 32.5B"."""
    begun = {n: r for n, r in run.records().items() if r["config"]["kind"] in ("Pretrain", "LoadCheckpoint")}
    return ", ".join(f"{name} {short_count(record['figures']['parameters'])}" for name, record in begun.items())


def short_count(count: float) -> str:
    """Returns a number of parameters in billions, millions or thousands: "6.7B"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.95 * size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"
