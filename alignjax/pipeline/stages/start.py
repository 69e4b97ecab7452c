"""Where parameters come from: pretraining on the task's corpus, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax import objectives
from alignjax.checkpoints import huggingface, peft, weights
from alignjax.distributed import sharding
from alignjax.errors import UserError, check_range
from alignjax.models.build import ModelConfig, build
from alignjax.models.decoder import TransformerConfig
from alignjax.models.layers import COMPUTE_DTYPES, REMAT_POLICIES, one_of
from alignjax.models.log_probs import log_prob, token_log_probs
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, as_chat, pad, single_token, stand_in
from alignjax.pipeline.experiment import POLICY, REWARD, Context, Program, ids_of
from alignjax.pipeline.networks import Adapter, Record, derived, save
from alignjax.preferences import models as preference
from alignjax.tasks.task import EOS
from alignjax.training import data
from alignjax.training.loop import Adam, Learning, Loop, run_loop
from alignjax.types import Array, Key, Metrics, Params, Tokens


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
        check_range(self, 1, math.inf, "documents", "row", "tokenizer_documents")

    def inputs(self) -> tuple[str, ...]:
        return ()

    def check(self, context: Context) -> None:
        self.loop.check(context, self.documents)
        build(self.model)  # sizes that do not go together
        context.task.source.corpus(1, context.seed)

    def record(self, context: Context) -> Record:
        return Record(self.model, "float32", {}, False, None)

    def learning(self, model: Model) -> Learning:
        return Learning(self.loop, self.adam, model.rules, (packed if model.causal else split)(model))

    def programs(self, context: Context) -> Iterator[Program]:
        model = build(self.model)
        row = ids_of(self.loop.batch, self.row)
        batch = Tokens(row.tokens, row.tokens) if model.causal else (row, row)
        params = jax.eval_shape(model.init, context.key)
        yield self.learning(model).program("update", params, None, batch, context, self.loop.batch * self.row)

    def run(self, context: Context) -> dict[str, Any]:
        task = context.task
        texts = task.source.corpus(self.documents, context.seed)
        tokenizer = huggingface.train_tokenizer(
            texts[: self.tokenizer_documents], self.model.vocab_size, [p for p in task.format.stop if p != EOS]
        )
        if tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(f"{context.name}.model.vocab_size={self.model.vocab_size} is below {tokenizer.vocab_size}")
        if task.template and context.is_compared():
            preference.template_tokens(tokenizer, task.template)  # refused now, not after the training
        end = single_token(tokenizer, "</s>")
        ids = [[*tokenizer.encode(text), end] for text in texts]
        model = build(self.model)
        reading = packed_documents if model.causal else split_documents
        plan, make_batch, counts = reading(ids, self.row, self.loop.batch, context.seed)
        first = jax.jit(model.init, out_shardings=layout(model, context))
        params, found = run_loop(context, self.learning(model), first(context.key), plan, make_batch)
        save(context.folder, self.model, params, tokenizer, chat=False, adapter=None)
        return {**counts, **found, "vocabulary": tokenizer.vocab_size, "parameters": size_of(params)}


def size_of(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def packed(model: Model) -> Callable[..., tuple[Array, Metrics]]:
    """A decoder's pretraining: every token of rows of packed documents is predicted."""
    causal = model.causal
    assert causal is not None  # an encoder-decoder reads split documents

    def objective(params: Params, batch: Tokens, key: Key) -> tuple[Array, Metrics]:
        segments, targets = batch.mask, batch.tokens[:, 1:]
        states = causal(params, batch.tokens, segments)[:, :-1]
        logp = token_log_probs(model.unembed, params, states, targets)
        return objectives.next_token(logp, (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1]))

    return objective


def packed_documents(documents: list[list[int]], row: int, batch: int, seed: int):
    rows = pack(documents, row)
    plan = data.planned([row] * len(rows.tokens), [row], batch, seed)

    def make_batch(chosen: data.Plan) -> Tokens:
        return Tokens(rows.tokens[chosen.indices], rows.mask[chosen.indices])

    fit = sum(int(row.max()) for row in rows.mask)
    return plan, make_batch, {"documents": fit, "too_long": len(documents) - fit, "rows": len(rows.tokens)}


def split(model: Model) -> Callable[..., tuple[Array, Metrics]]:
    """An encoder-decoder's pretraining: a document is cut anywhere, what is before the cut is read and what is behind
    it predicted (prefix language modelling, 1910.10683, 3.2.1)."""
    score = log_prob(model)

    def objective(params: Params, batch: tuple[Tokens, Tokens], key: Key) -> tuple[Array, Metrics]:
        return objectives.next_token(score(params, *batch), batch[1].mask)

    return objective


