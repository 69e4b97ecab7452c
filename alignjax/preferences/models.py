"""Preference models over a backbone: P(first > second | prompt), antisymmetric by construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.errors import UserError
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, encode_continuation, single_token
from alignjax.tasks.task import Template
from alignjax.types import Array, Completion, Key, Params, PreferenceLogit, Prompt, Rules, Tokens


class TemplateTokens(NamedTuple):
    """A task's Template in one tokenizer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    question: tuple[int, ...]
    answer: int
    other: int | None = None


class Preference(NamedTuple):
    """A form of preference model. Its parameters are the backbone's, and a head's if it has one."""

    extend: Callable[[Params, Key], Params]  # a backbone's parameters -> the first ones of this form
    logit: PreferenceLogit
    rules: Rules


def template_tokens(tokenizer: Tokenizer, template: Template) -> TemplateTokens:
    """Raises UserError when an answer is not one token."""

    def one(name: str) -> int:
        try:
            return single_token(tokenizer, getattr(template, name))
        except UserError as error:
            raise UserError(f"task.template.{name}: {error}") from None

    before, between, question = (tuple(encode_continuation(tokenizer, text)) for text in template[:3])
    return TemplateTokens(before, between, question, one("answer"), one("other") if template.other else None)


def pairwise(model: Model, template: TemplateTokens) -> Preference:
    """P(y > y' | x) = sigmoid(s(x, y, y') - s(x, y', y)), s the logit of one fixed token after a context
    that shows both responses (2312.00886 section 7). It can express intransitive preferences."""

    return of_both(model, template, lambda params, state: picked(model.unembed(params, state), template.answer))


def choice(model: Model, template: TemplateTokens) -> Preference:
    """As ``pairwise``, s the log-odds of the token that says "the first" against the one that says "the second". The
    two orders' mean takes a rater's position bias out, so that a language model is one as it is (RLAIF's question,
    2307.12950 section 4) or after training. Raises UserError when the template names no other answer."""
    if template.other is None:
        raise UserError("preference.choice needs a template with both answers; give its ``other``")
    answer, other = template.answer, template.other

    def odds(params: Params, state: Array) -> Array:
        logits = model.unembed(params, state)
        return 0.5 * (picked(logits, answer) - picked(logits, other))

    return of_both(model, template, odds)


def picked(logits: Array, token: int) -> Array:
    """[B, V] -> [B]. A sum and not a slice, which the TPU's compiler cannot always cut out of a sharded vocabulary."""
    return jnp.sum(jnp.where(jnp.arange(logits.shape[-1])[None] == token, logits, 0.0), -1)


def pairwise_head(model: Model, template: TemplateTokens) -> Preference:
    """As ``pairwise``, s linear in the state after the question, zero at the start."""

    def linear(params: Params, state: Array) -> Array:
        return state.astype(jnp.float32) @ params["pairwise"]["kernel"]

    built = of_both(model, template, linear, ("pairwise",))
    return Preference(head("pairwise", model), built.logit, ((r"^pairwise/", REPLICATED), *model.rules))


REPLICATED = jax.sharding.PartitionSpec()


def head(name: str, model: Model) -> Callable[[Params, Key], Params]:
    """Extends a backbone by a zero vector of the model's width."""
    return lambda params, key: {**params, name: {"kernel": jnp.zeros((model.config.width,), jnp.float32)}}


def of_both(
    model: Model,
    template: TemplateTokens,
    read: Callable[[Params, Array], Array],
    heads: tuple[str, ...] = (),
) -> Preference:
    """s(x, y, y') - s(x, y', y), s = read(params, the state [B, D] after a context that shows both responses)."""

    def score(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        parts = (template.before, first, template.between, second, template.question)
        backbone = {name: part for name, part in params.items() if name not in heads}
        return read(params, model.final(backbone, join(prompt, *parts)))

    def margin(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        scores = score(params, twice(prompt, prompt), twice(first, second), twice(second, first))
        return scores[0::2] - scores[1::2]

    return Preference(lambda params, key: params, antisymmetric(margin), model.rules)


def bradley_terry(model: Model, template: TemplateTokens) -> Preference:
    """P(y > y' | x) = sigmoid(r(x, y) - r(x, y')), r linear in the state after the response, zero at
    the start (2307.12950; Bradley and Terry 1952). ``template`` is not used: the forms are exchangeable."""

    def reward(params: Params, prompt: Prompt, response: Completion) -> Array:
        state = model.final({k: v for k, v in params.items() if k != "reward"}, join(prompt, response))
        return state.astype(jnp.float32) @ params["reward"]["kernel"]

    def margin(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        rewards = reward(params, twice(prompt, prompt), twice(first, second))
        return rewards[0::2] - rewards[1::2]

    return Preference(head("reward", model), antisymmetric(margin), ((r"^reward/", REPLICATED), *model.rules))


def antisymmetric(margin: PreferenceLogit) -> PreferenceLogit:
    """Makes an odd function exactly odd: each pair is put in a fixed order first, so that both orders run
    the same numbers and differ in the sign alone. Equal responses get 0."""

    def logit(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        first, second = same_length(first, second)
        order = lexicographic(first, second)
        low, high = choose(order > 0, second, first), choose(order > 0, first, second)
        return -order * margin(params, prompt, low, high)

    return logit


def lexicographic(first: Completion, second: Completion) -> Array:
    """-1, 0 or 1 a row, as first comes before, equals or comes after second; [B] float32."""
    a, b = (jnp.where(x.mask, x.tokens + 1, 0) for x in (first, second))
    where = jnp.argmax(a != b, axis=-1)[:, None]
    return jnp.sign(jnp.take_along_axis(a - b, where, -1)[:, 0]).astype(jnp.float32)


def probability(logit: Array) -> Array:
    """sigmoid(logit), with P(x) + P(-x) = 1 exactly: 1 - s has no rounding for s in [1/2, 1]."""
    s = jax.nn.sigmoid(jnp.abs(logit))
    return jnp.where(logit >= 0, s, 1 - s)


def join(prompt: Prompt, *parts: Tokens | tuple[int, ...]) -> Prompt:
    """One context out of padded pieces and constant ids; padding between pieces changes nothing."""
    batch = prompt.tokens.shape[0]

    def rows(part: Tokens | tuple[int, ...]) -> Tokens:
        if isinstance(part, Tokens):
            return part
        shape = (batch, len(part))
        return Tokens(jnp.broadcast_to(np.asarray(part, np.int32), shape), jnp.ones(shape, bool))

    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), prompt, *map(rows, parts))


def twice(a: Tokens, b: Tokens) -> Tokens:
    """Rows a0, b0, a1, b1, ...: interleaved, so that a sharded batch stays where it is."""
    return jax.tree.map(lambda x, y: jnp.stack([x, y], 1).reshape(-1, *x.shape[1:]), a, b)


def choose(which: Array, a: Tokens, b: Tokens) -> Tokens:
    return jax.tree.map(lambda x, y: jnp.where(which[:, None], x, y), a, b)


def same_length(a: Tokens, b: Tokens) -> tuple[Tokens, Tokens]:
    length = max(a.tokens.shape[1], b.tokens.shape[1])

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

    return jax.tree.map(widen, a), jax.tree.map(widen, b)
