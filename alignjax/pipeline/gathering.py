"""Stages that do with a part of their policies: a table of those that are finished."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from alignjax.errors import UserError
from alignjax.pipeline.experiment import Experiment
from alignjax.pipeline.fingerprint import fingerprint


@runtime_checkable
class Gathers(Protocol):
    """A stage such as ``Tournament``. What its folder keeps of one policy must not depend on the others."""

    gather: bool  # whether it does with a part of its policies
    policies: dict[str, str]

    def among(self, stages: Collection[str]) -> Any:
        """Returns the stage with those policies alone that these stages make. Raises UserError when they are too
        few."""
        ...


def gathered(experiment: Experiment, name: str, finished: Collection[str]) -> tuple[Experiment, list[str]]:
    """Returns the experiment in which the stage, where it gathers, has the policies of the ``finished`` stages alone,
    and the names of the others.

    The fingerprint is then that of the smaller stage. So a table is finished for the set that it compares, and with all
    policies it is the table of a stage that does not gather. Raises UserError when too few are finished.
    """
    stage = experiment.stages[name]
    if not does_gather(stage):
        return experiment, []
    try:
        part = stage.among(finished)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return experiment.with_stages(**{name: part}), [policy for policy in stage.policies if policy not in part.policies]


def does_gather(stage: Any) -> bool:
    """Returns whether a stage does with a part of its policies."""
    return isinstance(stage, Gathers) and stage.gather


def is_part(experiment: Experiment, name: str, record: Mapping[str, Any]) -> bool:
    """Returns whether a record of the stage, which gathers, differs from the present configuration at most in which of
    the policies it has."""
    stage, found = experiment.stages[name], record.get("config", {}).get("policies")
    if not does_gather(stage) or not isinstance(found, Mapping):
        return False
    try:
        return record.get("fingerprint") == fingerprint(experiment, name, stage.among(tuple(found.values())))
    except UserError:
        return False
