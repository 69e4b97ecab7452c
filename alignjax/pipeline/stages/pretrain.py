"""A tokenizer and a language model from nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from alignjax.checkpoints import huggingface
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_inputs
from alignjax.models.build import ModelConfig, build
from alignjax.models.log_probs import log_prob
from alignjax.models.model import Model
from alignjax.models.tokenizer import pad, single_token
from alignjax.objectives import NEXT_TOKEN_MEANINGS, next_token_loss, packed_next_token_loss
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, Program, abstract_tokens, function_of
from alignjax.pipeline.networks import Network, NetworkRecord
from alignjax.pipeline.stages.load import parameter_count, parameter_places
from alignjax.preferences.preference_models import template_tokens
from alignjax.tasks.task import EOS
from alignjax.training import data
from alignjax.training.loop import Learner, LearnerSpec, Loop, train
from alignjax.training.optimizer import Adam
from alignjax.training.shared_tree import SharedTree
from alignjax.types import Loss, PackedTokens, Tokens


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Trains a tokenizer and a language model on the task's corpus, packed into rows."""

    model: ModelConfig
    documents: int
    row: int  # tokens
    adam: Adam
    loop: Loop
    tokenizer_documents: int = 4000
    seed: int = 0
    makes: ClassVar[Kind] = Kind.POLICY

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "documents", "row", "tokenizer_documents")

    def network(self, context: Context) -> NetworkSpec:
        """Returns the model; its tokenizer is made when the stage runs."""
        return NetworkSpec(
            NetworkRecord(self.model, "float32", {}, False, None), None, f"trained by stage {context.name}"
        )

    def exposure(self, context: Context) -> Exposure:
        """Returns the network itself: a corpus holds no pairs."""
        return context.derived_exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when the batch, the model's sizes or the corpus do not work."""
        self.loop.check(context.name, context.mesh, self.documents)
        build(self.model)  # refuses sizes that do not go together
        self.corpus(context, 1)

    def corpus(self, context: Context, count: int) -> list[str]:
        """Returns documents of the task. Raises UserError when it has no corpus."""
        if context.task.corpus is None:
            raise UserError(f"{context.name}: task {context.task.name!r} has no corpus to pretrain on; "
                            "give Task.corpus_of_source, or start from a LoadCheckpoint stage")  # fmt: skip
        return list(context.task.corpus(count, context.seed(self.seed)))

    def learner(self, context: Context) -> Learner:
        """Returns the compiled training of the model."""
        model = build(self.model)
        params = jax.eval_shape(model.init, context.key(self.seed))
        return LearnerSpec(self.loop, self.adam, pretraining_loss(model), model.rules).compile(params, context.mesh)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the program that learns from one batch."""
        self.loop.check(context.name, context.mesh)
        learner, row = self.learner(context), abstract_tokens(self.loop.batch, self.row)
        batch = PackedTokens(row.tokens, row.tokens) if build(self.model).forward else (row, row)
        arguments = learner.state, SharedTree(()), batch
        return (Program("learn", learner.learn, arguments, self.loop.batch * self.row),)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Trains the tokenizer and the model, and writes the network."""
        texts, task, model = self.corpus(context, self.documents), context.task, build(self.model)
        markers = [piece for piece in task.format.stop if piece != EOS]
        tokenizer = huggingface.train_tokenizer(texts[: self.tokenizer_documents], self.model.vocab_size, markers)
        if tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(f"{context.name}.model.vocab_size={self.model.vocab_size} is below the tokenizer's "
                            f"{tokenizer.vocab_size} tokens; raise it")  # fmt: skip
        if task.template and becomes_preference(context):
            template_tokens(tokenizer, task.template)  # refuses the template now, not after the training
        end = single_token(tokenizer, "</s>")
        ids = [[*tokenizer.encode(text), end] for text in texts]
        corpus = packed_corpus if model.forward else split_corpus
        rows = corpus(ids, self.row, self.loop.batch, context.seed(self.seed))
        learner = self.learner(context)._replace(learn=function_of(programs, "learn"))
        init = jax.jit(model.init, out_shardings=parameter_places(model, context.mesh))
        trained = train(
            context.training_run(self.seed),
            learner,
            lambda: (init(context.key(self.seed)), ()),
            rows.plan,
            rows.make_batch,
        )
        networks.save(context.folder, Network(context.name, model, tokenizer, "", trained.params))
        sizes = {"vocabulary": tokenizer.vocab_size, "parameters": parameter_count(trained.params)}
        return {**rows.figures, **trained.figures, **sizes}

    meanings: ClassVar[dict[str, str]] = {
        **NEXT_TOKEN_MEANINGS,
        "documents": "packed into rows",
        "too_long": "documents longer than a row, left out",
        "vocabulary": "tokens of the tokenizer",
        "parameters": "numbers in the network",
    }


