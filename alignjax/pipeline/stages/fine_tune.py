"""Supervised fine-tuning: a policy that imitates the preferred replies of pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.models.lora import Lora
from alignjax.models.tokenizer import Tokenizer, encode_continuation, encode_prompt, pad
from alignjax.objectives import NEXT_TOKEN_MEANINGS
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import (
    Context,
    Exposure,
    NetworkSpec,
    Program,
    abstract_array,
    abstract_tokens,
    function_of,
)
from alignjax.pipeline.networks import Network
from alignjax.pipeline.stages.fit_preference import check_adapters
from alignjax.pipeline.stages.pair_batches import PairRow, read_stage_pairs
from alignjax.pipeline.stages.pretrain import Corpus, pack_documents, pretraining_loss
from alignjax.pipeline.stages.writing import SHORTENED, check_positions, check_stop, shorten_prompts
from alignjax.pipeline.trained_parts import TrainedParts, split_trained, trained_spec
from alignjax.tasks.task import EOS, Task, reply_text
from alignjax.training import data
from alignjax.training.collect import Frozen
from alignjax.training.loop import Learner, LearnerSpec, Loop, train
from alignjax.training.optimizer import Adam
from alignjax.training.shared_tree import SharedTree
from alignjax.types import PackedTokens, Tokens

Example = tuple[list[int], list[int]]
"""The tokens of a prompt, and of the reply that is learned."""


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Trains a policy on the preferred reply of each pair, as the reply to its plain prompt; the prompt is masked.

    ``LoadReplies`` gives it replies that stand alone. On RLCD's pairs it is context distillation: the preferred reply
    was written under the positive prompt (2307.12950 section 4). Examples are packed into rows; for an encoder-decoder
    each has a row of its own, of a prompt and a reply of at most ``row`` tokens each. No reply is cut: an example
    that does not fit is left out. So are pairs with p = 1/2.
    Where a task's replies end with the tokenizer's end token, it is learned too.
    """

    adam: Adam
    loop: Loop
    row: int  # tokens
    start: str = stage_input(Kind.POLICY)
    pairs: str = stage_input(Kind.PAIRS, Kind.REPLIES)
    lora: Lora | None = None  # train adapters over the start's frozen base
    shorten_to: int | None = None  # tokens that the task shortens longer prompts to, as later stages do; None: ``row``
    seed: int = 0
    makes: ClassVar[Kind] = Kind.POLICY
    meanings: ClassVar[dict[str, str]] = {
        **NEXT_TOKEN_MEANINGS,
        "examples": "trained on",
        "ties": "pairs without a preferred reply, left out",
        "too_long": "examples longer than a row, left out",
        "shortened": f"prompts {SHORTENED}",
        "rows": "that the examples fill",
    }

    def __post_init__(self) -> None:
        check_range(self, 2, math.inf, "row")
        if self.shorten_to is not None:
            check_range(self, 1, self.row, "shorten_to")

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the start's network, trained."""
        start = context.spec(self.start)
        return start and trained_spec(start, self.start, self.lora, {})

    def exposure(self, context: Context) -> Exposure:
        """Returns what the start and the pairs depend on."""
        return context.derived_exposure(self.start) | context.exposure(self.pairs)

    def check(self, context: Context) -> None:
        """Raises UserError when batch, adapters, row or the task's stop do not fit the start."""
        self.loop.check(context.name, context.mesh)
        check_adapters(context, self.start, self.lora)
        check_stop(context, self.start)
        check_positions(context, self.start, "row", self.row)

    def trained_parts(self, context: Context, start: Network) -> TrainedParts:
        """Returns what is trained of the start's network."""
        return split_trained(start, self.lora, {}, context.key(self.seed))

    def learner(self, context: Context) -> tuple[Learner, TrainedParts]:
        """Returns the compiled training and the abstract parameters it is for."""
        start = context.abstract(self.start)
        parts = self.trained_parts(context, start)
        learning = LearnerSpec(self.loop, self.adam, pretraining_loss(start.model), parts.rules, parts.assemble)
        return learning.compile(parts.params, context.mesh), parts

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the program that learns from one batch."""
        learner, parts = self.learner(context)
        size, row = self.loop.batch, abstract_tokens(self.loop.batch, self.row)
        packed = PackedTokens(row.tokens, row.tokens, abstract_array("bool", size, self.row))
        is_packed = context.abstract(self.start).model.forward is not None
        batch, tokens = (packed, size * self.row) if is_packed else ((row, row), 2 * size * self.row)
        arguments = learner.state, SharedTree(Frozen(base=parts.base)), batch
        return (Program("learn", learner.learn, arguments, tokens),)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Trains the policy and writes its network."""
        start = context.abstract(self.start)
        rows = read_stage_pairs(context, self.pairs, "train")
        texts = [row["prompt"] for row in rows]
        prompts, counts = shorten_prompts(context.task, start.tokenizer, texts, self.shorten_to or self.row)
        asked = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]
        if not (examples := encode_examples(asked, start.tokenizer, context.task)):
            raise UserError(f"{context.name}: all {len(rows)} pairs of {self.pairs!r} have p = 1/2, and so no preferred"
                            " reply; name another stage")  # fmt: skip
        corpus = packed_examples if start.model.forward else separate_examples
        batches = corpus(examples, self.row, self.loop.batch, context.seed(self.seed))
        learner, parts = self.learner(context)
        learner = learner._replace(learn=function_of(programs, "learn"))

        def parameters() -> tuple[Any, Frozen]:
            loaded = self.trained_parts(context, context.load(self.start))
            context.release()
            return loaded.params, Frozen(base=loaded.base)

        trained = train(context.training_run(self.seed), learner, parameters, batches.plan, batches.make_batch)
        networks.save(context.folder, parts.network(start, trained.params))
        return {"ties": len(rows) - len(examples), **batches.figures, **counts, **trained.figures}


