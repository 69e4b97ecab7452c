"""Preference model -> a policy, on-policy, against an opponent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

from alignjax import rollout
from alignjax.models.likelihood import log_prob
from alignjax.models.tokenizer import pad
from alignjax.runtime import data
from alignjax.stages.experiment import POLICY, PREFERENCE, Context
from alignjax.stages.label import stop_tokens, unseen_stops
from alignjax.stages.training import Adam, Loop, run_loop
from alignjax.types import Array, Key, Metrics, Params, Tokens, UserError, in_range


@dataclasses.dataclass(frozen=True)
class Optimise:
    """A policy optimised on-policy against an opponent under a preference model."""

    makes: ClassVar = POLICY
    start: str
    reference: str
    preference: str
    objective: Callable[..., tuple[Array, Metrics]]  # takes log_prob by keyword
    opponent: Callable[..., Any]  # a rollout.Opponent
    adam: Adam
    loop: Loop
    prompts: int
    buckets: tuple[int, ...]  # prompt lengths in tokens
    max_new_tokens: int
    average_decay: float | None = None  # of the weights' moving average, for rollout.moving_average
    unfinished_loses: bool = True

    def __post_init__(self) -> None:
        in_range(self, 1, math.inf, "prompts", "buckets", "max_new_tokens")
        if self.average_decay is not None:
            in_range(self, 0, 1, "average_decay")

    def inputs(self) -> tuple[str, ...]:
        return (self.start, self.reference, self.preference)

    def check(self, context: Context) -> None:
        self.loop.check(context)
        context.expect(self.start, POLICY)
        context.expect(self.reference, POLICY)
        context.expect(self.preference, PREFERENCE)
        context.task.source.prompts("train", 1, context.seed)
        if self.opponent is rollout.moving_average and self.average_decay is None:
            raise UserError(f"{context.name}: the opponent moving_average needs average_decay; set it, e.g. 0.999")

    def run(self, context: Context) -> dict[str, Any]:
        task, start, reference = context.task, context.policy(self.start), context.policy(self.reference)
        fitted, built = context.preference(self.preference)
        if reference.model.config != start.model.config:
            raise UserError(
                f"{context.name}: {self.start!r} and {self.reference!r} are models of different sizes; use one"
            )
        for name, network in ((self.reference, reference), (self.preference, fitted)):
            if network.fingerprint != start.fingerprint:
                raise UserError(f"{context.name}: {self.start!r} and {name!r} have different tokenizers; use one start")
        score = log_prob(start.model)
        collect = rollout.collector(
            start.model, score, built.logit, self.opponent, self.max_new_tokens,
            stop_tokens(task, start.tokenizer), self.unfinished_loses, unseen_stops(task, start.tokenizer),
        )  # fmt: skip
        ids = [start.tokenizer.encode(text) for text in task.source.prompts("train", self.prompts, context.seed)]
        kept = [row for row in ids if len(row) <= max(self.buckets)]
        plan = data.planned([len(row) for row in kept], self.buckets, self.loop.batch, context.seed)

        def make_batch(step: int) -> Tokens:
            indices, length = plan(step)
            return pad([kept[i] for i in indices], length)

        def objective(params: Params, batch: Any, key: Key) -> tuple[Array, Metrics]:
            return self.objective(params, batch, key, log_prob=score)

        params = run_loop(
            context, self.loop, self.adam, start.params, start.model.rules, objective, make_batch,
            collect, {"reference": reference.params, "preference": fitted.params}, self.average_decay,
        )  # fmt: skip
        context.inherit(self.start, params)
        return {"prompts": len(kept), "too_long": len(ids) - len(kept)}
