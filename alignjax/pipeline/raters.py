"""A language model as a rater, as data: what labels pairs by the task's questions, and judges by one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from alignjax.errors import UserError
from alignjax.fields import Kind, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program, abstract_array, abstract_tokens
from alignjax.pipeline.networks import Network
from alignjax.preferences.judges import judged_length
from alignjax.preferences.raters import Rater, answer_log_odds, answer_tokens, language_model_rater
from alignjax.tasks.task import Template


class JudgeSizes(NamedTuple):
    """What a judge or a rater is compiled for."""

    batch: int
    prompt: int  # of the policies' tokens
    reply: int  # of the policies' tokens


@dataclasses.dataclass(frozen=True)
class LanguageModelRater:
    """A language model, as it is, that says which of two replies is better, in the order in which they are shown.

    ``RLAIF`` and ``Relabel`` ask it the task's questions; ``open`` returns a ``preferences.raters.Rater``.
    """

    stage: str = stage_input(Kind.POLICY)
    is_rater: ClassVar[bool] = True

    def check(self, context: Context) -> None:
        """Raises UserError when the task has no questions, or an answer is known not to be one token."""
        if not context.task.questions:
            raise UserError(f"{context.name}: task {context.task.name!r} has no questions to ask a rater; give it one "
                            "for each affix pair")  # fmt: skip
        check_answers(context, self.stage, context.task.questions)

    def exposure(self, context: Context) -> Exposure:
        """Returns the language model as one that is asked, and what it was trained on."""
        return context.asked_exposure(self.stage)

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns the program that asks a question."""
        return (rating_program(context, name, self.stage, context.task.questions, sizes),)

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Rater:
        """Returns the language model as a rater."""
        return open_rater(context, programs[0], context.load(self.stage), sizes)

    def describe(self) -> str:
        """Returns who rates."""
        return f"the language model of stage {self.stage}"


def check_answers(context: Context, stage: str, questions: Iterable[Template]) -> None:
    """Raises UserError when an answer is known not to be one token of the tokenizer of ``stage``."""
    spec = context.spec(stage)
    if spec and spec.tokenizer:
        answer_tokens(spec.tokenizer, tuple(questions), context.name)


def rating_program(
    context: Context, name: str, stage: str, questions: Iterable[Template], sizes: JudgeSizes
) -> Program:
    """Returns the program of an ``answer_log_odds`` for texts of these sizes."""
    network = context.abstract(stage)
    words = max(len(network.tokenizer.encode("".join(question[:3]) + question.preamble)) for question in questions)
    length = judged_length(sizes.prompt + 2 * sizes.reply + words)
    answers = abstract_array("int32", sizes.batch)
    arguments = network.params, abstract_tokens(sizes.batch, length), answers, answers
    return Program(name, answer_log_odds(network.model, context.mesh), arguments, sizes.batch * length)


def open_rater(context: Context, program: Program, network: Network, sizes: JudgeSizes) -> Rater:
    """Returns the rater that asks a network through a compiled program."""
    return language_model_rater(
        program.function, network.params, network.tokenizer, context.task.format,
        batch=sizes.batch, mesh=context.mesh, owner=f"{context.name}: the rater {network.stage!r}",
    )  # fmt: skip
