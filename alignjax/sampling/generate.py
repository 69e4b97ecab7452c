"""Text in, text out: batches of prompts of any length through the compiled sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from alignjax.distributed import sharding
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, decode_reply, pad
from alignjax.sampling.process import Process, Sampling, Stop, sample
from alignjax.types import Completion, Key, LogProb, Params, Prompt


class Reply(NamedTuple):
    """One sampled continuation."""

    text: str  # raw, with the task's end marker if it met one
    length: int  # tokens, the stop token included
    kl: float  # nats: log pi(y) - log mu(y) of this sample; its mean estimates KL(pi, mu)


Generate = Callable[[Sequence[str], Sequence[int], int], list[Reply | None]]
"""(prompts, example numbers, seed) -> one Reply each, None where a prompt is longer than what was compiled for.
A reply depends on its prompt, number and seed alone, not on its neighbours in the batch."""


def generator(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    *,
    stop: Stop,
    end: str,
    max_new_tokens: int,
    buckets: tuple[int, ...],
    batch: int,
    sampling: Sampling,
    key: Key,
    reference: tuple[LogProb, Params] | None,
    mesh: jax.sharding.Mesh,
) -> Generate:
    """Builds a Generate; compiled at most twice a bucket, for whole batches and for the small ones that
    retries leave. ``end`` is the task's end marker, which stands in a text for the tokenizer's own. Without
    ``reference``, or where sampling is not plain, every kl is NaN."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    small = max(batch // 8 // parts, 1) * parts

    run = writer(model, stop=stop, max_new_tokens=max_new_tokens, sampling=sampling, mesh=mesh)
    # Filtered or tempered samples are not the policy's: their log-ratio estimates no KL.
    ratio = scorer(reference[0], mesh) if reference and sampling == Sampling() else None

    def score(prompt: Prompt, completion: Completion, logp: jax.Array) -> np.ndarray:
        if reference is None or ratio is None:
            return np.full(len(logp), np.nan)
        return np.asarray(ratio(reference[1], prompt, completion, logp))

    def generate(prompts: Sequence[str], numbers: Sequence[int], seed: int) -> list[Reply | None]:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        replies: dict[int, Reply] = {}
        for length, members in bucketed([len(row) for row in ids], buckets).items():
            for mine, size in cut(members, batch, small):
                full = [*mine, *[mine[0]] * (size - len(mine))]
                given = pad([ids[i] for i in full], length), np.array([numbers[i] for i in full])
                prompt, mine_alone = sharding.place(mesh, given)
                completion, whole, logp = run(params, prompt, mine_alone, jax.random.fold_in(key, seed))
                kl = score(prompt, completion, logp)
                tokens, mask = np.asarray(whole.tokens), np.asarray(whole.mask)
                for row, i in enumerate(mine):
                    text = decode_reply(tokenizer, tokens[row][mask[row]].tolist(), stop, end)
                    replies[i] = Reply(text, int(mask[row].sum()), float(kl[row]))
        return [replies.get(i) for i in range(len(prompts))]

    return generate


def writer(model: Model, *, stop: Stop, max_new_tokens: int, sampling: Sampling, mesh: jax.sharding.Mesh):
    """(params, prompt, example numbers [B], key) -> the completions by rows, the same on every host, log-probs [B, T];
    jitted."""
    rows = sharding.rows(mesh)

    @partial(
        jax.jit, in_shardings=(None, rows, rows, None), out_shardings=(rows, sharding.replicated(mesh), rows),
        keep_unused=True,
    )  # fmt: skip
    def write(params: Params, prompt: Prompt, numbers: jax.Array, key: Key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        drawn = sample(Process(*model.start(params, prompt, max_new_tokens)), keys, max_new_tokens, stop, sampling)
        return drawn.completion, drawn.completion, drawn.logp

    return write


def scorer(log_prob: LogProb, mesh: jax.sharding.Mesh):
    """(params of mu, prompt, completion, log pi [B, T]) -> log pi(y) - log mu(y) [B], on every host; jitted."""
    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)

    @partial(jax.jit, in_shardings=(None, rows, rows, rows), out_shardings=everywhere, keep_unused=True)
    def log_ratio(params: Params, prompt: Prompt, completion: Completion, logp: jax.Array):
        return (logp - log_prob(params, prompt, completion)).sum(-1)

    return log_ratio


def cut(members: list[int], batch: int, small: int) -> list[tuple[list[int], int]]:
    """Whole batches, then one more batch or as many small ones as hold the rest: (members, size)."""
    whole = len(members) // batch * batch
    rest, size = members[whole:], small if len(members) - whole <= 2 * small else batch
    pieces = [(members[at : at + batch], batch) for at in range(0, whole, batch)]
    return pieces + [(rest[at : at + size], size) for at in range(0, len(rest), size)]


def bucketed(lengths: Sequence[int], buckets: Sequence[int]) -> dict[int, list[int]]:
    """Bucket length -> the members it holds. What is longer than every bucket is in none."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        fits = [bucket for bucket in buckets if bucket >= length]
        if fits:
            groups.setdefault(min(fits), []).append(i)
    return dict(sorted(groups.items()))