def encode_examples(rows: Sequence[PairRow], tokenizer: Tokenizer, task: Task) -> list[Example]:
    """Returns the prompt and the preferred reply of each pair that has one."""
    preferred = [(row["prompt"], row["first" if row["p"] > 0.5 else "second"]) for row in rows if row["p"] != 0.5]
    return [(encode_prompt(tokenizer, prompt), encode_ended(tokenizer, task, reply)) for prompt, reply in preferred]


def encode_ended(tokenizer: Tokenizer, task: Task, reply: str) -> list[int]:
    """Returns the ids of a reply that ends as its writer must end it.

    That is the format's end marker where a stop piece is in it, else the tokenizer's end token, which stands for the
    marker (``models.tokenizer.decode_reply``). Of several end tokens it is the one that the tokenizer calls EOS.
    """
    is_text = any(piece in task.format.end for piece in task.format.stop if piece != EOS)
    if is_text or EOS not in task.format.stop or not tokenizer.end_tokens:
        return encode_continuation(tokenizer, reply_text(task.format, reply))
    eos = tokenizer.specials.get("eos_token_id")
    end = eos if eos in tokenizer.end_tokens else tokenizer.end_tokens[0]
    return [*encode_continuation(tokenizer, f"{task.format.before}{reply}"), end]


def packed_examples(examples: Sequence[Example], row: int, batch: int, seed: int) -> Corpus:
    """Returns batches of rows in which examples lie side by side; only replies are learned.

    Raises UserError when no example fits a row.
    """
    fitting = fitting_examples(examples, lambda prompt, reply: len(prompt) + len(reply) <= row, row)
    packed = pack_documents([[*prompt, *reply] for prompt, reply in fitting], row)
    learned = pack_documents([[0] * len(prompt) + [1] * len(reply) for prompt, reply in fitting], row).tokens == 1

    def make_batch(plan: data.BatchPlan) -> PackedTokens:
        return PackedTokens(packed.tokens[plan.indices], packed.segments[plan.indices], learned[plan.indices])

    count = len(packed.tokens)
    figures = {"examples": len(fitting), "too_long": len(examples) - len(fitting), "rows": count}
    return Corpus(data.plan_batches([row] * count, [row], batch, seed), make_batch, figures)


def separate_examples(examples: Sequence[Example], row: int, batch: int, seed: int) -> Corpus:
    """Returns batches of (prompt, reply), one example a row. Raises UserError when no example fits."""
    fitting = fitting_examples(examples, lambda prompt, reply: max(len(prompt), len(reply)) <= row, row)

    def make_batch(plan: data.BatchPlan) -> tuple[Tokens, Tokens]:
        prompts, replies = zip(*(fitting[i] for i in plan.indices), strict=True)
        return pad(prompts, row), pad(replies, row)

    figures = {"examples": len(fitting), "too_long": len(examples) - len(fitting), "rows": len(fitting)}
    return Corpus(data.plan_batches([row] * len(fitting), [row], batch, seed), make_batch, figures)


def fitting_examples(examples: Sequence[Example], fits: Any, row: int) -> list[Example]:
    """Returns the examples for which ``fits(prompt, reply)`` holds. Raises UserError when there is none."""
    if not (fitting := [example for example in examples if fits(*example)]):
        raise UserError(f"none of {len(examples)} examples fits a row of {row} tokens; raise row")
    return fitting
