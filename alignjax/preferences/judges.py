"""Who decides in evaluation. A judge compares texts, so that it needs nobody's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from alignjax.distributed import sharding
from alignjax.models.tokenizer import Tokenizer, encode_continuation, pad
from alignjax.preferences.models import probability
from alignjax.tasks.task import Format, Oracle
from alignjax.types import Params, PreferenceLogit

Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]
"""(prompts, replies, others) -> P(reply > other) [N]."""


def oracle_judge(oracle: Oracle) -> Judge:
    """The task's exact oracle."""
    return lambda prompts, replies, others: np.array(list(map(oracle, prompts, replies, others)))


def model_judge(
    logit: PreferenceLogit,
    params: Params,
    tokenizer: Tokenizer,
    reply_format: Format,
    *,
    batch: int,
    mesh: jax.sharding.Mesh,
) -> Judge:
    """A preference model as a judge of texts. It was fitted on replies alone: an empty text, which stands for
    a reply that failed the task's filter, loses to any other, and two of them tie."""
    run = asker(logit, mesh)

    def encode(text: str) -> list[int]:
        return encode_continuation(tokenizer, reply_text(reply_format, text))

    def judge(prompts: Sequence[str], replies: Sequence[str], others: Sequence[str]) -> np.ndarray:
        ids = [list(map(tokenizer.encode, prompts)), list(map(encode, replies)), list(map(encode, others))]
        lengths = [ceil_to(max(map(len, side)), 32) for side in ids]  # one shape: compiled once
        logits = np.zeros(len(prompts))
        for at in range(0, len(prompts), batch):
            mine = np.arange(at, min(at + batch, len(prompts)))
            full = np.resize(mine, batch)
            padded = [pad([side[i] for i in full], length) for side, length in zip(ids, lengths, strict=True)]
            logits[mine] = np.asarray(run(params, *sharding.place(mesh, padded)))[: len(mine)]
        here, there = (np.array([float(bool(text)) for text in side]) for side in (replies, others))
        return np.where(here * there > 0, probability(logits), 0.5 + 0.5 * (here - there))

    return judge


def asker(logit: PreferenceLogit, mesh: jax.sharding.Mesh):
    """(params, prompt, y, y') -> logits [B], on every host; jitted."""
    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    return jax.jit(logit, in_shardings=(None, rows, rows, rows), out_shardings=everywhere, keep_unused=True)


def reply_text(reply_format: Format, reply: str) -> str:
    """A reply as it stands after its prompt, its end marker included."""
    return f"{reply_format.before}{reply}{reply_format.end}"


def ceil_to(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def calibration(p: np.ndarray, label: np.ndarray, bins: int = 10) -> dict[str, float]:
    """Accuracy, expected calibration error and mean cross-entropy (nats) of probabilities against labels.

    A probability of exactly 1/2 counts half. The error is the mean over equal-width bins, weighted by
    their share, of |mean probability - mean label| (1706.04599).
    """
    accuracy = np.mean(np.where(p == 0.5, 0.5, (p > 0.5) == (label > 0.5)))
    where = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(np.sum(p[where == b] - label[where == b])) for b in range(bins)]
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    entropy = -np.mean(label * np.log(clipped) + (1 - label) * np.log(1 - clipped))
    return {
        "accuracy": float(accuracy),
        "calibration_error": float(np.sum(gaps) / len(p)),
        "cross_entropy": float(entropy),
        "n": len(p),
    }
