"""Preference model -> a policy, on-policy, against an opponent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax.distributed import sharding
from alignjax.errors import UserError, check_range
from alignjax.models.log_probs import log_prob
from alignjax.models.lora import Lora
from alignjax.models.tokenizer import Tokenizer, decode_reply, encode_continuation, pad
from alignjax.pipeline.experiment import POLICY, PREFERENCE, Context, Program, ids_of, shape
from alignjax.pipeline.networks import Network, Record, Trainable, derived, gathering, trainable
from alignjax.pipeline.stages.label import check_stop, stop_tokens, unseen_stops
from alignjax.preferences import judges
from alignjax.preferences.models import Preference
from alignjax.sampling import samplers as rollout
from alignjax.sampling.process import Process, Sample, Stop
from alignjax.tasks.task import EOS, Task
from alignjax.training import data
from alignjax.training import learn as train
from alignjax.training.loop import Adam, Learning, Loop, run_loop
from alignjax.types import Array, Key, Metrics, Params, Rollout, Tokens, TrainState


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
    lora: Lora | None = None  # train adapters over the start's frozen parameters
    response: int | None = None  # most tokens of a response to a preference model of another tokenizer; None: twice
    average_decay: float | None = None  # of the weights' moving average, for rollout.moving_average
    unfinished_loses: bool = True
    gather: bool = True  # the weights that write, over data and fsdp, before they do; False: where there is no room

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts", "buckets", "max_new_tokens")
        if self.average_decay is not None:
            check_range(self, 0, 1, "average_decay")
        if self.response is not None:
            check_range(self, 1, math.inf, "response")

    def inputs(self) -> tuple[str, ...]:
        return (self.start, self.reference, self.preference)

    def check(self, context: Context) -> None:
        self.loop.check(context, self.prompts)
        context.expect(self.start, POLICY)
        context.expect(self.reference, POLICY)
        context.expect(self.preference, PREFERENCE)
        context.task.source.prompts("train", 1, context.seed)
        for source in (self.start, self.reference):
            context.expect_room(source, "buckets", max(self.buckets) + self.max_new_tokens)
        context.expect_targets(self.start, self.lora)
        check_stop(context, self.start)
        rehearse(context, self.opponent, self.objective)
        if self.opponent is rollout.moving_average and self.average_decay is None:
            raise UserError(f"{context.name}: the opponent moving_average needs average_decay; set it, e.g. 0.999")

    def record(self, context: Context) -> Record:
        return derived(context.record(self.start), self.start, self.lora, {})

    def learning(self, task: Task, start: Network, trained: Trainable, built: Preference, shares: bool) -> Learning:
        """The update: it draws and compares as well where policy and preference model share their tokens; else it is
        given what ``translator`` makes."""
        score = log_prob(start.model)
        collect = rollout.collector(
            self.responder(task, start), score, built.logit, self.unfinished_loses, unseen_stops(task, start.tokenizer)
        )

        def compare(params: Params, average: Params, frozen: Any, batch: Any, key: Key) -> Rollout:
            return rollout.compared(score, built.logit, self.unfinished_loses, frozen, *batch)

        def objective(params: Params, batch: Any, key: Key) -> tuple[Array, Metrics]:
            return self.objective(params, batch, key, log_prob=score)

        return Learning(
            self.loop, self.adam, trained.rules, objective, collect if shares else compare, trained.whole,
            self.average_decay,
        )  # fmt: skip

    def responder(self, task: Task, start: Network) -> rollout.Respond:
        model = gathering(start.model) if self.gather else start.model
        return rollout.responder(model, self.opponent, self.max_new_tokens, stop_tokens(task, start.tokenizer))

    def networks(self, context: Context) -> tuple[Network, Network, Network, Preference]:
        """The start, the reference, and the preference model with its form."""
        start, reference = context.policy(self.start), context.policy(self.reference)
        if reference.model.config != start.model.config or reference.fingerprint != start.fingerprint:
            raise UserError(
                f"{context.name}: {self.start!r} and {self.reference!r} are different models; use one start"
            )
        return start, reference, *context.preference(self.preference)

    def programs(self, context: Context) -> Iterator[Program]:
        """The update a bucket, and the drawing where text lies between."""
        start, reference, fitted, built = self.networks(context)
        trained, shares = trainable(start, self.lora, context.key), shares_tokens(context.task, start, fitted)
        learning = self.learning(context.task, start, trained, built, shares)
        frozen = {**trained.frozen, "reference": reference.params, "preference": fitted.params}
        size, new, longest = self.loop.batch, self.max_new_tokens, self.response or 2 * self.max_new_tokens
        for length in self.buckets:
            prompt, y, seen = ids_of(size, length), ids_of(size, new), ids_of(size, longest)
            batch: Any = prompt
            if not shares:
                logp, finished = shape("float32", size, new), shape("bool", size)
                drawn = Sample(y, logp, finished)
                shown = rollout.Seen(ids_of(size, judges.ceil_to(length, 32)), seen, seen, (finished, finished))
                batch = (rollout.Drawn(prompt, drawn, drawn), shown)
            tokens = size * (length + 2 * new)
            update = learning.program(f"update {length}", trained.params, frozen, batch, context, tokens)
            if not shares:
                draw = drawer(context, self.responder(context.task, start), trained)
                yield Program(f"draw {length}", draw, (*update.arguments[:2], prompt), tokens)
            yield update

    def run(self, context: Context) -> dict[str, Any]:
        task = context.task
        start, reference, fitted, built = self.networks(context)
        trained, shares = trainable(start, self.lora, context.key), shares_tokens(task, start, fitted)
        prompts = task.source.prompts("train", self.prompts, context.seed)
        ids = [start.tokenizer.encode(text) for text in prompts]
        kept = [i for i, row in enumerate(ids) if len(row) <= max(self.buckets)]
        if not kept:
            raise UserError(f"{context.name}: all {len(ids)} prompts are longer than {max(self.buckets)} tokens; "
                            f"add a larger one to {context.name}.buckets")  # fmt: skip
        before = None
        if not shares:
            longest, texts = self.response or 2 * self.max_new_tokens, [prompts[i] for i in kept]
            respond, stop = self.responder(task, start), stop_tokens(task, start.tokenizer)
            before = translator(context, respond, trained, start.tokenizer, fitted.tokenizer, texts, stop, longest)
        plan = data.planned([len(ids[i]) for i in kept], self.buckets, self.loop.batch, context.seed)

        def make_batch(chosen: data.Plan) -> Tokens:
            return pad([ids[kept[i]] for i in chosen.indices], chosen.length)

        frozen = {**trained.frozen, "reference": reference.params, "preference": fitted.params}
        learning = self.learning(task, start, trained, built, shares)
        start = context.released(start)
        params, found = run_loop(context, learning, trained.params, plan, make_batch, frozen, before)
        context.save(start, params, trained.adapter)
        return {"prompts": len(kept), "too_long": len(ids) - len(kept), **found}


def rehearse(context: Context, opponent: Callable[..., Any], objective: Callable[..., Any]) -> None:
    """Traces both over one token, for what they refuse of their own settings."""
    token, number, numbers = Tokens(np.zeros((1, 1), np.int32), np.ones((1, 1), bool)), np.zeros(1), np.zeros((1, 1))
    process = Process(lambda carry, token: (carry, numbers), (), numbers)
    seen = Rollout(token, token, token, number, numbers)

    def answer() -> None:
        opponent(lambda params: process, {}, {}, {})

    def judge() -> None:
        objective({}, seen, context.key, log_prob=lambda params, prompt, y: numbers)

    context.rehearse("opponent", lambda: jax.eval_shape(answer))
    context.rehearse("objective", lambda: jax.eval_shape(judge))


def shares_tokens(task: Task, policy: Network, preference: Network) -> bool:
    """Whether the preference model can read the policy's tokens as they are: their tokenizers are equal, and no
    end token stands where the task's format has an end marker of its own."""
    return policy.fingerprint == preference.fingerprint and not (EOS in task.format.stop and task.format.end)


