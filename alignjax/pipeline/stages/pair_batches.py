"""Pairs of text on disk -> PreferenceBatches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.errors import UserError
from alignjax.models.tokenizer import Tokenizer, encode_continuation, encode_prompt, pad
from alignjax.pipeline.experiment import Context, abstract_array, abstract_tokens
from alignjax.pipeline.stages.writing import shorten_prompts
from alignjax.tasks.task import Task, reply_text
from alignjax.training import data
from alignjax.types import PreferenceBatch, Prompt, Response

PairRow = dict[str, Any]
"""{"prompt", "first", "second": text, "p": P(first is preferred)}."""


class PairBatches(NamedTuple):
    """Pairs as batches."""

    plan: Callable[[int], data.BatchPlan]
    make_batch: Callable[[data.BatchPlan], PreferenceBatch]
    figures: dict[str, Any]


class PairLimits(NamedTuple):
    """The lengths in tokens that are compiled for."""

    buckets: tuple[int, ...]  # of prompts
    response: int


def read_stage_pairs(context: Context, stage: str, split: str) -> list[PairRow]:
    """Returns the pairs of a split that the stage wrote."""
    return data.read_pairs(context.folder_of(stage) / data.PAIR_DATA, split)


def pair_batches(
    rows: Sequence[PairRow], tokenizer: Tokenizer, task: Task, limits: PairLimits, batch: int, seed: int
) -> PairBatches:
    """Returns batches of the pairs that fit. Raises UserError when none does."""
    pairs = encode_pairs(rows, tokenizer, task, limits)
    encoded = pairs.encoded
    plan = data.plan_batches([len(pair[0]) for pair in encoded], limits.buckets, batch, seed)

    def make_batch(chosen: data.BatchPlan) -> PreferenceBatch:
        prompts, first, second, p = zip(*(encoded[i] for i in chosen.indices), strict=True)
        sides = Response(pad(first, limits.response)), Response(pad(second, limits.response))
        return host_pair_batch(pad(prompts, chosen.length), sides, np.asarray(p, np.float32))

    return PairBatches(plan, make_batch, {"pairs": len(encoded), **pairs.figures})


class EncodedPairs(NamedTuple):
    """The pairs that fit."""

    encoded: list[tuple[list[int], list[int], list[int], float]]  # prompt ids, first ids, second ids, p
    rows: list[PairRow]  # with the prompt that was encoded
    figures: dict[str, int]  # how many did not fit, and how many have a shorter prompt


def encode_pairs(rows: Sequence[PairRow], tokenizer: Tokenizer, task: Task, limits: PairLimits) -> EncodedPairs:
    """Returns the pairs that fit; the task shortens a prompt where it can, and no response is ever cut.

    Raises UserError when no row fits.
    """
    prompts, counts = shorten_prompts(task, tokenizer, [row["prompt"] for row in rows], max(limits.buckets))
    encoded, fitting = [], []
    for row, text in zip(rows, prompts, strict=True):
        prompt = encode_prompt(tokenizer, text)
        first, second = (
            encode_continuation(tokenizer, reply_text(task.format, row[name])) for name in ("first", "second")
        )
        if len(prompt) <= max(limits.buckets) and max(len(first), len(second)) <= limits.response:
            encoded.append((prompt, first, second, row["p"]))
            fitting.append({**row, "prompt": text})
    if not encoded:
        raise UserError(f"none of {len(rows)} pairs fits prompts of {max(limits.buckets)} and responses of "
                        f"{limits.response} tokens; raise buckets or response")  # fmt: skip
    return EncodedPairs(encoded, fitting, {"too_long": len(rows) - len(fitting), **counts})


def shuffle_sides(rows: Sequence[PairRow], seed: int) -> list[PairRow]:
    """Returns the pairs, each in the order that a coin of its own decides."""
    coins = np.random.default_rng(seed).random(len(rows)) < 0.5
    return [
        {"prompt": row["prompt"], "first": row["second"], "second": row["first"], "p": 1 - row["p"]} if coin else row
        for row, coin in zip(rows, coins, strict=True)
    ]


def host_pair_batch(prompt: Prompt, sides: tuple[Response, Response], p: np.ndarray) -> PreferenceBatch:
    """Returns a batch of pairs with P(first > second) = p [B], on the host. (``types.pair_batch`` on NumPy arrays.)"""
    preference = np.full((len(p), 2, 2), 0.5, np.float32)
    preference[:, 0, 1], preference[:, 1, 0] = p, 1 - p
    return PreferenceBatch(prompt, sides, preference)


def abstract_pair_batch(batch: int, prompt: int, response: int) -> PreferenceBatch:
    """Returns what ``make_batch`` makes, as shapes."""
    side = Response(abstract_tokens(batch, response))
    return PreferenceBatch(abstract_tokens(batch, prompt), (side, side), abstract_array("float32", batch, 2, 2))
