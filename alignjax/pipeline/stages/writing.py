"""How a stage lets a network write replies to prompts."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from alignjax.distributed import sharding
from alignjax.errors import UserError, check_range
from alignjax.fields import no_effect
from alignjax.models.decoder import TransformerConfig
from alignjax.models.log_probs import log_prob
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, encode_continuation, stop_sequences
from alignjax.pipeline.experiment import Context, Program, abstract_array, abstract_tokens
from alignjax.pipeline.networks import Network
from alignjax.sampling.generate import Generator, ReplyFormat, reply_scorer, reply_writer
from alignjax.sampling.process import Sampling, StopSequences
from alignjax.tasks.task import EOS, Task
from alignjax.types import Process, Prompt


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a stage lets a network write."""

    max_new_tokens: int
    buckets: tuple[int, ...]  # prompt lengths in tokens that are compiled for
    batch: int
    sampling: Sampling = Sampling()
    gather: bool = no_effect(True)  # gather the weights over data and fsdp before writing; False saves memory

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "max_new_tokens", "buckets", "batch")

    def check(self, context: Context, split: str, *sources: str) -> None:
        """Raises UserError when the batch does not divide over the mesh, the task has no such split, or one of the
        ``sources`` is known to have no stop tokens or too few positions."""
        sharding.check_batch(f"{context.name}.writing.batch", self.batch, context.mesh)
        context.task.source.prompts(split, 1, context.seed())
        for source in sources:
            check_stop(context, source)
            check_positions(context, source, "writing", max(self.buckets) + self.max_new_tokens)

    def writer(self, context: Context, network: Network) -> Any:
        """Returns the jitted function that writes with a network (``sampling.generate.reply_writer``)."""
        stop = stop_tokens(context.task, network.tokenizer)
        return reply_writer(
            writing_model(network.model, self.gather), stop, self.max_new_tokens, self.sampling, context.mesh
        )

    def programs(self, context: Context, name: str, network: Network, resident: Any = ()) -> tuple[Program, ...]:
        """Returns the programs that write, one a bucket; ``resident`` are arrays that live meanwhile."""
        sharding.check_batch(f"{context.name}.writing.batch", self.batch, context.mesh)
        write, numbers = self.writer(context, network), abstract_array("int32", self.batch)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding.replicated(context.mesh))
        return tuple(
            Program(
                f"{name} {length}", write, (network.params, abstract_tokens(self.batch, length), numbers, key),
                self.batch * (length + self.max_new_tokens), resident,
            )
            for length in self.buckets
        )  # fmt: skip

    def scoring_programs(self, context: Context, name: str, reference: Network, resident: Any) -> tuple[Program, ...]:
        """Returns the programs that score replies by a reference, one a bucket."""
        score = reply_scorer(log_prob(reference.model), context.mesh)
        reply = abstract_tokens(self.batch, self.max_new_tokens)
        logp = abstract_array("float32", self.batch, self.max_new_tokens)
        return tuple(
            Program(
                f"{name} {length}", score, (reference.params, abstract_tokens(self.batch, length), reply, logp),
                self.batch * (length + self.max_new_tokens), resident,
            )
            for length in self.buckets
        )  # fmt: skip

    def generator(self, context: Context, network: Network, write: Any, key: jax.Array) -> Generator:
        """Returns text in, text out by a network, over a function of ``writer``."""
        reply_format = ReplyFormat(stop_tokens(context.task, network.tokenizer), context.task.format.end)
        return Generator(
            write, network.params, network.tokenizer, reply_format, buckets=tuple(sorted(self.buckets)),
            batch=self.batch, key=key, mesh=context.mesh, score=None,
            owner=f"{context.name}: the network of {network.stage!r}",
        )  # fmt: skip


def writing_model(model: Model, gather: bool) -> Model:
    """Returns the model; with ``gather`` its parameters are gathered over data and fsdp before it prefills."""
    if not gather:
        return model
    dtype = model.config.compute_dtype

    def prefill(params: Any, prompt: Prompt, max_new_tokens: int) -> Process:
        return model.prefill(sharding.gather_params(params, model.rules, dtype), prompt, max_new_tokens)

    return model._replace(prefill=prefill)


def stop_tokens(task: Task, tokenizer: Tokenizer) -> StopSequences:
    """Returns the token sequences that end a completion. Raises UserError when there are none, or a piece has none."""
    sequences: list[tuple[int, ...]] = []
    for piece in task.format.stop:
        try:
            ends = tuple((token,) for token in tokenizer.end_tokens)
            sequences += ends if piece == EOS else stop_sequences(tokenizer, piece)
        except UserError as error:
            raise UserError(f"task.format.stop: {error}") from None
    if not sequences:
        raise UserError(f"task {task.name!r} stops at the tokenizer's end token, and it has none; name another stop")
    return tuple(dict.fromkeys(sequences))


def unseen_stops(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the single stop tokens that no reply of the task's format ends with."""
    end = encode_continuation(tokenizer, task.format.end)
    return tuple(stop[0] for stop in stop_tokens(task, tokenizer) if len(stop) == 1 and stop[0] not in end)


def check_stop(context: Context, source: str) -> None:
    """Raises UserError when the stage ``source`` is known to have no tokens that the task stops at."""
    spec = context.spec(source)
    if spec and spec.tokenizer:
        stop_tokens(context.task, spec.tokenizer)


def check_positions(context: Context, source: str, field: str, tokens: int) -> None:
    """Raises UserError when the model of the stage ``source`` is known to have fewer positions than ``tokens``.

    Warns when it has positions without end, but was trained on fewer.
    """
    spec = context.spec(source)
    config = spec.record.config if spec else None
    if not isinstance(config, TransformerConfig) or config.context >= tokens:
        return
    needs = f"{context.name}.{field} needs room for {tokens} tokens and the model of {source!r}"
    if config.positions == "learned":
        raise UserError(f"{needs} has {config.context} positions; lower it")
    warnings.warn(f"{needs} was trained on contexts of {config.context}; lower it, or expect worse text", stacklevel=2)


def fitting_prompts(
    context: Context, source: str, writing: Writing, prompts: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """Returns the prompts that a bucket holds in the tokens of the stage ``source``, and how many there are.

    The task shortens the others where it can (``shorten_prompts``). Raises UserError when none fits.
    """
    tokenizer, longest = context.abstract(source).tokenizer, max(writing.buckets)
    texts, figures = shorten_prompts(context.task, tokenizer, prompts, longest)
    kept = [text for text in texts if len(tokenizer.encode(text)) <= longest]
    if not kept:
        raise UserError(f"{context.name}: all {len(prompts)} prompts are longer than {longest} tokens; "
                        f"add a larger one to {context.name}.writing.buckets")  # fmt: skip
    return kept, {"prompts": len(kept), "too_long": len(prompts) - len(kept), **figures}


def shorten_prompts(
    task: Task, tokenizer: Tokenizer, prompts: Sequence[str], longest: int
) -> tuple[list[str], dict[str, int]]:
    """Returns the prompts in their order, each in at most ``longest`` tokens where the task can shorten it.

    The figures have how many were shortened; they are empty for a task that shortens nothing. All stages that ask for
    the same length see the same text.
    """
    texts = [task.fit(prompt, lambda text: len(tokenizer.encode(text)) <= longest) for prompt in prompts]
    shortened = sum(text != prompt for text, prompt in zip(texts, prompts, strict=True))
    return texts, {"shortened": shortened} if task.shorten else {}


SHORTENED = "too long as they are; their text was cut so that they fit"
"""What the figure of ``shorten_prompts`` shows."""