def split_documents(documents: list[list[int]], row: int, batch: int, seed: int):
    kept = [document for document in documents if 2 <= len(document) <= row]
    plan = data.planned([len(document) for document in kept], (row // 2, row), batch, seed)

    def cut(index: int, step: int) -> int:
        return int(np.random.default_rng((seed, step, index)).integers(1, len(kept[index])))

    def make_batch(chosen: data.Plan) -> tuple[Tokens, Tokens]:
        cuts = [(kept[i], cut(i, chosen.step)) for i in chosen.indices]
        before, behind = [document[:at] for document, at in cuts], [document[at:] for document, at in cuts]
        return pad(before, chosen.length), pad(behind, chosen.length)

    return plan, make_batch, {"documents": len(kept), "too_long": len(documents) - len(kept), "rows": len(kept)}


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
    """A Hugging Face folder, read shard by shard onto the mesh. A sequence classification with one label makes
    a reward model: ``ZeroShot(start, bradley_terry)`` asks it. Its score is read at a reply's last token, so the task's
    ``format.end`` must be the text that such a model's replies end with."""

    path: str
    chat: bool = False  # prompts are asked through the tokenizer's chat template
    dtype: str = "float32"  # of the parameters; under adapters "bfloat16" halves the frozen base
    compute_dtype: str = "float32"
    remat: str = "none"
    decode: str = "unrolled"  # or "scanned", of a decoder-only model (TransformerConfig)
    model: ModelConfig | None = None  # what the folder must hold; with it, ``plan`` needs no folder
    content: str = dataclasses.field(init=False)  # what lay in the folder, so that another checkpoint is noticed

    def __post_init__(self) -> None:
        one_of(self, "dtype", COMPUTE_DTYPES)
        one_of(self, "compute_dtype", COMPUTE_DTYPES)
        one_of(self, "remat", tuple(REMAT_POLICIES))
        object.__setattr__(self, "content", weights.content(Path(self.path)))

    @property
    def makes(self) -> str:
        return REWARD if self.content and weights.SCORE in weights.tensor_files(Path(self.path)) else POLICY

    def inputs(self) -> tuple[str, ...]:
        return ()

    def config(self) -> ModelConfig:
        folder = Path(self.path)
        here: dict[str, Any] = {"compute_dtype": self.compute_dtype, "remat": self.remat}
        found = self.model if self.model and not self.content else huggingface.read_config(folder)
        if isinstance(found, TransformerConfig):
            here["decode"] = self.decode
        if found is self.model:
            return dataclasses.replace(found, **here)
        if weights.SCORE in weights.tensor_files(folder):  # it has no output projection
            found = dataclasses.replace(found, tied=True)
        found = dataclasses.replace(found, **here)
        if self.model and found != (named := dataclasses.replace(self.model, **here)):
            other = min(name for name, value in vars(named).items() if getattr(found, name, None) != value)
            raise UserError(f"{folder} holds another model than the experiment names: {other} is "
                            f"{getattr(found, other, None)!r}, not {getattr(named, other)!r}")  # fmt: skip
        return found

    def tokenizer(self) -> Tokenizer:
        if self.model and not self.content:
            return stand_in(self.model.vocab_size)
        return tokenizer_of(self.path, self.content)

    def record(self, context: Context) -> Record:
        heads = {"reward": {"kernel": [self.config().width]}} if self.makes == REWARD else {}
        return Record(self.config(), self.dtype, heads, self.chat, None)

    def check(self, context: Context) -> None:
        if not self.content:
            huggingface.read_config(Path(self.path))  # says what is missing, where ``model`` would stand in for it
        folder, config = Path(self.path), self.config()
        weights.check_tensors(folder, config)
        weights.read_reward(folder, config.width)
        tokenizer = self.tokenizer()
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
                            f"{config.vocab_size}; give the model's own tokenizer")  # fmt: skip
        if self.chat:
            as_chat(tokenizer, context.task.messages)  # refuses one without a template
        layout(build(config), context)

    def run(self, context: Context) -> dict[str, Any]:
        folder, config = Path(self.path), self.config()
        params = weights.read_params(folder, config, layout(build(config), context), np.dtype(self.dtype))
        params |= weights.read_reward(folder, config.width)
        save(context.folder, config, params, huggingface.read_tokenizer(folder), self.chat, adapter=None)
        return {"parameters": size_of(params)}


@functools.lru_cache(maxsize=4)
def tokenizer_of(path: str, content: str) -> Tokenizer:
    """A folder's tokenizer, read once for all the stages that ask; ``content`` tells when the folder is another."""
    return huggingface.read_tokenizer(Path(path))


def layout(model: Model, context: Context) -> Any:
    """Where a model's parameters lie. Raises UserError when one does not divide over the mesh."""
    return sharding.shardings(jax.eval_shape(model.init, jax.random.key(0)), model.rules, context.mesh)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Adapters from a folder of the PEFT library's, over the network of ``start``."""

    makes: ClassVar = POLICY
    start: str
    path: str
    content: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", weights.content(Path(self.path)))

    def inputs(self) -> tuple[str, ...]:
        return (self.start,)

    def record(self, context: Context) -> Record:
        start = context.record(self.start)
        return derived(start, self.start, peft.read_adapters(Path(self.path), start.config)[0], {})

    def check(self, context: Context) -> None:
        context.expect(self.start, POLICY)
        peft.read_lora(Path(self.path))

    def run(self, context: Context) -> dict[str, Any]:
        start = context.policy(self.start)
        if start.adapter:
            raise UserError(f"{context.name}: {self.start!r} has adapters already; name the stage they lie over")
        lora, small = peft.read_adapters(Path(self.path), start.model.config)
        context.save(start, small, Adapter(self.start, lora))
        return {"parameters": size_of(small), "rank": lora.rank}
