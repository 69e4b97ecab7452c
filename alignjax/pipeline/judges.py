"""Judges as data: small dataclasses that a stage opens. A judge compares texts, so it needs nobody's tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from alignjax.errors import UserError, check_range, short_repr
from alignjax.fields import NO_EFFECT, Kind, no_effect, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program, abstract_tokens
from alignjax.pipeline.networks import Network
from alignjax.pipeline.raters import JudgeSizes, check_answers, open_rater, rating_program
from alignjax.preferences import http_client, http_judge, judges
from alignjax.preferences.http_answers import Answer, Body
from alignjax.preferences.http_judge import Parse, Prices, Question, parse_choice
from alignjax.preferences.preference_models import PreferenceModel
from alignjax.preferences.raters import question_judge
from alignjax.tasks.task import Template, as_question
from alignjax.training.metrics import progress_bar
from alignjax.types import Judge, OrderedLogit


class JudgeSpec(Protocol):
    """A judge as data: a frozen dataclass."""

    def check(self, context: Context) -> None:
        """Raises UserError for what can be known to fail before anything runs."""
        ...

    def exposure(self, context: Context) -> Exposure:
        """Returns which preference models the judge is, and which pairs those were fitted to."""
        ...

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns the jitted programs that judging calls."""
        ...

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Judge:
        """Returns the judge, over those programs."""
        ...

    def describe(self) -> str:
        """Returns who judges, in words for a report."""
        ...


@dataclasses.dataclass(frozen=True)
class Oracle:
    """One of the task's exact oracles."""

    name: str

    def check(self, context: Context) -> None:
        """Raises UserError when the task has no such oracle."""
        oracles = context.task.oracles
        if self.name not in oracles:
            raise UserError(f"{context.name}: task {context.task.name!r} has no oracle {self.name!r}; "
                            f"it has {', '.join(oracles) or 'none'}")  # fmt: skip

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: an oracle is no model."""
        return Exposure()

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns nothing: an oracle is not compiled."""
        return ()

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Judge:
        """Returns the oracle as a judge."""
        return judges.oracle_judge(context.task.oracles[self.name])

    def describe(self) -> str:
        """Returns who judges."""
        return f"the task's exact oracle {self.name!r}"


@dataclasses.dataclass(frozen=True)
class ModelJudge:
    """A preference model that a stage made."""

    stage: str = stage_input(Kind.PREFERENCE)

    def check(self, context: Context) -> None:
        """Does nothing: the stage has been checked."""

    def exposure(self, context: Context) -> Exposure:
        """Returns the exposure of the preference model."""
        return context.exposure(self.stage)

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns the program that compares replies. Its sizes are in the policies' tokens; the judge's may differ."""
        network = context.abstract(self.stage)
        return (judging_program(context, name, self.model(context, network).logit, network, sizes),)

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Judge:
        """Returns the preference model as a judge."""
        return open_judge(context, programs[0], context.load(self.stage), sizes)

    def model(self, context: Context, network: Network) -> PreferenceModel:
        """Returns the form of the stage's preference model."""
        return context.experiment.stages[self.stage].preference_model(context.task, network)

    def describe(self) -> str:
        """Returns who judges."""
        return f"the preference model of stage {self.stage}"


