"""Pairs -> a preference model, of either form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax import objectives
from alignjax.distributed import storage
from alignjax.errors import UserError, check_range
from alignjax.models.build import build
from alignjax.models.lora import Lora
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, encode_continuation, pad, stand_in
from alignjax.pipeline.experiment import PAIRS, POLICY, PREFERENCE, REWARD, Context, Program, ids_of, shape
from alignjax.pipeline.networks import Adapter, Network, Record, Trainable, derived, trainable
from alignjax.pipeline.stages.label import PAIR_DATA
from alignjax.preferences import judges
from alignjax.preferences import models as preference
from alignjax.tasks.task import Task
from alignjax.training import data
from alignjax.training.loop import Adam, Learning, Loop, run_loop
from alignjax.types import Array, Key, Metrics, Pair, Params


@dataclasses.dataclass(frozen=True)
class FitPreference:
    """A preference model on a Label stage's pairs, from the parameters of ``start``."""

    makes: ClassVar = PREFERENCE
    start: str
    pairs: str
    adam: Adam
    loop: Loop
    buckets: tuple[int, ...]  # prompt lengths in tokens
    response: int  # most tokens of a response
    form: Callable[..., preference.Preference] = preference.pairwise  # or bradley_terry
    lora: Lora | None = None  # train adapters and head over the start's frozen parameters
    truth: str | None = None  # a Label stage to be measured on; ``pairs`` itself stands for its held-out split

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "buckets", "response")

    def inputs(self) -> tuple[str, ...]:
        return (self.start, self.pairs, *([self.truth] if self.truth else []))

    def check(self, context: Context) -> None:
        self.loop.check(context)
        context.expect(self.start, POLICY, PREFERENCE, REWARD)
        context.expect(self.pairs, PAIRS)
        context.expect_targets(self.start, self.lora)
        context.expect_room(self.start, "buckets", max(self.buckets) + 2 * self.response)
        check_template(context, self.start, self.form)
        if self.truth:
            context.expect(self.truth, PAIRS)
        if self.truth == self.pairs and not getattr(context.experiment.stages[self.pairs], "held_out", 1.0):
            raise UserError(f"{context.name}: truth and pairs are both {self.pairs!r}, which holds nothing out; "
                            f"set {self.pairs}.held_out, or name another stage")  # fmt: skip

    def build(self, task: Task, model: Model, tokenizer: Tokenizer) -> preference.Preference:
        return self.form(model, preference.template_tokens(tokenizer, task.template))

    def record(self, context: Context) -> Record:
        start = context.record(self.start)
        built = self.build(context.task, build(start.config), stand_in(start.config.vocab_size))
        return derived(start, self.start, self.lora, new_heads(built, build(start.config)))

    def learning(self, trained: Trainable, built: preference.Preference) -> Learning:
        def objective(params: Params, pair: Pair, key: Key) -> tuple[Array, Metrics]:
            return objectives.preference_cross_entropy(params, pair, key, logit=built.logit)

        return Learning(self.loop, self.adam, trained.rules, objective, whole=trained.whole)

    def programs(self, context: Context) -> Iterator[Program]:
        start, batch = context.policy(self.start), self.loop.batch
        built = self.build(context.task, start.model, start.tokenizer)
        trained = trainable(start, self.lora, context.key, built)
        response, p = ids_of(batch, self.response), shape("float32", batch)
        for length in self.buckets:
            update = self.learning(trained, built).program(
                f"update {length}", trained.params, trained.frozen, Pair(ids_of(batch, length), response, response, p),
                context, batch * 2 * (length + 2 * self.response),
            )  # fmt: skip
            yield update
        if self.truth:
            whole = trained.whole(update.arguments[0].params, trained.frozen)
            yield judging("measure", context, built, whole, batch, max(self.buckets), self.response)

    def run(self, context: Context) -> dict[str, Any]:
        task, start = context.task, context.policy(self.start)
        built = self.build(task, start.model, start.tokenizer)
        rows = data.read_pairs(context.workdir / self.pairs / PAIR_DATA, "train")
        encoded, fit = encode_pairs(rows, start.tokenizer, task, max(self.buckets), self.response)
        plan = data.planned([len(row[0]) for row in encoded], self.buckets, self.loop.batch, context.seed)

        def make_batch(chosen: data.Plan) -> Pair:
            prompts, first, second, p = zip(*(encoded[i] for i in chosen.indices), strict=True)
            return Pair(
                pad(prompts, chosen.length), pad(first, self.response), pad(second, self.response),
                np.asarray(p, np.float32),
            )  # fmt: skip

        if self.truth:
            self.measured(context, start.tokenizer)  # refused now, not after the training
        trained = trainable(start, self.lora, context.key, built)
        start = context.released(start)
        params, found = run_loop(
            context, self.learning(trained, built), trained.params, plan, make_batch, trained.frozen
        )  # fmt: skip
        context.save(start, params, trained.adapter)
        describe_form(context, self.form)
        figures: dict[str, Any] = {"pairs": len(fit), "too_long": len(rows) - len(fit), **found}
        if self.truth:
            figures["held_out"] = self.measure(context, start, built, trained.whole(params, trained.frozen))
        return figures

    def measure(
        self, context: Context, start: Network, built: preference.Preference, params: Params
    ) -> dict[str, float]:
        """Accuracy and calibration on the pairs of ``truth``."""
        rows, too_long = self.measured(context, start.tokenizer)
        judge = judges.model_judge(
            built.logit, params, start.tokenizer, context.task.format,
            batch=self.loop.batch, mesh=context.mesh,
        )  # fmt: skip
        p = judge(*([row[name] for row in rows] for name in ("prompt", "first", "second")))
        calibration = judges.calibration(p, np.array([row["p"] for row in rows]))
        return {**calibration, "too_long": too_long}

    def measured(self, context: Context, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], int]:
        """The pairs of ``truth``, and how many are left out because they are longer than buckets and response allow in
        training: the longest would decide what is compiled. Raises UserError when none is left."""
        split = "held_out" if self.truth == self.pairs else "train"
        found = data.read_pairs(context.workdir / (self.truth or "") / PAIR_DATA, split)
        _, rows = encode_pairs(found, tokenizer, context.task, max(self.buckets), self.response)
        return rows, len(found) - len(rows)


