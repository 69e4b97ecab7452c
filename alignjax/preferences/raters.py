"""Raters: a language model, as it is, is asked which of two replies is better (RLAIF, 2307.12950 section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, pad, single_token
from alignjax.preferences.judges import judged_length
from alignjax.tasks.task import Format, Template, rater_text
from alignjax.types import Array, Judge, Params, Prompt


class Rater(Protocol):
    """Compares replies by questions, in the order in which they are given."""

    def __call__(
        self, prompts: Sequence[str], replies: Sequence[str], others: Sequence[str], questions: Sequence[Template], /
    ) -> np.ndarray:
        """Returns the log-odds that the first reply is better than the other, [N] nats.

        An empty reply loses: its log-odds are infinite. Two of them have 0.
        """
        ...


def answer_log_odds(model: Model, mesh: jax.sharding.Mesh) -> Any:
    """Returns a jitted (params, context [B, T], answer [B], other [B]) -> [B] nats, on every host.

    It is the logit of the token ``answer`` after the context minus that of the token ``other``.
    """
    rows, everywhere = sharding.row_sharding(mesh), sharding.replicated(mesh)

    def ask(params: Params, context: Prompt, answer: Array, other: Array) -> Array:
        logits = model.logits(params, model.last_state(params, context))
        tokens = jnp.arange(logits.shape[-1])[None]
        # A masked sum and not a gather: the vocabulary may be sharded.
        sign = (tokens == answer[:, None]).astype(logits.dtype) - (tokens == other[:, None]).astype(logits.dtype)
        return jnp.sum(sign * logits, -1)

    return jax.jit(ask, in_shardings=(None, rows, rows, rows), out_shardings=everywhere, keep_unused=True)


def language_model_rater(
    ask: Any,
    params: Params,
    tokenizer: Tokenizer,
    reply_format: Format,
    *,
    batch: int,
    mesh: jax.sharding.Mesh,
    owner: str,
) -> Rater:
    """Returns the rater that reads ``rater_text``; ``ask`` is an ``answer_log_odds``.

    Raises UserError, beginning with ``owner``, where an answer is not one token, or a logit is not finite.
    """

    def rate(
        prompts: Sequence[str], replies: Sequence[str], others: Sequence[str], questions: Sequence[Template], /
    ) -> np.ndarray:
        texts = list(map(rater_text, questions, [reply_format] * len(prompts), prompts, replies, others))
        ids, answers = list(map(tokenizer.encode, texts)), answer_tokens(tokenizer, questions, owner)
        length = judged_length(max(map(len, ids)))  # one shape: compiled once
        log_odds = np.zeros(len(prompts))
        for start in range(0, len(prompts), batch):
            rows = np.arange(start, min(start + batch, len(prompts)))
            full = np.resize(rows, batch)
            arguments = pad([ids[i] for i in full], length), answers[full, 0], answers[full, 1]
            log_odds[rows] = np.asarray(ask(params, *sharding.place_rows(mesh, arguments)))[: len(rows)]
        if not np.all(np.isfinite(log_odds)):
            raise UserError(f"{owner} gives logits that are not finite; its parameters are damaged")
        return empty_loses(log_odds, replies, others)

    return rate


def answer_tokens(tokenizer: Tokenizer, questions: Sequence[Template], owner: str) -> np.ndarray:
    """Returns the two answers of each question, [N, 2] int32 tokens. Raises UserError when one is not one token."""
    known: dict[Template, tuple[int, int]] = {}
    for question in set(questions):
        try:
            known[question] = (single_token(tokenizer, question.answer), single_token(tokenizer, question.other))
        except UserError as error:
            raise UserError(f"{owner}: a question's answer: {error}") from None
    return np.array([known[question] for question in questions], np.int32)


def empty_loses(log_odds: np.ndarray, replies: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Returns the log-odds [N], infinite where one reply is empty and 0 where both are."""
    first, second = (np.array([bool(text) for text in side]) for side in (replies, others))
    outright = np.where(first, np.inf, -np.inf)
    return np.where(first & second, log_odds, np.where(first == second, 0.0, outright))


def in_both_orders(rater: Rater) -> Rater:
    """Returns the rater with the mean log-odds of both orders, in which a bias to a position cancels.

    Equal replies get exactly 0, and exchanged ones exactly the opposite.
    """

    def rate(
        prompts: Sequence[str], replies: Sequence[str], others: Sequence[str], questions: Sequence[Template], /
    ) -> np.ndarray:
        forward, backward = rater(prompts, replies, others, questions), rater(prompts, others, replies, questions)
        return (forward - backward) / 2

    return rate


def preference_probability(log_odds: np.ndarray) -> np.ndarray:
    """Returns sigmoid(z) of log-odds z [N], infinite ones included, with P(z) + P(-z) = 1 exactly."""
    likelier = 1 / (1 + np.exp(-np.abs(log_odds)))
    return np.where(log_odds >= 0, likelier, 1 - likelier)  # 1 - s has no rounding for s in [1/2, 1]


def question_judge(rater: Rater, question: Template) -> Judge:
    """Returns the judge that asks one question in both orders."""
    both = in_both_orders(rater)

    def judge(prompts: Sequence[str], replies: Sequence[str], others: Sequence[str]) -> np.ndarray:
        return preference_probability(both(prompts, replies, others, [question] * len(prompts)))

    return judge