@dataclasses.dataclass(frozen=True)
class LanguageModelJudge:
    """A language model, as it is, asked a question about two replies, in both orders (RLAIF, 2307.12950 section 4)."""

    stage: str = stage_input(Kind.POLICY)
    question: Template | None = None  # with both answers; None: the task's template

    def check(self, context: Context) -> None:
        """Raises UserError when the question lacks an answer, or an answer is known not to be one token."""
        if not self.asked(context).other:
            raise UserError(
                f"{context.name}: the question of a language-model judge needs both answers; give ``other``"
            )
        check_answers(context, self.stage, [self.asked(context)])

    def exposure(self, context: Context) -> Exposure:
        """Returns the language model as one that is asked, and what it was trained on."""
        return context.asked_exposure(self.stage)

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns the program that asks the question."""
        return (rating_program(context, name, self.stage, [self.asked(context)], sizes),)

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Judge:
        """Returns the language model as a judge."""
        rater = open_rater(context, programs[0], context.load(self.stage), sizes)
        return question_judge(rater, self.asked(context))

    def asked(self, context: Context) -> Template:
        """Returns the question. Raises UserError when neither the judge nor the task has one."""
        if self.question:
            return self.question
        if (template := context.task.template) is None:
            raise UserError(f"{context.name}: task {context.task.name!r} has no template to show two replies in; "
                            "give the judge a question")  # fmt: skip
        return as_question(template, context.task.format)

    def describe(self) -> str:
        """Returns who judges."""
        return f"the language model of stage {self.stage}, asked in both orders"


@dataclasses.dataclass(frozen=True)
class HTTPJudge:
    """A chat model behind an OpenAI-compatible endpoint, asked a question about two replies.

    Its answers are kept in the stage's folder, so that a resumed stage asks nothing twice. Prompts and replies leave
    this machine.
    """

    url: str = dataclasses.field(metadata=NO_EFFECT)  # up to and without /chat/completions: http://localhost:8000/v1
    model: str
    question: Question  # ``choice_question("Which reply is more helpful?")``, or one of your own
    parse: Parse = parse_choice  # reads the verdict in the text of an answer
    top_logprobs: int = 0  # 0: ``parse`` reads the text; else so many log-probs a token are asked for, and A and B read
    both_orders: bool = True  # False: each pair is shown once, the first reply first; the model's position bias stays
    max_tokens: int = 64  # of an answer
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of the request's body; None leaves one out
    key_variable: str | None = no_effect(None)  # the environment variable that holds the key
    limits: http_client.Limits = no_effect(http_client.Limits())
    prices: Prices | None = no_effect(None)  # of a million tokens; None: no cost is reported

    def __post_init__(self) -> None:
        check_range(self, 1, 2**20, "max_tokens")
        check_range(self, 0, 20, "top_logprobs")

    def check(self, context: Context) -> None:
        """Raises UserError when the url is malformed, the question lacks a place, the key's variable is not set, or
        the options cannot be part of a request. Nothing is sent."""
        try:
            http_client.check_url(self.url)
            http_judge.check_question(self.question)
            self.check_settings()
            if context.hosts.is_first:
                http_client.read_key(self.key_variable)
        except UserError as error:
            raise UserError(f"{context.name}: the HTTP judge {self.model!r}: {error}") from None

    def check_settings(self) -> None:
        """Raises UserError when the model or the options cannot be part of a request."""
        if not self.model:
            raise UserError("model is empty; give the name under which the endpoint serves it")
        if taken := {"model", "messages", "stream", "n", "logprobs", "top_logprobs"} & set(self.options):
            raise UserError(f"options cannot hold {min(taken)!r}; leave it out")
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError):
            raise UserError(f"options={short_repr(self.options)} is not JSON; use texts, numbers and lists") from None

    def settings(self) -> dict[str, Any]:
        """Returns the entries of a request's body beside its messages."""
        read = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {}
        body = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens, **read, **self.options}
        return {name: value for name, value in body.items() if value is not None}

    def exposure(self, context: Context) -> Exposure:
        """Returns the model's own identity: its name, wherever it is asked. What it was trained on is unknown."""
        return Exposure(identity=frozenset({hashlib.sha256(self.model.encode()).hexdigest()[:16]}))

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns nothing: what it computes, it computes elsewhere."""
        return ()

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Judge:
        """Returns the chat model as a judge that counts."""
        client = http_client.Client(self.url, self.key_variable, context.folder / "answers", self.limits)

        def ask(bodies: Sequence[Body]) -> list[Answer]:
            """Returns the answers, and shows how many there are. Raises UserError when all lack their log-probs."""
            with progress_bar(len(bodies), 0, context.name, "question") as bar:
                answers = http_client.ask_all(client, bodies, context.hosts, bar.update)
            if self.top_logprobs and not any(answer.has_log_probs for answer in answers):
                raise UserError(f"{context.name}: the HTTP judge {self.model!r}: {self.url} returns no top_logprobs; "
                                "set top_logprobs=0 to have the text read")  # fmt: skip
            return answers

        read = (
            http_judge.choice_probability
            if self.top_logprobs
            else functools.partial(http_judge.parse_answer, self.parse)
        )
        form = http_judge.Form(self.question, self.settings(), read, self.both_orders)
        return http_judge.QuestionJudge(ask, form, self.prices)

    def describe(self) -> str:
        """Returns who judges."""
        orders = "both orders" if self.both_orders else "one order"
        return f"the model {self.model} at {self.url}, asked in {orders}"


def judging_program(context: Context, name: str, logit: OrderedLogit, network: Network, sizes: JudgeSizes) -> Program:
    """Returns the program of a ``preferences.judges.preference_asker`` of a logit, for texts of these sizes."""
    prompt, reply = judges.judged_length(sizes.prompt), judges.judged_length(sizes.reply)
    replies = abstract_tokens(sizes.batch, reply)
    arguments = network.all_params, abstract_tokens(sizes.batch, prompt), replies, replies
    ask = judges.preference_asker(logit, context.mesh)
    return Program(name, ask, arguments, sizes.batch * 2 * (prompt + 2 * reply))


def open_judge(context: Context, program: Program, network: Network, sizes: JudgeSizes) -> Judge:
    """Returns the judge that asks a network through a compiled program."""
    return judges.model_judge(
        program.function, network.all_params, network.tokenizer, context.task.format,
        batch=sizes.batch, mesh=context.mesh, owner=f"{context.name}: the judge {network.stage!r}",
    )  # fmt: skip


def check_held_out(context: Context, judge: str, spec: Any, policies: Iterable[str]) -> None:
    """Raises UserError when the judge is not independent of a policy's training.

    It is not where the judge is a network that the policy was trained against, is made from one, or learned from its
    labels; nor where it was fitted to pairs that the policy, or a preference model that it was trained against, was
    fitted to or measured on.
    """
    judged = spec.exposure(context)
    models = judged.identity | judged.made_from | judged.trained_against
    for policy in policies:
        trained = context.exposure(policy)
        if models & trained.trained_against:
            raise UserError(f"{context.name}: judge {judge!r} is, is made from, or was taught by a model that "
                            f"{policy!r} was trained against; name a held-out judge")  # fmt: skip
        if judged.fitted & (trained.fitted | trained.measured):
            raise UserError(f"{context.name}: judge {judge!r} was fitted to pairs that {policy!r}, or the preference "
                            "model that it was trained against, has seen; name a held-out judge")  # fmt: skip
