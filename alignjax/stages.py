"""The stage kinds an experiment is made of: where science and machinery meet.

A stage names its inputs by other stages' names and writes ``WORKDIR/<name>/``. ``alignjax.run`` decides
whether it runs; here is what it does. Each kind is a frozen dataclass with ``inputs()`` and ``run(context)``.
"""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax

from alignjax import config, judges, labeling, objectives, rollout, tournament
from alignjax import preference as preferences
from alignjax.decoding import Sampling
from alignjax.generation import Generate, generator
from alignjax.judges import Judge
from alignjax.models import huggingface
from alignjax.models.likelihood import log_prob, token_log_probs
from alignjax.models.tokenizer import Tokenizer, encode_continuation, pad, single_token
from alignjax.models.transformer import Model, TransformerConfig, transformer
from alignjax.runtime import data, metrics, sharding, train
from alignjax.runtime.checkpoint import Checkpointer, restore_tree, save_tree
from alignjax.tasks.task import Task
from alignjax.types import Array, Batch, Key, Metrics, Pair, Params, Rules, Tokens, UserError

PAIR_DATA = "data"
SHOWN = ("nll", "loss", "accuracy", "preference", "kl", "length")  # beside a progress bar


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW after clipping by the global norm; a linear warm-up, then a cosine to zero or a constant."""

    lr: float
    warmup: int = 10
    schedule: str = "cosine"  # or "constant"
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, steps: int) -> optax.GradientTransformation:
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"schedule={self.schedule!r} is unknown; choose cosine or constant")
        warm = min(self.warmup, max(steps - 1, 0))
        after = {
            "cosine": optax.cosine_decay_schedule(self.lr, max(steps - warm, 1)),
            "constant": optax.constant_schedule(self.lr),
        }[self.schedule]
        rate = optax.join_schedules([optax.linear_schedule(0.0, self.lr, max(warm, 1)), after], [warm])
        adam = optax.adamw(rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is: a task, a mesh, a seed and an ordered dict of stages."""

    task: Task
    stages: dict[str, Any]  # name -> Stage
    mesh: sharding.Mesh = sharding.Mesh()
    seed: int = 0

    def with_stages(self, **stages: Any) -> Experiment:
        """The experiment with stages added or replaced."""
        return dataclasses.replace(self, stages={**self.stages, **stages})


