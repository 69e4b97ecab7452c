"""Text in, text out: batches of prompts of any length through the compiled sampler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, decode_reply, encode_prompt, pad
from alignjax.sampling.process import Sampling, StopSequences, sample
from alignjax.types import Array, Completion, Key, LogProb, Params, Prompt


class Reply(NamedTuple):
    """One sampled continuation."""

    text: str  # raw, with the task's end marker if the model wrote one
    length: int  # tokens, the stop sequence included
    kl: float  # nats: log pi(y) - log mu(y) of this sample; its mean estimates KL(pi, mu). NaN: not measured
    reference_logp: float = math.nan  # nats: log mu(y). NaN: not measured


class ReplyFormat(NamedTuple):
    """How a reply ends."""

    stop: StopSequences
    end: str  # the task's end marker; it stands in a text for the tokenizer's own end token


Generate = Callable[[Sequence[str], Sequence[int], int], list[Reply | None]]
"""(prompts, example numbers, attempt) -> one Reply each, None where a prompt is longer than every bucket.
A reply depends on its prompt, number and attempt alone, not on its neighbours in the batch."""


@dataclasses.dataclass(frozen=True)
class Generator:
    """A Generate over a network.

    It compiles at most twice a bucket: for full batches, and for the small ones that retries leave.
    """

    write: Any  # a ``reply_writer``
    params: Params
    tokenizer: Tokenizer
    reply_format: ReplyFormat
    buckets: tuple[int, ...]  # prompt lengths in tokens, ascending
    batch: int
    key: Key
    mesh: jax.sharding.Mesh
    score: tuple[Any, Params] | None  # a ``reply_scorer`` and the reference's parameters; None: no KL is measured
    owner: str  # begins the message of an error

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int], attempt: int) -> list[Reply | None]:
        """Returns one Reply a prompt. Raises UserError where a prompt has no token or log-probs are not finite."""
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        replies: dict[int, Reply] = {}
        for length, members in assign_buckets([len(row) for row in ids], self.buckets).items():
            for chosen, size in split_batches(members, self.batch, self.small_batch()):
                padded = [*chosen, *[chosen[0]] * (size - len(chosen))]
                rows = pad([ids[i] for i in padded], length), np.array([numbers[i] for i in padded])
                drawn = self.write_batch(*rows, jax.random.fold_in(self.key, attempt))
                replies |= dict(zip(chosen, drawn, strict=False))
        return [replies.get(i) for i in range(len(prompts))]

    def small_batch(self) -> int:
        """Returns the size of the small batches: about an eighth of ``batch`` that divides over the mesh."""
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return max(self.batch // 8 // rows, 1) * rows

    def write_batch(self, prompt: Prompt, numbers: np.ndarray, key: Key) -> list[Reply]:
        """Returns one Reply a row. Raises UserError where a log-prob is not finite."""
        placed, placed_numbers = sharding.place_rows(self.mesh, (prompt, numbers))
        drawn = self.write(self.params, placed, placed_numbers, key)
        if not bool(drawn.finite):
            raise UserError(f"{self.owner} gives log-probs that are not finite; its parameters are damaged")
        scored = Scored(*np.full((2, len(numbers)), np.nan))
        if self.score is not None:
            score, reference = self.score
            scored = Scored(*map(np.asarray, score(reference, placed, drawn.completion, drawn.logp)))
            if not np.all(np.isfinite(scored)):
                raise UserError(f"{self.owner} is scored by a reference whose log-probs are not finite; the "
                                "reference's parameters are damaged")  # fmt: skip
        tokens, mask = np.asarray(drawn.replicated.tokens), np.asarray(drawn.replicated.mask)
        ids = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
        texts = [decode_reply(self.tokenizer, row, *self.reply_format) for row in ids]
        columns = zip(texts, map(len, ids), *(column.tolist() for column in scored), strict=True)
        return [Reply(*row) for row in columns]


class Scored(NamedTuple):
    """What a ``reply_scorer`` returns."""

    kl: Array  # [B] nats: log pi(y) - log mu(y)
    reference_logp: Array  # [B] nats: log mu(y)


class Written(NamedTuple):
    """What a ``reply_writer`` returns."""

    completion: Completion  # [B, T], by rows
    replicated: Completion  # the same on every host
    logp: Array  # [B, T] nats, by rows
    finite: Array  # [] bool: every log-prob is finite


def reply_writer(
    model: Model, stop: StopSequences, max_new_tokens: int, sampling: Sampling, mesh: jax.sharding.Mesh
) -> Any:
    """Returns a jitted (params, prompt, example numbers [B], key) -> Written. Row b draws with fold_in(key, number)."""
    rows, everywhere = sharding.row_sharding(mesh), sharding.replicated(mesh)

    def write(params: Params, prompt: Prompt, numbers: jax.Array, key: Key) -> Written:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        drawn = sample(model.prefill(params, prompt, max_new_tokens), keys, max_new_tokens, stop, sampling)
        return Written(drawn.completion, drawn.completion, drawn.logp, jnp.all(jnp.isfinite(drawn.logp)))

    places: Any = Written(*cast(Any, (rows, everywhere, rows, everywhere)))
    return jax.jit(write, in_shardings=(None, rows, rows, None), out_shardings=places, keep_unused=True)


def reply_scorer(log_prob: LogProb, mesh: jax.sharding.Mesh) -> Any:
    """Returns a jitted (params of mu, prompt, y, log pi [B, T]) -> Scored, on every host."""
    rows, everywhere = sharding.row_sharding(mesh), sharding.replicated(mesh)

    @partial(jax.jit, in_shardings=(None, rows, rows, rows), out_shardings=everywhere, keep_unused=True)
    def score(params: Params, prompt: Prompt, completion: Completion, logp: jax.Array) -> Scored:
        reference_logp = log_prob(params, prompt, completion)
        return Scored((logp - reference_logp).sum(-1), reference_logp.sum(-1))

    return score


def split_batches(members: list[int], batch: int, small: int) -> list[tuple[list[int], int]]:
    """Returns (members, size) of full batches, then of one more batch or as few small ones as hold the rest."""
    full = len(members) // batch * batch
    rest, size = members[full:], small if len(members) - full <= 2 * small else batch
    pieces = [(members[at : at + batch], batch) for at in range(0, full, batch)]
    return pieces + [(rest[at : at + size], size) for at in range(0, len(rest), size)]


def assign_buckets(lengths: Sequence[int], buckets: Sequence[int]) -> dict[int, list[int]]:
    """Returns bucket length -> the members it holds. What is longer than every bucket is in none."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        fitting = [bucket for bucket in buckets if bucket >= length]
        if fitting:
            groups.setdefault(min(fitting), []).append(i)
    return dict(sorted(groups.items()))
