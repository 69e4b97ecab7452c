"""Where parameters come from: pretraining on the task's corpus, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax import objectives
from alignjax.models import huggingface, weights
from alignjax.models.build import ModelConfig, build
from alignjax.models.likelihood import token_log_probs
from alignjax.models.tokenizer import single_token
from alignjax.runtime import data
from alignjax.stages.experiment import POLICY, Context
from alignjax.stages.training import Adam, Loop, run_loop
from alignjax.types import Array, Key, Metrics, Params, Tokens, UserError, in_range


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A tokenizer and a language model from nothing, on the task's own corpus, packed into rows."""

    makes: ClassVar = POLICY
    model: ModelConfig
    documents: int
    row: int  # tokens
    adam: Adam
    loop: Loop
    tokenizer_documents: int = 4000

    def __post_init__(self) -> None:
        in_range(self, 1, math.inf, "documents", "row", "tokenizer_documents")

    def inputs(self) -> tuple[str, ...]:
        return ()

    def check(self, context: Context) -> None:
        self.loop.check(context)
        build(self.model)  # sizes that do not go together
        context.task.source.corpus(1, context.seed)

    def run(self, context: Context) -> dict[str, Any]:
        task = context.task
        texts = task.source.corpus(self.documents, context.seed)
        tokenizer = huggingface.train_tokenizer(
            texts[: self.tokenizer_documents], self.model.vocab_size, task.format.stop
        )
        if tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(f"{context.name}.model.vocab_size={self.model.vocab_size} is below {tokenizer.vocab_size}")
        end = single_token(tokenizer, "</s>")
        rows = pack([[*tokenizer.encode(text), end] for text in texts], self.row)
        plan = data.planned([self.row] * len(rows.tokens), [self.row], self.loop.batch, context.seed)
        model = build(self.model)

        if model.causal is None:
            raise UserError(f"{context.name} packs documents into rows, which an encoder-decoder cannot read")
        causal = model.causal

        def objective(params: Params, batch: Tokens, key: Key) -> tuple[Array, Metrics]:
            segments, targets = batch.mask, batch.tokens[:, 1:]
            states = causal(params, batch.tokens, segments)[:, :-1]
            logp = token_log_probs(model.unembed, params, states, targets, chunk=128)
            return objectives.next_token(logp, (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1]))

        def make_batch(step: int) -> Tokens:
            chosen = plan(step).indices
            return Tokens(rows.tokens[chosen], rows.mask[chosen])

        params = run_loop(context, self.loop, self.adam, model.init(context.key), model.rules, objective, make_batch)
        context.save_network(self.model, params, tokenizer)
        packed = sum(int(row.max()) for row in rows.mask)
        figures = {"documents": packed, "too_long": len(texts) - packed, "rows": len(rows.tokens)}
        return {
            **figures,
            "vocabulary": tokenizer.vocab_size,
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
        }


def pack(documents: list[list[int]], length: int) -> Tokens:
    """Documents side by side in rows; ``mask`` holds each token's document number in its row, from 1
    (0 is padding), so that none sees another. A document longer than a row is left out."""
    rows: list[list[list[int]]] = [[]]
    for document in documents:
        if len(document) <= length:
            if sum(map(len, rows[-1])) + len(document) > length:
                rows.append([])
            rows[-1].append(document)
    tokens, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, 1):
            tokens[i, at : at + len(document)], segments[i, at : at + len(document)] = document, number
            at += len(document)
    return Tokens(tokens, segments)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A Hugging Face folder as it is."""

    makes: ClassVar = POLICY
    path: str
    content: str = dataclasses.field(init=False)  # what lay in the folder, so that another checkpoint is noticed

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", weights.content(Path(self.path)))

    def inputs(self) -> tuple[str, ...]:
        return ()

    def check(self, context: Context) -> None:
        huggingface.read_config(Path(self.path))
        weights.tensor_files(Path(self.path))

    def run(self, context: Context) -> dict[str, Any]:
        folder = Path(self.path)
        sizes = huggingface.read_config(folder)
        params, tokenizer = weights.read_params(folder, sizes), huggingface.read_tokenizer(folder)
        context.save_network(sizes, params, tokenizer)
        return {"parameters": sum(x.size for x in jax.tree.leaves(params))}