@dataclasses.dataclass(frozen=True)
class Network:
    """A stage's result as others use it."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    fingerprint: str  # of the tokenizer: equal ones share token ids


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a stage runs: its name, its folder and how to reach its inputs."""

    experiment: Experiment
    workdir: Path
    name: str
    mesh: jax.sharding.Mesh

    @property
    def folder(self) -> Path:
        return self.workdir / self.name

    @property
    def seed(self) -> int:
        """The stage's own seed: the experiment's with the stage's name mixed in."""
        return zlib.crc32(f"{self.experiment.seed}/{self.name}".encode()) % 2**31

    @property
    def key(self) -> Key:
        return jax.random.key(self.seed)

    def preference(self, name: str) -> tuple[Network, preferences.Preference]:
        """A fitted preference model and its form. Raises UserError when the stage makes none."""
        stage = self.experiment.stages[name]
        if not isinstance(stage, FitPreference):
            raise UserError(f"stage {self.name!r} needs a preference model and {name!r} makes none; name one that does")
        return self.network(name, lambda m, t: stage.build(self.experiment.task, m, t))

    def policy(self, name: str) -> Network:
        return self.network(name, None)[0]

    def network(self, name: str, form: Callable[[Model, Tokenizer], preferences.Preference] | None):
        """Restores a stage's network onto the mesh."""
        folder = self.workdir / name
        try:
            sizes = TransformerConfig(**json.loads((folder / "model.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder} holds no model ({config.one_line(error)}); run its stage first") from None
        model, tokenizer = transformer(sizes), huggingface.read_tokenizer(folder / "tokenizer")
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        built = form(model, tokenizer) if form else None
        if built:
            shapes = jax.eval_shape(built.extend, shapes, jax.random.key(0))
        rules = sharding.live(built.rules if built else model.rules, shapes)
        params = restore_tree(folder / "params", shapes, sharding.shardings(shapes, rules, self.mesh))
        mark = str(zlib.crc32((folder / "tokenizer" / "tokenizer.json").read_bytes()))
        return Network(model, params, tokenizer, mark), built

    def save_network(self, sizes: TransformerConfig, params: Params, tokenizer: Tokenizer) -> None:
        save_tree(self.folder / "params", params)
        tokenizer.save(self.folder / "tokenizer")
        metrics.write_json(self.folder / "model.json", dataclasses.asdict(sizes))

    def inherit(self, start: str, params: Params) -> None:
        """Saves parameters of the same sizes and tokenizer as the stage ``start``."""
        sizes = TransformerConfig(**json.loads((self.workdir / start / "model.json").read_text()))
        self.save_network(sizes, params, huggingface.read_tokenizer(self.workdir / start / "tokenizer"))


class Stage(Protocol):
    def inputs(self) -> tuple[str, ...]: ...
    def run(self, context: Context) -> dict[str, Any]:
        """Does the work, resuming what an interrupted run left; returns figures for the report."""
        ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long a training stage goes on and how often it looks up."""

    steps: int
    batch: int
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 100


def run_loop(
    context: Context,
    loop: Loop,
    adam: Adam,
    params: Params,
    rules: Rules,
    objective: Callable[..., tuple[Array, Metrics]],
    make_batch: Callable[[int], Batch],
    collect: train.Collect = train.given,
    frozen: Any = None,
    average_decay: float | None = None,
) -> Params:
    """Trains from ``params``, or from the newest save of an interrupted run; returns the last parameters."""
    mesh = context.mesh
    sharding.check_batch(f"{context.name}.loop.batch", loop.batch, mesh)
    if loop.batch % loop.accumulate:
        raise UserError(f"{context.name}: accumulate={loop.accumulate} does not divide batch={loop.batch}")
    optimizer = adam.build(loop.steps)
    start = jax.jit(lambda p, k: train.init(p, optimizer, k, average_decay is not None))
    shapes = jax.eval_shape(start, params, context.key)
    layout = sharding.shardings(shapes, sharding.live(rules, shapes.params), mesh, strict=False)
    compiled = jax.jit(
        train.make_update(objective, optimizer, collect, loop.accumulate, average_decay),
        in_shardings=(layout, None, sharding.rows(mesh)),
        out_shardings=(layout, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    saver = Checkpointer(context.folder / "checkpoints")
    state = saver.restore(jax.jit(start, out_shardings=layout)(params, context.key))
    done = int(state.step)
    writer = metrics.MetricsWriter(context.folder, resume_step=done)
    bar = metrics.progress(loop.steps, done, context.name, "step")
    waiting: list[tuple[int, Metrics]] = []

    def every(state: Any, step: int, values: Metrics) -> None:
        waiting.append((step - 1, values))
        saves = step % loop.save_every == 0 and step < loop.steps
        if saves or step % loop.log_every == 0 or step in (loop.steps, 1):
            for index, row in waiting:
                writer.write(index, row)
            waiting.clear()
            bar.set_postfix({k: f"{float(values[k]):.3f}" for k in SHOWN if k in values}, refresh=False)
        bar.update()
        if saves:
            saver.save(state)

    with bar:
        state = train.fit(state, done, frozen, data.batches(make_batch, done, loop.steps), compiled, every)
        jax.block_until_ready(state.params)
    writer.close()
    saver.close()
    return state.params


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A tokenizer and a language model from nothing, on the task's own corpus, packed into rows."""

    model: TransformerConfig
    documents: int
    row: int  # tokens
    adam: Adam
    loop: Loop
    tokenizer_documents: int = 4000

    def inputs(self) -> tuple[str, ...]:
        return ()

    def run(self, context: Context) -> dict[str, Any]:
        task = context.experiment.task
        texts = task.source.corpus(self.documents, context.seed)
        tokenizer = huggingface.train_tokenizer(
            texts[: self.tokenizer_documents], self.model.vocab_size, task.format.stop
        )
        if tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(f"{context.name}.model.vocab_size={self.model.vocab_size} is below {tokenizer.vocab_size}")
        end = single_token(tokenizer, "</s>")
        rows = pack([[*tokenizer.encode(text), end] for text in texts], self.row)
        plan = data.planned([self.row] * len(rows.tokens), [self.row], self.loop.batch, context.seed)
        model = transformer(self.model)

        def objective(params: Params, batch: Tokens, key: Key) -> tuple[Array, Metrics]:
            segments, targets = batch.mask, batch.tokens[:, 1:]
            states = model.causal(params, batch.tokens, segments)[:, :-1]
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

    path: str

    def inputs(self) -> tuple[str, ...]:
        return ()

    def run(self, context: Context) -> dict[str, Any]:
        folder = Path(self.path)
        sizes = huggingface.read_config(folder)
        params, tokenizer = huggingface.read_params(folder, sizes), huggingface.read_tokenizer(folder)
        context.save_network(sizes, params, tokenizer)
        return {"parameters": sum(x.size for x in jax.tree.leaves(params))}


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a stage lets a model write."""

    max_new_tokens: int
    buckets: tuple[int, ...]  # prompt lengths in tokens that are compiled for
    batch: int
    sampling: Sampling = Sampling()

    def generator(self, context: Context, policy: Network, reference: Network | None = None) -> Generate:
        sharding.check_batch(f"{context.name}.writing.batch", self.batch, context.mesh)
        if reference and reference.fingerprint != policy.fingerprint:
            raise UserError(f"{context.name}: the policy and the reference have different tokenizers; use one start")
        return generator(
            policy.model,
            policy.params,
            policy.tokenizer,
            stop=stop_tokens(context.experiment.task, policy.tokenizer),
            max_new_tokens=self.max_new_tokens,
            buckets=tuple(sorted(self.buckets)),
            batch=self.batch,
            sampling=self.sampling,
            key=context.key,
            reference=(log_prob(reference.model), reference.params) if reference else None,
            rows=sharding.rows(context.mesh),
        )


def stop_tokens(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(single_token(tokenizer, piece) for piece in task.format.stop)


def unseen_stops(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The stop tokens that no reply of the task's format ends with."""
    end = encode_continuation(tokenizer, task.format.end)
    return tuple(token for token in stop_tokens(task, tokenizer) if token not in end)


@dataclasses.dataclass(frozen=True)
class Label:
    """prompts -> a TFDS dataset of pairs, by a labelling method. Resumes after its last whole chunk."""

    generator: str
    method: Callable[..., tuple[list[labeling.Labeled], int]]  # a labeling.Method
    split: str
    prompts: int
    writing: Writing
    held_out: float = 0.0  # share of the pairs that goes to the split "held_out"

    def inputs(self) -> tuple[str, ...]:
        return (self.generator,)

    def run(self, context: Context) -> dict[str, Any]:
        if not 0 <= self.held_out < 1:
            raise UserError(f"{context.name}.held_out={self.held_out} is not a share; choose one from 0 up to 1")
        task, policy = context.experiment.task, context.policy(self.generator)
        prompts = task.source.prompts(self.split, self.prompts, context.seed)
        generate = self.writing.generator(context, policy)
        context.folder.mkdir(parents=True, exist_ok=True)
        chunks = context.folder / "chunks.jsonl"
        done = metrics.read_metrics(chunks)
        metrics.write_atomic(chunks, "".join(json.dumps(row) + "\n" for row in done))  # a torn line goes
        size = 4 * self.writing.batch  # prompts a chunk: retries are few, and fill their batches
        with chunks.open("a") as file, metrics.progress(len(prompts), len(done) * size, context.name, "prompt") as bar:
            for at in range(len(done) * size, len(prompts), size):
                numbers = range(at, min(at + size, len(prompts)))
                pairs, tries = self.method(generate, task, [prompts[i] for i in numbers], numbers, context.seed)
                done.append({"step": at, "tries": tries, "asked": len(numbers), "pairs": pairs})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
                bar.update(len(numbers))
        return self.finish(context, done)

    def finish(self, context: Context, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the dataset and counts what the oracle makes of its labels."""
        task = context.experiment.task
        pairs = [labeling.Labeled(*pair) for chunk in chunks for pair in chunk["pairs"]]
        if not pairs:
            raise UserError(f"{context.name}: no pair came through the filter; look at the generator's replies")
        rows = [pair._asdict() for pair in pairs]
        cut = len(rows) - int(self.held_out * len(rows))
        splits = {"train": rows[:cut], **({"held_out": rows[cut:]} if cut < len(rows) else {})}
        oracle = next(iter(task.oracles.values()))
        truth = np.array([oracle(pair.prompt, pair.first, pair.second) for pair in pairs])
        labels = np.array([pair.p for pair in pairs])
        told = truth != 0.5
        asked = sum(chunk["asked"] for chunk in chunks)
        figures = {
            "pairs": len(pairs),
            "dropped": asked - len(pairs),
            "tries_per_prompt": sum(chunk["tries"] for chunk in chunks) / asked,
            "oracle_ties": float(np.mean(~told)),
            "label_accuracy": float(np.mean((labels > 0.5)[told] == (truth > 0.5)[told])) if told.any() else None,
        }
        source = {"method": config.describe(self.method), "generator": self.generator, "seed": context.seed}
        data.write_pairs(context.folder / PAIR_DATA, splits, {**source, "task": task.name, **figures})
        return figures


@dataclasses.dataclass(frozen=True)
class FitPreference:
    """A preference model on a Label stage's pairs, from the parameters of ``start``."""

    start: str
    pairs: str
    adam: Adam
    loop: Loop
    buckets: tuple[int, ...]  # prompt lengths in tokens
    response: int  # most tokens of a response
    form: Callable[..., preferences.Preference] = preferences.pairwise  # or bradley_terry
    truth: str | None = None  # a Label stage to be measured on: its pairs are never trained on

    def inputs(self) -> tuple[str, ...]:
        return (self.start, self.pairs, *([self.truth] if self.truth else []))

    def build(self, task: Task, model: Model, tokenizer: Tokenizer) -> preferences.Preference:
        return self.form(model, preferences.template_tokens(tokenizer, task.template))

    def run(self, context: Context) -> dict[str, Any]:
        if self.truth == self.pairs:
            raise UserError(f"{context.name}: truth and pairs are both {self.pairs!r}; measure on pairs not trained on")
        task, start = context.experiment.task, context.policy(self.start)
        built = self.build(task, start.model, start.tokenizer)
        rows = data.read_pairs(context.workdir / self.pairs / PAIR_DATA, "train")
        encoded, dropped = encode_pairs(rows, start.tokenizer, task, max(self.buckets), self.response)
        plan = data.planned([len(row[0]) for row in encoded], self.buckets, self.loop.batch, context.seed)

        def make_batch(step: int) -> Pair:
            indices, length = plan(step)
            prompts, first, second, p = zip(*(encoded[i] for i in indices), strict=True)
            return Pair(
                pad(prompts, length), pad(first, self.response), pad(second, self.response), np.asarray(p, np.float32)
            )

        def objective(params: Params, pair: Pair, key: Key) -> tuple[Array, Metrics]:
            return objectives.preference_cross_entropy(params, pair, key, logit=built.logit)

        params = run_loop(
            context, self.loop, self.adam, built.extend(start.params, context.key), built.rules, objective, make_batch
        )
        context.inherit(self.start, params)
        figures: dict[str, Any] = {"pairs": len(encoded), "too_long": dropped}
        if self.truth:
            figures["held_out"] = self.measure(context, start, built, params)
        return figures

    def measure(
        self, context: Context, start: Network, built: preferences.Preference, params: Params
    ) -> dict[str, float]:
        """Accuracy and calibration on the pairs of ``truth``."""
        rows = data.read_pairs(context.workdir / (self.truth or "") / PAIR_DATA, "train")
        judge = judges.model_judge(
            built.logit, params, start.tokenizer, context.experiment.task.format,
            batch=self.loop.batch, rows=sharding.rows(context.mesh),
        )  # fmt: skip
        p = judge(*([row[name] for row in rows] for name in ("prompt", "first", "second")))
        return judges.calibration(p, np.array([row["p"] for row in rows]))


def encode_pairs(rows, tokenizer: Tokenizer, task: Task, longest_prompt: int, longest: int):
    """Rows of text -> (prompt, first, second) ids and p; what is too long is dropped and counted."""
    encoded = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        sides = [
            encode_continuation(tokenizer, judges.reply_text(task.format, row[name])) for name in ("first", "second")
        ]
        if len(prompt) <= longest_prompt and max(map(len, sides)) <= longest:
            encoded.append((prompt, *sides, row["p"]))
    if not encoded:
        raise UserError(f"none of {len(rows)} pairs fits prompts of {longest_prompt} and responses of {longest} tokens")
    return encoded, len(rows) - len(encoded)


@dataclasses.dataclass(frozen=True)
class Optimise:
    """A policy optimised on-policy against an opponent under a preference model."""

    start: str
    reference: str
    preference: str
    objective: Callable[..., tuple[Array, Metrics]]  # takes log_prob by keyword
    opponent: Callable[..., Any]  # a rollout.Opponent
    adam: Adam
    loop: Loop
    prompts: int
    buckets: tuple[int, ...]  # prompt lengths in tokens
    max_new_tokens: int
    average_decay: float | None = None  # of the weights' moving average, for rollout.moving_average
    unfinished_loses: bool = True

    def inputs(self) -> tuple[str, ...]:
        return (self.start, self.reference, self.preference)

    def run(self, context: Context) -> dict[str, Any]:
        task, start, reference = context.experiment.task, context.policy(self.start), context.policy(self.reference)
        fitted, built = context.preference(self.preference)
        if reference.model.config != start.model.config:
            raise UserError(
                f"{context.name}: {self.start!r} and {self.reference!r} are models of different sizes; use one"
            )
        for name, network in ((self.reference, reference), (self.preference, fitted)):
            if network.fingerprint != start.fingerprint:
                raise UserError(f"{context.name}: {self.start!r} and {name!r} have different tokenizers; use one start")
        if self.opponent is rollout.moving_average and self.average_decay is None:
            raise UserError(f"{context.name}: the opponent moving_average needs average_decay; set it, e.g. 0.999")
        score = log_prob(start.model)
        collect = rollout.collector(
            start.model, score, built.logit, self.opponent, self.max_new_tokens,
            stop_tokens(task, start.tokenizer), self.unfinished_loses, unseen_stops(task, start.tokenizer),
        )  # fmt: skip
        ids = [start.tokenizer.encode(text) for text in task.source.prompts("train", self.prompts, context.seed)]
        kept = [row for row in ids if len(row) <= max(self.buckets)]
        plan = data.planned([len(row) for row in kept], self.buckets, self.loop.batch, context.seed)

        def make_batch(step: int) -> Tokens:
            indices, length = plan(step)
            return pad([kept[i] for i in indices], length)

        def objective(params: Params, batch: Any, key: Key) -> tuple[Array, Metrics]:
            return self.objective(params, batch, key, log_prob=score)

        params = run_loop(
            context, self.loop, self.adam, start.params, start.model.rules, objective, make_batch,
            collect, {"reference": reference.params, "preference": fitted.params}, self.average_decay,
        )  # fmt: skip
        context.inherit(self.start, params)
        return {"prompts": len(kept), "too_long": len(ids) - len(kept)}


@dataclasses.dataclass(frozen=True)
class Tournament:
    """Policies against each other on held-out prompts, by oracles and held-out preference models."""

    policies: dict[str, str]  # name in the table -> stage
    reference: str
    judges: dict[str, str]  # name in the table -> one of the task's oracles, or a FitPreference stage
    prompts: int
    writing: Writing
    split: str = "test"

    def inputs(self) -> tuple[str, ...]:
        return (*self.policies.values(), self.reference, *self.model_judges().values())

    def model_judges(self) -> dict[str, str]:
        return {name: source for name, source in self.judges.items() if not source.startswith("oracle:")}

    def run(self, context: Context) -> dict[str, Any]:
        task = context.experiment.task
        self.check_held_out(context)
        prompts = task.source.prompts(self.split, self.prompts, context.seed)
        written = dict(self.write(context, prompts))
        replies = {name: [task.clean(text) or "" for text in rows["text"]] for name, rows in written.items()}
        tables = []
        for name, source in self.judges.items():
            rates = tournament.win_rates(self.judge(context, source), prompts, replies)
            tables.append({
                "judge": name,
                "policies": list(self.policies),
                "n": len(prompts),
                "win_rate": rates.rate.tolist(),
                "low": rates.low.tolist(),
                "high": rates.high.tolist(),
                "mean_length": [float(np.mean(written[p]["length"])) for p in self.policies],
                "kl_to_reference": [float(np.mean(written[p]["kl"])) for p in self.policies],
                "mean_score": [float(np.mean(list(map(task.score, prompts, replies[p])))) for p in self.policies],
            })  # fmt: skip
        samples = [{"prompt": x, **{p: replies[p][i] for p in self.policies}} for i, x in enumerate(prompts[:8])]
        metrics.write_json(context.folder / "samples.json", samples)
        metrics.write_json(context.folder / "win_rates.json", tables)
        return {"prompts": len(prompts)}

    def write(self, context: Context, prompts: Sequence[str]) -> Iterator[tuple[str, dict[str, list]]]:
        """Each policy's replies, kept in a file of its own, so that a resumed run does not write them again."""
        reference = context.policy(self.reference)
        with metrics.progress(len(self.policies), 0, context.name, "policy") as bar:
            for name, stage in self.policies.items():
                path = context.folder / f"replies-{name}.json"
                if not path.exists():
                    generate = self.writing.generator(context, context.policy(stage), reference)
                    drawn = generate(prompts, range(len(prompts)), zlib.crc32(name.encode()) % 2**31)
                    columns = zip(*drawn, strict=True)
                    metrics.write_json(path, dict(zip(("text", "length", "kl"), map(list, columns), strict=True)))
                bar.update()
                yield name, json.loads(path.read_text())

    def judge(self, context: Context, source: str) -> Judge:
        task = context.experiment.task
        if source.startswith("oracle:"):
            oracle = source.removeprefix("oracle:")
            if oracle not in task.oracles:
                raise UserError(f"task {task.name!r} has no oracle {oracle!r}; it has {', '.join(task.oracles)}")
            return judges.oracle_judge(task.oracles[oracle])
        network, built = context.preference(source)
        return judges.model_judge(
            built.logit, network.params, network.tokenizer, task.format,
            batch=self.writing.batch, rows=sharding.rows(context.mesh),
        )  # fmt: skip

    def check_held_out(self, context: Context) -> None:
        """The judge of an evaluation is never a model that a policy was trained against, nor made from one,
        nor fitted to the same pairs."""
        stages = context.experiment.stages
        trained = {
            stages[name].preference
            for name in ancestors(stages, self.policies.values())
            if isinstance(stages[name], Optimise)
        }
        for name, source in self.model_judges().items():
            same_pairs = {
                t for t in trained if getattr(stages[t], "pairs", "") == getattr(stages[source], "pairs", None)
            }
            found = (ancestors(stages, [source]) & trained) | same_pairs
            if found:
                raise UserError(f"{context.name}: judge {name!r} is or shares {min(found)!r}, which a policy was "
                                "trained against; name a held-out one")  # fmt: skip


def ancestors(stages: Mapping[str, Stage], names: Iterable[str]) -> set[str]:
    """The stages themselves and all they are made from."""
    seen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += stages[name].inputs()
    return seen


def timed(stage: Stage, context: Context) -> tuple[dict[str, Any], float]:
    """Runs a stage under the mesh; its figures and its wall seconds."""
    begun = time.perf_counter()
    with jax.set_mesh(context.mesh):
        figures = stage.run(context)
    return figures, time.perf_counter() - begun


def order(stages: Mapping[str, Stage]) -> list[str]:
    """The stages' names, inputs first. Raises UserError on an unknown input or a circle."""
    done: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(f"stages form a circle: {' -> '.join((*above, name))}; an input must come before its user")
        if name not in stages:
            raise UserError(
                f"stage {above[-1]!r} names the input {name!r}, which is no stage; there are {', '.join(stages)}"
            )
        for source in stages[name].inputs():
            visit(source, (*above, name))
        if name not in done:
            done.append(name)

    for name in stages:
        visit(name, ())
    return done
