"""Judges of texts, and how well probabilities agree with labels."""

from __future__ import annotations

import collections
import functools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from alignjax.distributed import sharding
from alignjax.errors import UserError, short_repr
from alignjax.models.tokenizer import Tokenizer, encode_continuation, pad
from alignjax.preferences.preference_models import probability
from alignjax.tasks.task import ExactPreference, Format, reply_text
from alignjax.types import Judge, OrderedLogit, Params

LENGTH_MULTIPLE = 32  # lengths are rounded up to it, for fewer compilations
_NEAREST = 1e-7  # that a probability comes to 0 or 1 in a cross-entropy
LARGEST_ENTROPY = -math.log(_NEAREST)
"""The largest cross-entropy of one pair, in nats."""


@runtime_checkable
class CountingJudge(Protocol):
    """A Judge that counts what it does, for the report."""

    def __call__(self, prompts: Sequence[str], replies: Sequence[str], others: Sequence[str], /) -> np.ndarray:
        """Returns P(reply > other), [N]."""
        ...

    def take_counts(self) -> dict[str, float]:
        """Returns sums over the calls since they were taken last."""
        ...

    def figures(self, counts: Mapping[str, float], /) -> dict[str, float | None]:
        """Returns what the report shows, from added counts."""
        ...


def take_counts(judge: Judge | None) -> dict[str, float]:
    """Returns the judge's counts since they were taken last; empty for a judge that counts nothing."""
    return judge.take_counts() if isinstance(judge, CountingJudge) else {}


def judge_figures(judge: Judge | None, counts: Iterable[Mapping[str, float]]) -> dict[str, float | None]:
    """Returns the judge's figures from the counts of several parts of its work; empty for one that counts nothing."""
    total: dict[str, float] = collections.defaultdict(int)
    for part in counts:
        for name, value in part.items():
            total[name] += value
    return judge.figures(total) if isinstance(judge, CountingJudge) else {}


def exact_preferences(
    oracle: ExactPreference, prompts: Sequence[str], replies: Sequence[str], others: Sequence[str]
) -> np.ndarray:
    """Returns the oracle's P(reply > other), [N].

    Raises UserError when an answer is no probability, or when P and P' of the first replies do not sum to 1.
    """
    rows = list(zip(prompts, replies, others, strict=True))
    answers = [_exact_preference(oracle, *row) for row in rows]
    if rows:
        prompt, reply, other = rows[0]
        back = _exact_preference(oracle, prompt, other, reply)
        if abs(answers[0] + back - 1) > 1e-6:
            raise UserError(f"the oracle {_oracle_name(oracle)} said {answers[0]!r} of {short_repr(reply)} and "
                            f"{short_repr(other)}, and {back!r} of them exchanged; let both sum to 1")  # fmt: skip
    return np.array(answers, np.float64)


def _exact_preference(oracle: ExactPreference, prompt: str, reply: str, other: str) -> float:
    """Returns the oracle's P(reply > other). Raises UserError when it is no probability."""
    p = oracle(prompt, reply, other)
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= p <= 1:
        raise UserError(f"the oracle {_oracle_name(oracle)} said {p!r} of {short_repr(reply)} and {short_repr(other)}; "
                        "let it return P(reply > other) in [0, 1]")  # fmt: skip
    return float(p)


def _oracle_name(oracle: ExactPreference) -> str:
    """Returns what an oracle's function is called in its file."""
    return str(getattr(getattr(oracle, "func", oracle), "__name__", type(oracle).__name__))


def oracle_judge(oracle: ExactPreference) -> Judge:
    """Returns the judge of a task's exact oracle. Errors: those of ``exact_preferences``."""
    return functools.partial(exact_preferences, oracle)


def model_judge(
    ask: Any,
    params: Params,
    tokenizer: Tokenizer,
    reply_format: Format,
    *,
    batch: int,
    mesh: jax.sharding.Mesh,
    owner: str,
) -> Judge:
    """Returns the judge of a preference model; ``ask`` is a ``preference_asker``.

    The model was fitted on replies alone. So an empty text, which stands for a reply that the task's filter refused,
    loses to any other, and two of them tie. Raises UserError, beginning with ``owner``, where a logit is not finite.
    """

    def encode(text: str) -> list[int]:
        return encode_continuation(tokenizer, reply_text(reply_format, text))

    def judge(prompts: Sequence[str], replies: Sequence[str], others: Sequence[str]) -> np.ndarray:
        ids = [list(map(tokenizer.encode, prompts)), list(map(encode, replies)), list(map(encode, others))]
        lengths = [judged_length(max(map(len, side))) for side in ids]  # one shape: compiled once
        logits = np.zeros(len(prompts))
        for start in range(0, len(prompts), batch):
            rows = np.arange(start, min(start + batch, len(prompts)))
            full = np.resize(rows, batch)
            padded = [pad([side[i] for i in full], length) for side, length in zip(ids, lengths, strict=True)]
            logits[rows] = np.asarray(ask(params, *sharding.place_rows(mesh, padded)))[: len(rows)]
        if not np.all(np.isfinite(logits)):
            raise UserError(f"{owner} gives logits that are not finite; its parameters are damaged")
        first, second = (np.array([float(bool(text)) for text in side]) for side in (replies, others))
        return np.where(first * second > 0, probability(logits), 0.5 + 0.5 * (first - second))

    return judge


def judged_length(length: int) -> int:
    """Returns the length in tokens that a judge pads texts of at most this length to."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def preference_asker(logit: OrderedLogit, mesh: jax.sharding.Mesh) -> Any:
    """Returns a jitted (params, prompt, y, y') -> logits [B], on every host."""
    rows, everywhere = sharding.row_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(logit, in_shardings=(None, rows, rows, rows), out_shardings=everywhere, keep_unused=True)


def calibration(p: np.ndarray, label: np.ndarray, bins: int = 10) -> dict[str, float]:
    """Returns accuracy, expected calibration error and mean cross-entropy (nats) of probabilities [N] against labels.

    A probability of exactly 1/2 counts half. The error is the mean over equal-width bins, weighted by their share, of
    |mean probability - mean label| (1706.04599).
    """
    accuracy = np.mean(np.where(p == 0.5, 0.5, (p > 0.5) == (label > 0.5)))
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(np.sum(p[bin_of == b] - label[bin_of == b])) for b in range(bins)]
    return {
        "accuracy": float(accuracy),
        "calibration_error": float(np.sum(gaps) / len(p)),
        "cross_entropy": float(np.mean(cross_entropies(p, label))),
        "n": len(p),
    }


def cross_entropies(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns -label log p - (1 - label) log(1 - p) in nats, [...], at most ``LARGEST_ENTROPY``."""
    clipped = np.clip(p, _NEAREST, 1 - _NEAREST)
    return -(label * np.log(clipped) + (1 - label) * np.log(1 - clipped))
