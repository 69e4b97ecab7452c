"""Preference models over a backbone: P(first > second | prompt), antisymmetric wherever it judges or is learned from.

``one_order`` is fitted as it is in 2312.00886, where the order of the responses matters, and asked in both orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.errors import UserError
from alignjax.models.heads import apply_head, init_head
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, encode_continuation, single_token
from alignjax.tasks.task import Template
from alignjax.types import (
    Array,
    Completion,
    OrderedLogit,
    Params,
    PreferenceLogit,
    Prompt,
    Reward,
    Tokens,
    stack_rows,
)


class TemplateTokens(NamedTuple):
    """A task's Template as the token ids of one tokenizer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    question: tuple[int, ...]
    answer: int
    other: int | None = None


class PreferenceModel(NamedTuple):
    """A form of preference model over a backbone; its parameters are the backbone's and, beside them, its heads."""

    init_heads: Callable[[], Params]  # the first heads; empty where the form has none
    logit: PreferenceLogit  # what judges and policies ask
    reward: Reward | None  # r(x, y) where P(y > y') = sigmoid(r(x, y) - r(x, y'))
    ordered: OrderedLogit | None = None  # what is fitted, where that depends on the order; None: ``logit`` is fitted

    @property
    def fitted(self) -> OrderedLogit:
        """The logit that FitPreference trains."""
        return self.ordered or self.logit


PreferenceForm = Callable[[Model, TemplateTokens], PreferenceModel]
"""``pairwise``, ``choice``, ``pairwise_head``, ``one_order`` or ``bradley_terry``."""


def template_tokens(tokenizer: Tokenizer, template: Template) -> TemplateTokens:
    """Returns the template in the tokenizer's ids. Raises UserError when an answer is not one token."""

    def one_token(name: str, text: str) -> int:
        try:
            return single_token(tokenizer, text)
        except UserError as error:
            raise UserError(f"task.template.{name}: {error}") from None

    before, between, question = (tuple(encode_continuation(tokenizer, text)) for text in template[:3])
    other = one_token("other", template.other) if template.other else None
    return TemplateTokens(before, between, question, one_token("answer", template.answer), other)


def pairwise(model: Model, template: TemplateTokens) -> PreferenceModel:
    """Returns P(y > y' | x) = sigmoid(s(x, y, y') - s(x, y', y)), s the logit of one fixed token.

    The token stands after a context that shows both responses (2312.00886 section 7). The form can express
    intransitive preferences.
    """

    def score(params: Params, state: Array) -> Array:
        return token_logit(model.logits(params, state), template.answer)

    return _over_both_orders(model, template, score, {})


def choice(model: Model, template: TemplateTokens) -> PreferenceModel:
    """Returns ``pairwise`` with s half the log-odds of "the first" against "the second".

    A language model answers this question without training (RLAIF, 2307.12950 section 4); the mean over both orders
    removes its position bias. Raises UserError when the template has no ``other`` answer.
    """
    if template.other is None:
        raise UserError("preference form `choice` needs both answers; give the task's template an ``other``")
    answer, other = template.answer, template.other

    def score(params: Params, state: Array) -> Array:
        logits = model.logits(params, state)
        return 0.5 * (token_logit(logits, answer) - token_logit(logits, other))

    return _over_both_orders(model, template, score, {})


def pairwise_head(model: Model, template: TemplateTokens) -> PreferenceModel:
    """Returns ``pairwise`` with s linear in the state after the question, zero at the start."""
    heads = {"pairwise": model.config.width}
    return _over_both_orders(model, template, lambda params, state: apply_head(params["pairwise"], state), heads)