def judging(
    name: str, context: Context, built: preference.Preference, params: Params, batch: int, prompt: int, reply: int
) -> Program:
    """What a model_judge compiles for texts of at most so many tokens."""
    prompt, reply = judges.ceil_to(prompt, 32), judges.ceil_to(reply, 32)
    arguments = params, ids_of(batch, prompt), ids_of(batch, reply), ids_of(batch, reply)
    return Program(name, judges.asker(built.logit, context.mesh), arguments, batch * 2 * (prompt + 2 * reply))


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """A policy or a reward model's folder as a preference model, as it is: nothing is trained, no backbone copied."""

    makes: ClassVar = PREFERENCE
    start: str
    form: Callable[..., preference.Preference] = preference.choice

    def inputs(self) -> tuple[str, ...]:
        return (self.start,)

    def check(self, context: Context) -> None:
        context.expect(self.start, POLICY, REWARD)
        check_template(context, self.start, self.form)

    def build(self, task: Task, model: Model, tokenizer: Tokenizer) -> preference.Preference:
        return self.form(model, preference.template_tokens(tokenizer, task.template))

    def record(self, context: Context) -> Record:
        return dataclasses.replace(context.record(self.start), adapter=Adapter(self.start, None))

    def run(self, context: Context) -> dict[str, Any]:
        start = context.policy(self.start)
        built = self.build(context.task, start.model, start.tokenizer)
        heads = built.extend(start.params, context.key).keys() - start.params.keys()
        if missing := heads - start.heads.keys():
            raise UserError(f"{context.name}: {self.form.__name__} needs the head {min(missing)!r}, which "
                            f"{self.start!r} has not; use FitPreference")  # fmt: skip
        context.save(start, {name: start.heads[name] for name in heads}, Adapter(self.start, None))
        describe_form(context, self.form)
        return {}


def new_heads(built: preference.Preference, model: Model) -> dict[str, Any]:
    """The nested shapes of what a form has beyond its backbone."""
    backbone = jax.eval_shape(model.init, jax.random.key(0))
    whole = jax.eval_shape(built.extend, backbone, jax.random.key(0))
    return jax.tree.map(lambda x: list(x.shape), {n: part for n, part in whole.items() if n not in backbone})


def check_template(context: Context, start: str, form: Callable[..., preference.Preference]) -> None:
    """Raises UserError when the task's template is known not to suit the form or the tokenizer of ``start``. (Pretrain
    holds its own tokenizer to it, as soon as that is trained.)"""
    task = context.task
    if task.template is None:
        raise UserError(f"{context.name}: task {task.name!r} has no template to show two replies in; give it one")
    if form is preference.choice and not task.template.other:
        raise UserError(f"{context.name}: preference.choice needs both answers; give task {task.name!r} template.other")
    if tokenizer := context.tokenizer(start):
        preference.template_tokens(tokenizer, task.template)


def describe_form(context: Context, form: Callable[..., preference.Preference]) -> None:
    """What an exported preference model's folder says of how to ask it."""
    task, name = context.task, getattr(form, "__name__", str(form))
    said = {"form": name, "template": task.template._asdict(), "format": task.format._asdict()}
    storage.write_json(context.folder / "preference.json", said)


def encode_pairs(rows, tokenizer: Tokenizer, task: Task, longest_prompt: int, longest: int):
    """Rows of text -> (prompt, first, second) ids and p of those that are not too long; and these rows."""
    encoded, fit = [], []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        sides = [
            encode_continuation(tokenizer, judges.reply_text(task.format, row[name])) for name in ("first", "second")
        ]
        if len(prompt) <= longest_prompt and max(map(len, sides)) <= longest:
            encoded.append((prompt, *sides, row["p"]))
            fit.append(row)
    if not encoded:
        raise UserError(f"none of {len(rows)} pairs fits prompts of {longest_prompt} and responses of {longest} "
                        "tokens; raise buckets or response")  # fmt: skip
    return encoded, fit
