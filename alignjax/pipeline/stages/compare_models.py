"""Preference models on several replies to each prompt: how right they are, their position bias, their cycles."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.labeling.method import draw_replies
from alignjax.pipeline.experiment import Context, Exposure, Program, function_of, programs_of
from alignjax.pipeline.judges import JudgeSpec, ModelJudge, judging_program, open_judge
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.agreement import known_prompts
from alignjax.pipeline.stages.chunks import in_chunks
from alignjax.pipeline.stages.study import Finding, write_finding
from alignjax.pipeline.stages.writing import SHORTENED, Writing, fitting_prompts
from alignjax.preferences import comparison, http_judge, judges
from alignjax.reporting.model_comparison import comparison_picture, comparison_section
from alignjax.types import Judge


@dataclasses.dataclass(frozen=True)
class CompareModels:
    """Asks preference models about every two of several replies to a prompt, all of them about the same replies.

    It measures how right they are by a judge, their position bias, and how often three replies beat each other in a
    circle, which a reward model cannot express (2312.00886). A model that is fitted in one order is measured as it is
    fitted too. Prompts that a model was fitted to are left out.
    """

    prompts: int
    replies: int  # K to each prompt
    writing: Writing
    models: dict[str, str] = stage_input(Kind.PREFERENCE)  # name in the table -> stage
    policy: str = stage_input(Kind.POLICY)  # writes the replies
    judge: JudgeSpec | None = None  # the truth: Oracle("oracle"), ...; None: nothing is called right or wrong
    threshold: float = 0.01  # a link of a circle has P more than this away from 1/2; rounding closes none
    attempts: int = 5  # a reply that the task's filter refuses is drawn again, at most so often in all
    split: str = "test"
    seed: int = 0
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {
        "prompts": "with all replies",
        "pairs": "of replies to one prompt",
        "too_long": "prompts longer than every bucket, left out",
        "shortened": f"prompts {SHORTENED}",
        "known_prompts": "prompts that a model was fitted to, left out",
        "incomplete": "prompts for which the filter refused every try, left out",
        "judge_ties": "pairs that the judge calls equal",
        **{f"judge.{name}": meaning for name, meaning in http_judge.FIGURES.items()},
    }

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        check_range(self, 3, 2**10, "replies")
        check_range(self, 1, 2**20, "attempts")
        check_range(self, 0, 0.5, "threshold")
        if not self.models:
            raise UserError("CompareModels.models is empty; name a preference model")
        if wrong := [name for name in self.models if not re.fullmatch(r"[\w. +-]+", name)]:
            raise UserError(f"{wrong[0]!r} cannot name a model, because it names files; use letters and digits")

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from findings."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when writing would fail, or the judge is not there."""
        self.writing.check(context, self.split, self.policy)
        if self.judge:
            self.judge.check(context)

    def sizes(self) -> JudgeSizes:
        """Returns what the models are compiled for."""
        return JudgeSizes(self.writing.batch, max(self.writing.buckets), self.writing.max_new_tokens)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that write, those of every model in the orders in which it is asked, and the judge's."""
        programs = list(self.writing.programs(context, "write", context.abstract(self.policy)))
        for name, stage in self.models.items():
            network = context.abstract(stage)
            model = ModelJudge(stage).model(context, network)
            programs.append(judging_program(context, f"{name}, both orders", model.logit, network, self.sizes()))
            if model.ordered is not None:
                programs.append(judging_program(context, f"{name}, one order", model.ordered, network, self.sizes()))
        return (*programs, *(self.judge.programs(context, "judge", self.sizes()) if self.judge else ()))

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the replies, asks one model after another, then the judge, and writes what was found."""
        prompts, replies, figures = self.written(context, programs)
        asked = {}
        for name in self.models:
            asked[name] = {
                order: self.ask_model(context, programs_of(programs, f"{name}, {order}"), name, order, prompts, replies)
                for order in ("both orders", "one order")
            }
            context.release()  # one model at a time
        truth = None
        if self.judge:
            judge = self.judge.open(context, programs_of(programs, "judge"), self.sizes())
            truth, counts = self.ask(context, judge, False, "judge", prompts, replies)
            figures["judge_ties"] = int(np.sum(np.triu(truth == 0.5, 1)))
            if judge_figures := judges.judge_figures(judge, counts):
                figures["judge"] = judge_figures
        numbers = {**figures, **self.numbers(asked, truth)}
        picture = comparison_picture(numbers)
        write_finding(context, Finding(comparison_section(numbers), {"models": picture}, numbers))
        return figures

    def numbers(self, asked: dict[str, dict[str, np.ndarray | None]], truth: np.ndarray | None) -> dict[str, Any]:
        """Returns the figures of every model, of the judge and of the best reward, as JSON."""

        def of(p: np.ndarray | None) -> dict[str, Any] | None:
            found = {} if p is None else comparison.model_figures(p, truth, self.threshold)
            return {key: x if isinstance(x, float) else x._asdict() for key, x in found.items()} or None

        models = {
            name: {order.replace(" ", "_"): of(p) for order, p in orders.items()} for name, orders in asked.items()
        }
        best = None if truth is None else comparison.best_reward_model(truth)
        judge = self.judge.describe() if self.judge else None
        return {"threshold": self.threshold, "models": models, "judge": of(truth), "best_reward": of(best),
                "judge_description": judge}  # fmt: skip

    def written(
        self, context: Context, programs: tuple[Program, ...]
    ) -> tuple[list[str], list[list[str]], dict[str, Any]]:
        """Returns the prompts with all their replies, the replies, and what was left out.

        Raises UserError when no prompt is left.
        """
        source, known = context.task.source, known_prompts(context, self.models.values())
        every = source.prompts(self.split, self.prompts, context.seed(self.seed))
        fitting, counts = fitting_prompts(context, self.policy, self.writing, every)
        asked = [prompt for prompt in fitting if prompt not in known]
        drawn = self.draw(context, programs, asked)
        kept = [(x, [y for y in own if y is not None]) for x, own in zip(asked, drawn, strict=True) if None not in own]
        figures = {**counts, "prompts": len(kept), "pairs": len(kept) * self.pairs_a_prompt,
                   "known_prompts": len(fitting) - len(asked), "incomplete": len(asked) - len(kept)}  # fmt: skip
        if not kept:
            raise UserError(f"{context.name}: of {len(every)} prompts, {figures['known_prompts']} are known to a model "
                            f"and {figures['incomplete']} have too few replies that the task's filter keeps; name "
                            "another split, or raise attempts")  # fmt: skip
        return [x for x, _ in kept], [own for _, own in kept], figures

    @property
    def pairs_a_prompt(self) -> int:
        """The number of pairs among the replies to one prompt."""
        return math.comb(self.replies, 2)

    def draw(self, context: Context, programs: tuple[Program, ...], prompts: Sequence[str]) -> list[list[str | None]]:
        """Returns K replies to each prompt, None where the filter refused every try, chunk by chunk."""
        write = function_of(programs, "write", self.writing.buckets)
        generate = self.writing.generator(context, context.load(self.policy), write, context.key(self.seed))

        def work(numbers: range) -> dict[str, Any]:
            chunk = [prompts[i] for i in numbers]
            sides = [
                draw_replies(generate, context.task.clean, chunk, numbers, side, self.attempts)[0]
                for side in range(self.replies)
            ]
            return {"replies": [list(own) for own in zip(*sides, strict=True)]}

        chunks = in_chunks(context, len(prompts), 4 * self.writing.batch, "prompt", work, "write")
        context.release()
        return [own for chunk in chunks for own in chunk["replies"]]

    def ask_model(
        self, context: Context, programs: tuple[Program, ...], name: str, order: str, prompts: Sequence[str],
        replies: Sequence[Sequence[str]],
    ) -> np.ndarray | None:  # fmt: skip
        """Returns P(y_i > y_j) by a model in both orders, [N, K, K]; None where it has no such program."""
        if not programs:
            return None
        judge = open_judge(context, programs[0], context.load(self.models[name]), self.sizes())
        return self.ask(context, judge, True, f"{name}, {order}", prompts, replies)[0]

    def ask(
        self, context: Context, judge: Judge, both_orders: bool, part: str, prompts: Sequence[str],
        replies: Sequence[Sequence[str]],
    ) -> tuple[np.ndarray, list[dict[str, float]]]:  # fmt: skip
        """Returns ``comparison.every_pair`` of all prompts and the judge's counts, chunk by chunk."""

        def work(numbers: range) -> dict[str, Any]:
            texts = [prompts[i] for i in numbers], [replies[i] for i in numbers]
            p = comparison.every_pair(judge, *texts, both_orders, self.writing.batch)
            return {"p": p.tolist(), "judge_counts": judges.take_counts(judge)}

        size = -(-4 * self.writing.batch // self.pairs_a_prompt)
        chunks = in_chunks(context, len(prompts), size, "prompt", work, part)
        return np.array([p for chunk in chunks for p in chunk["p"]]), [chunk["judge_counts"] for chunk in chunks]
