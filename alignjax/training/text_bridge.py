"""Text between a policy and a preference model with different tokenizers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from alignjax.distributed import sharding
from alignjax.models.tokenizer import Tokenizer, decode_reply, encode_continuation, pad
from alignjax.preferences.judges import judged_length
from alignjax.sampling.process import StopSequences
from alignjax.tasks.task import Task, reply_text
from alignjax.training.collect import PreferenceView
from alignjax.types import Sample, Tokens


@dataclasses.dataclass(frozen=True)
class TextBridge:
    """Writes the policy's prompts and responses in the preference model's tokens.

    Every response is read as text, filtered as the task does, and encoded again. A response that the filter refuses is
    empty; one longer than ``longest`` tokens is cut there.
    """

    task: Task
    policy: Tokenizer
    preference: Tokenizer
    stop: StopSequences  # in the policy's tokens
    longest: int  # tokens of a response for the preference model
    prompts: dict[tuple[int, ...], list[int]]  # a prompt in the policy's tokens -> in the preference model's
    mesh: jax.sharding.Mesh

    def view(self, prompt: Tokens, samples: Sequence[Sample]) -> PreferenceView:
        """Returns what the preference model reads, placed by rows on the mesh."""
        gathered = sharding.gather_rows(self.mesh, (prompt, [sample.completion for sample in samples]))
        ids = [self.prompts[tuple(row)] for row in token_rows(gathered[0])]
        encoded = [self.encode(token_rows(completion)) for completion in gathered[1]]
        responses, accepted = (tuple(part) for part in zip(*encoded, strict=True))
        length = max(judged_length(prompt.tokens.shape[1]), self.longest_prompt)  # the bucket's, as planned, if it fits
        return sharding.place_rows(self.mesh, PreferenceView(pad(ids, length), responses, accepted))

    def encode(self, rows: list[list[int]]) -> tuple[Tokens, np.ndarray]:
        """Returns responses in the preference model's tokens, and whether the filter accepts each, [B] bool."""
        texts = [decode_reply(self.policy, row, self.stop, self.task.format.end) for row in rows]
        replies = [self.task.clean(text) or "" for text in texts]
        ids = [encode_continuation(self.preference, reply_text(self.task.format, reply)) for reply in replies]
        return pad([row[: self.longest] for row in ids], self.longest), np.array([bool(reply) for reply in replies])

    @functools.cached_property
    def longest_prompt(self) -> int:
        """The tokens that the longest prompt takes in the preference model's tokenizer, rounded up."""
        return judged_length(max(map(len, self.prompts.values())))


def token_rows(tokens: Tokens) -> list[list[int]]:
    """Returns the real tokens of every row, from replicated arrays [B, T]."""
    rows = zip(np.asarray(tokens.tokens), np.asarray(tokens.mask), strict=True)
    return [row[mask].tolist() for row, mask in rows]