def one_order(model: Model, template: TemplateTokens) -> PreferenceModel:
    """Returns the model that is fitted as P(y > y' | x) = sigmoid(s(x, y, y')), s the logit of one fixed token.

    It is the form of 2312.00886 section 7: each pair is shown once. So it has a position bias, the part of s that does
    not change sign when y and y' are exchanged: P(y > y') + P(y' > y) is not 1. Judges and policies ask it in both
    orders, P(y > y' | x) = sigmoid((s(x, y, y') - s(x, y', y)) / 2), which removes that part: the game of 2312.00886
    is symmetric, and the baseline 1/2 of Nash-MD is P(y > y).
    """

    def score(params: Params, state: Array) -> Array:
        return 0.5 * token_logit(model.logits(params, state), template.answer)

    def ordered(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        state = model.last_state(params, pair_context(template, prompt, first, second))
        return token_logit(model.logits(params, state), template.answer)

    return _over_both_orders(model, template, score, {})._replace(ordered=ordered)


def bradley_terry(model: Model, template: TemplateTokens) -> PreferenceModel:
    """Returns P(y > y' | x) = sigmoid(r(x, y) - r(x, y')), r linear in the state after the response, zero at the start.

    2307.12950 section 3; Bradley and Terry 1952. The template is not used: it is here so that the forms exchange.
    """

    def reward(params: Params, prompt: Prompt, response: Completion) -> Array:
        return apply_head(params["reward"], model.last_state(params, concatenate(prompt, response)))

    def margin(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        rewards = reward(params, stack_rows([prompt, prompt]), stack_rows([first, second]))
        return rewards[0::2] - rewards[1::2]

    heads = {"reward": model.config.width}
    return PreferenceModel(_head_init(heads), antisymmetric(margin), reward)


def _over_both_orders(
    model: Model, template: TemplateTokens, score: Callable[[Params, Array], Array], heads: dict[str, int]
) -> PreferenceModel:
    """Returns the model with logit s(x, y, y') - s(x, y', y), s = score(params, state [B, D] after the question)."""

    def scores(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        return score(params, model.last_state(params, pair_context(template, prompt, first, second)))

    def margin(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        both = scores(params, stack_rows([prompt, prompt]), stack_rows([first, second]), stack_rows([second, first]))
        return both[0::2] - both[1::2]

    return PreferenceModel(_head_init(heads), antisymmetric(margin), None)


def pair_context(template: TemplateTokens, prompt: Prompt, first: Completion, second: Completion) -> Prompt:
    """Returns what a model reads of two responses in this order."""
    return concatenate(prompt, template.before, first, template.between, second, template.question)


def _head_init(heads: dict[str, int]) -> Callable[[], Params]:
    return lambda: {name: init_head(width) for name, width in heads.items()}


def token_logit(logits: Array, token: int) -> Array:
    """Returns the logit of one token, [B, V] -> [B].

    A masked sum and not a slice: the TPU's compiler cannot always slice a sharded vocabulary.
    """
    return jnp.sum(jnp.where(jnp.arange(logits.shape[-1])[None] == token, logits, 0.0), -1)


def antisymmetric(margin: PreferenceLogit) -> PreferenceLogit:
    """Makes margin(y, y') = -margin(y', y) exact in floating point, for a margin that is odd up to rounding.

    Each pair is put in lexicographic order first, so that both orders run the same numbers and differ in the sign
    alone. Equal responses get 0.
    """

    def logit(params: Params, prompt: Prompt, first: Completion, second: Completion) -> Array:
        first, second = pad_to_same_length(first, second)
        order = lexicographic_order(first, second)
        low, high = select_rows(order > 0, second, first), select_rows(order > 0, first, second)
        return -order * margin(params, prompt, low, high)

    return logit


def lexicographic_order(first: Completion, second: Completion) -> Array:
    """Returns -1, 0 or 1 a row as first stands before, equals or stands after second; [B] float32."""
    a, b = (jnp.where(x.mask, x.tokens + 1, 0) for x in (first, second))
    position = jnp.argmax(a != b, axis=-1)[:, None]
    return jnp.sign(jnp.take_along_axis(a - b, position, -1)[:, 0]).astype(jnp.float32)


def probability(logit: Array) -> Array:
    """Returns sigmoid(logit), with P(z) + P(-z) = 1 exactly: 1 - s has no rounding for s in [1/2, 1]."""
    s = jax.nn.sigmoid(jnp.abs(logit))
    return jnp.where(logit >= 0, s, 1 - s)


def concatenate(prompt: Prompt, *parts: Tokens | tuple[int, ...]) -> Prompt:
    """Returns one context out of padded pieces and constant ids; padding between pieces changes nothing."""
    batch = prompt.tokens.shape[0]

    def as_rows(part: Tokens | tuple[int, ...]) -> Tokens:
        if isinstance(part, Tokens):
            return part
        shape = (batch, len(part))
        return Tokens(jnp.broadcast_to(np.asarray(part, np.int32), shape), jnp.ones(shape, bool))

    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), prompt, *map(as_rows, parts))


def select_rows(condition: Array, a: Tokens, b: Tokens) -> Tokens:
    """Returns the rows of a where the condition [B] holds, else those of b."""
    return jax.tree.map(lambda x, y: jnp.where(condition[:, None], x, y), a, b)


def pad_to_same_length(a: Tokens, b: Tokens) -> tuple[Tokens, Tokens]:
    """Returns both with padding on the right up to the longer one's length."""
    length = max(a.tokens.shape[1], b.tokens.shape[1])

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

    return jax.tree.map(widen, a), jax.tree.map(widen, b)