def becomes_preference(context: Context) -> bool:
    """Returns whether a preference model is made from this stage's network."""
    stages = context.experiment.stages

    def starts_here(name: str) -> bool:
        starts = [source for field, source, _ in stage_inputs(stages[name]) if field == "start"]
        return name == context.name or any(map(starts_here, starts))

    return any(starts_here(name) for name, stage in stages.items() if stage.makes == Kind.PREFERENCE)


def pretraining_loss(model: Model) -> Loss:
    """Returns the loss of a corpus: of packed documents, or for an encoder-decoder of the tails of documents."""
    if model.forward is None:
        return functools.partial(next_token_loss, log_prob=log_prob(model))
    return functools.partial(packed_next_token_loss, forward=model.forward, logits=model.logits)


class Corpus(NamedTuple):
    """Tokenized documents as batches."""

    plan: Callable[[int], data.BatchPlan]
    make_batch: Callable[[data.BatchPlan], Any]
    figures: dict[str, Any]


def packed_corpus(documents: list[list[int]], row: int, batch: int, seed: int) -> Corpus:
    """Returns batches of rows of ``row`` tokens in which documents lie side by side."""
    rows = pack_documents(documents, row)

    def make_batch(plan: data.BatchPlan) -> PackedTokens:
        return PackedTokens(rows.tokens[plan.indices], rows.segments[plan.indices])

    fitting = sum(int(segments.max()) for segments in rows.segments)
    figures = {"documents": fitting, "too_long": len(documents) - fitting, "rows": len(rows.tokens)}
    return Corpus(data.plan_batches([row] * len(rows.tokens), [row], batch, seed), make_batch, figures)


def split_corpus(documents: list[list[int]], row: int, batch: int, seed: int) -> Corpus:
    """Returns batches of documents cut at a random place: an encoder-decoder reads what is before the cut and predicts
    what is behind it (prefix language modelling, 1910.10683, 3.2.1)."""
    kept = [document for document in documents if 2 <= len(document) <= row]

    def cut(index: int, step: int) -> int:
        return int(np.random.default_rng((seed, step, index)).integers(1, len(kept[index])))

    def make_batch(plan: data.BatchPlan) -> tuple[Tokens, Tokens]:
        cuts = [(kept[i], cut(i, plan.step)) for i in plan.indices]
        heads, tails = [document[:at] for document, at in cuts], [document[at:] for document, at in cuts]
        return pad(heads, plan.length), pad(tails, plan.length)

    figures = {"documents": len(kept), "too_long": len(documents) - len(kept), "rows": len(kept)}
    plan = data.plan_batches([len(document) for document in kept], (row // 2, row), batch, seed)
    return Corpus(plan, make_batch, figures)


def pack_documents(documents: list[list[int]], length: int) -> PackedTokens:
    """Returns documents side by side in rows of ``length`` tokens, [R, length].

    A document longer than a row is left out.
    """
    rows: list[list[list[int]]] = [[]]
    for document in documents:
        if len(document) <= length:
            if sum(map(len, rows[-1])) + len(document) > length:
                rows.append([])
            rows[-1].append(document)
    tokens, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        offset = 0
        for number, document in enumerate(row, 1):
            part = slice(offset, offset + len(document))
            tokens[i, part], segments[i, part] = document, number
            offset += len(document)
    return PackedTokens(tokens, segments)