def translator(
    context: Context,
    respond: rollout.Respond,
    trained: Trainable,
    mine: Tokenizer,
    theirs: Tokenizer,
    prompts: Sequence[str],
    stop: Stop,
    longest: int,
) -> Callable[[TrainState, Any, Tokens], tuple[rollout.Drawn, rollout.Seen]]:
    """What run_loop does ``before`` an update where text lies between policy and preference model: answers are drawn,
    read as text, filtered as the task does, and written in the preference model's tokens. A reply that the filter
    refuses is empty, and one longer than ``longest`` tokens is cut there."""
    task, draw = context.task, drawer(context, respond, trained)
    known = {tuple(mine.encode(prompt)): theirs.encode(prompt) for prompt in prompts}
    room = judges.ceil_to(max(map(len, known.values())), 32)

    everywhere = jax.jit(lambda tokens: tokens, out_shardings=sharding.replicated(context.mesh))

    def rows_of(tokens: Tokens) -> list[list[int]]:
        """The real tokens of every row, on every host."""
        whole = everywhere(tokens)
        return [row[real].tolist() for row, real in zip(np.asarray(whole.tokens), np.asarray(whole.mask), strict=True)]

    def translated(sample: Sample) -> tuple[Tokens, np.ndarray]:
        texts = [decode_reply(mine, row, stop, task.format.end) for row in rows_of(sample.completion)]
        replies = [task.clean(text) or "" for text in texts]
        ids = [encode_continuation(theirs, judges.reply_text(task.format, reply))[:longest] for reply in replies]
        return pad(ids, longest), np.array([bool(reply) for reply in replies])

    def before(state: TrainState, frozen: Any, prompt: Tokens) -> tuple[rollout.Drawn, rollout.Seen]:
        drawn = draw(state, train.Once(frozen), prompt)
        shown = [known[tuple(row)] for row in rows_of(prompt)]
        (y, answered), (other, other_answered) = translated(drawn.y), translated(drawn.opponent)
        seen = rollout.Seen(pad(shown, room), y, other, (answered, other_answered))
        return drawn, sharding.place(context.mesh, seen)

    return before


def drawer(context: Context, respond: rollout.Respond, trained: Trainable):
    """(state, frozen trees as train.Once, prompt) -> what the update would draw; jitted."""
    rows = sharding.rows(context.mesh)

    def draw(state: TrainState, once: train.Once, prompt: Tokens) -> rollout.Drawn:
        frozen = once.tree()
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
        average = trained.whole(state.average, frozen) if state.average else state.average
        return respond(trained.whole(state.params, frozen), average, frozen, prompt, key)

    return jax.jit(draw, in_shardings=(None, None, rows), out_shardings=rows, keep_unused=True)
