"""Pairs -> a preference model, of any form."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax import losses
from alignjax.distributed import storage
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.models.build import build
from alignjax.models.lora import Lora, init_adapters
from alignjax.models.tokenizer import Tokenizer, placeholder_tokenizer
from alignjax.objectives import PREFERENCE_MEANINGS, preference_loss
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, Program, function_of
from alignjax.pipeline.judges import judging_program
from alignjax.pipeline.networks import Network, SharedBase
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.pair_batches import (
    PairLimits,
    PairRow,
    abstract_pair_batch,
    encode_pairs,
    pair_batches,
    read_stage_pairs,
    shuffle_sides,
)
from alignjax.pipeline.stages.writing import SHORTENED, check_positions
from alignjax.pipeline.trained_parts import TrainedParts, split_trained, trained_spec
from alignjax.preferences import judges
from alignjax.preferences.preference_models import PreferenceForm, PreferenceModel, choice, pairwise, template_tokens
from alignjax.tasks.task import Task, Template
from alignjax.training.collect import Frozen
from alignjax.training.loop import Learner, LearnerSpec, Loop, Trained, train
from alignjax.training.optimizer import Adam
from alignjax.training.shared_tree import SharedTree
from alignjax.types import Array


@dataclasses.dataclass(frozen=True)
class FitPreference:
    """Fits a preference model to pairs, from the network of ``start``.

    A form that depends on the order of the responses sees each pair in an order that a coin decides: a file of people's
    choices has the preferred reply first.
    """

    adam: Adam
    loop: Loop
    buckets: tuple[int, ...]  # prompt lengths in tokens
    response: int  # the most tokens of a response
    start: str = stage_input(Kind.POLICY, Kind.PREFERENCE, Kind.REWARD)
    pairs: str = stage_input(Kind.PAIRS)
    form: PreferenceForm = pairwise  # or choice, pairwise_head, one_order, bradley_terry
    loss: Callable[..., Array] = losses.preference_cross_entropy  # (logit [B], label [B]) -> [B]
    lora: Lora | None = None  # train adapters and heads over the start's frozen base
    truth: str | None = stage_input(Kind.PAIRS, default=None)  # measured on; ``pairs`` means its held-out split
    seed: int = 0
    makes: ClassVar[Kind] = Kind.PREFERENCE

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "buckets", "response")

    @property
    def limits(self) -> PairLimits:
        """The lengths that are compiled for."""
        return PairLimits(self.buckets, self.response)

    def preference_model(self, task: Task, network: Network) -> PreferenceModel:
        """Returns the form over the network's backbone."""
        return self.form(network.model, template_tokens(network.tokenizer, require_template(task)))

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the start's network, trained, with the form's heads."""
        if (start := context.spec(self.start)) is None:
            return None
        model = build(start.record.config)
        tokenizer = placeholder_tokenizer(start.record.config.vocab_size)
        heads = self.form(model, template_tokens(tokenizer, require_template(context.task))).init_heads()
        return trained_spec(start, self.start, self.lora, networks.head_shapes(heads))

    def exposure(self, context: Context) -> Exposure:
        """Returns the model itself, what it starts from, the pairs that it is fitted to and measured on."""
        pairs = context.exposure(self.pairs)
        measured = context.exposure(self.truth).fitted if self.truth and self.truth != self.pairs else frozenset()
        return context.derived_exposure(self.start) | pairs | Exposure(measured=measured)

    def check(self, context: Context) -> None:
        """Raises UserError when batch, adapters, template or ``truth`` do not fit the start and the pairs."""
        self.loop.check(context.name, context.mesh)
        check_adapters(context, self.start, self.lora)
        check_positions(context, self.start, "buckets", max(self.buckets) + 2 * self.response)
        check_template(context, self.start, self.form)
        if self.truth is None:
            return
        pairs = context.experiment.stages[self.pairs]
        if self.truth != self.pairs:
            if context.exposure(self.truth).fitted & context.exposure(self.pairs).fitted:
                raise UserError(f"{context.name}: truth={self.truth!r} holds the pairs that the model is fitted to; "
                                "name other pairs, or the same stage with held_out")  # fmt: skip
        elif not pairs.held_out:
            raise UserError(f"{context.name}: truth and pairs are both {self.pairs!r}, which holds nothing out; "
                            f"set {self.pairs}.held_out, or name another stage")  # fmt: skip

    def trained_parts(self, context: Context, start: Network, form: PreferenceModel) -> TrainedParts:
        """Returns what is trained of the start's network."""
        return split_trained(start, self.lora, form.init_heads(), context.key(self.seed))

    def learner(self, context: Context) -> tuple[Learner, TrainedParts]:
        """Returns the compiled training and the abstract parameters it is for."""
        start = context.abstract(self.start)
        form = self.preference_model(context.task, start)
        parts = self.trained_parts(context, start, form)
        loss = functools.partial(preference_loss, loss=self.loss, logit=form.fitted)
        learning = LearnerSpec(self.loop, self.adam, loss, parts.rules, parts.assemble)
        return learning.compile(parts.params, context.mesh), parts

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that learn, one a bucket, and the one that measures."""
        learner, parts = self.learner(context)
        frozen, size = SharedTree(Frozen(base=parts.base)), self.loop.batch
        learn = []
        for length in self.buckets:
            arguments = learner.state, frozen, abstract_pair_batch(size, length, self.response)
            learn.append(Program(f"learn {length}", learner.learn, arguments, size * 2 * (length + 2 * self.response)))
        return (*learn, *((self.measuring_program(context, learner, parts),) if self.truth else ()))

    def measuring_program(self, context: Context, learner: Learner, parts: TrainedParts) -> Program:
        """Returns the program that measures the trained model."""
        start = context.abstract(self.start)
        params = parts.assemble(learner.state.params, Frozen(base=parts.base))
        network = dataclasses.replace(start, base=params, adapters={}, heads={}, shared_base=None)
        sizes = JudgeSizes(self.loop.batch, max(self.buckets), self.response)
        return judging_program(context, "measure", self.preference_model(context.task, start).logit, network, sizes)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Fits the model, writes its network, and measures it."""
        start, task = context.abstract(self.start), context.task
        rows = read_stage_pairs(context, self.pairs, "train")
        if self.preference_model(task, start).ordered is not None:
            rows = shuffle_sides(rows, context.seed(self.seed))
        batches = pair_batches(rows, start.tokenizer, task, self.limits, self.loop.batch, context.seed(self.seed))
        if self.truth:
            self.measured_pairs(context, start.tokenizer)  # refuses them now, not after the training
        learner, parts = self.learner(context)
        learner = learner._replace(learn=function_of(programs, "learn", self.buckets))

        def parameters() -> tuple[Any, Frozen]:
            network = context.load(self.start)
            loaded = self.trained_parts(context, network, self.preference_model(task, network))
            context.release()
            return loaded.params, Frozen(base=loaded.base)

        trained = train(context.training_run(self.seed), learner, parameters, batches.plan, batches.make_batch)
        networks.save(context.folder, parts.network(start, trained.params))
        describe_form(context, self.form)
        figures: dict[str, Any] = {**batches.figures, **trained.figures}
        if self.truth:
            figures["held_out"] = self.measure(context, programs[-1], parts, trained)
        return figures

    def measure(self, context: Context, program: Program, parts: TrainedParts, trained: Trained) -> dict[str, float]:
        """Returns accuracy and calibration on the pairs of ``truth``."""
        tokenizer = context.abstract(self.start).tokenizer
        rows, counts = self.measured_pairs(context, tokenizer)
        judge = judges.model_judge(
            program.function, parts.assemble(trained.params, trained.frozen), tokenizer, context.task.format,
            batch=self.loop.batch, mesh=context.mesh, owner=context.name,
        )  # fmt: skip
        p = judge(*([row[name] for row in rows] for name in ("prompt", "first", "second")))
        return {**judges.calibration(p, np.array([row["p"] for row in rows])), **counts}

    def measured_pairs(self, context: Context, tokenizer: Tokenizer) -> tuple[list[PairRow], dict[str, int]]:
        """Returns the pairs of ``truth`` that fit, and how many do not: the longest would decide what is compiled.

        One that is too long would need a compilation of its own. Raises UserError when none is left.
        """
        assert self.truth is not None
        rows = read_stage_pairs(context, self.truth, "held_out" if self.truth == self.pairs else "train")
        _, fitting, counts = encode_pairs(rows, tokenizer, context.task, self.limits)
        return fitting, counts

    meanings: ClassVar[dict[str, str]] = {
        **PREFERENCE_MEANINGS,
        "pairs": "trained on",
        "too_long": "pairs longer than buckets and response allow, left out",
        "shortened": f"prompts {SHORTENED}",
        "held_out.accuracy": "share of held-out labels that the preference model agrees with",
        "held_out.calibration_error": "mean gap between its probabilities and the labels, ten bins",
        "held_out.cross_entropy": "nats a pair",
        "held_out.n": "held-out pairs",
        "held_out.too_long": "held-out pairs that were left out",
        "held_out.shortened": f"held-out prompts {SHORTENED}",
    }


@dataclasses.dataclass(frozen=True)
class ZeroShotPreference:
    """Makes a preference model of a policy or a reward model as it is: nothing is trained, no base is copied."""

    start: str = stage_input(Kind.POLICY, Kind.REWARD)
    form: PreferenceForm = choice
    makes: ClassVar[Kind] = Kind.PREFERENCE

    def preference_model(self, task: Task, network: Network) -> PreferenceModel:
        """Returns the form over the network's backbone."""
        return self.form(network.model, template_tokens(network.tokenizer, require_template(task)))

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the start's network; only its heads are this stage's own."""
        if (start := context.spec(self.start)) is None:
            return None
        return start._replace(record=dataclasses.replace(start.record, shared_base=SharedBase(self.start, None)))

    def exposure(self, context: Context) -> Exposure:
        """Returns a language model as one that is asked; a reward model as what it is. The form does not matter."""
        is_policy = context.experiment.stages[self.start].makes == Kind.POLICY
        return context.asked_exposure(self.start) if is_policy else context.exposure(self.start)

    def check(self, context: Context) -> None:
        """Raises UserError when the task's template is known not to suit."""
        check_template(context, self.start, self.form)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: nothing is computed."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the heads. Raises UserError when the form needs a head that the start does not have."""
        start = context.load(self.start)
        names = self.preference_model(context.task, start).init_heads().keys()
        if missing := names - start.heads.keys():
            raise UserError(f"{context.name}: {form_name(self.form)} needs the head {min(missing)!r}, which "
                            f"{self.start!r} does not have; use FitPreference")  # fmt: skip
        heads = {name: start.heads[name] for name in names}
        network = dataclasses.replace(
            start, base={}, adapters={}, heads=heads, shared_base=SharedBase(self.start, None)
        )
        networks.save(context.folder, network)
        describe_form(context, self.form)
        return {}

    meanings: ClassVar[dict[str, str]] = {}


def check_adapters(context: Context, source: str, spec: Lora | None) -> None:
    """Raises UserError when the model of the stage ``source`` is known to lack a projection that is to be adapted."""
    found = context.spec(source)
    if spec and found:
        model = build(found.record.config)
        jax.eval_shape(lambda key: init_adapters(spec, model.init(key), key), jax.random.key(0))


def check_template(context: Context, start: str, form: PreferenceForm) -> None:
    """Raises UserError when the task's template is known not to suit the form or the tokenizer of ``start``.

    (Pretrain checks its own tokenizer, as soon as that is trained.)
    """
    task, spec = context.task, context.spec(start)
    try:
        template = require_template(task)
    except UserError as error:
        raise UserError(f"{context.name}: {error}") from None
    if form is choice and not template.other:
        raise UserError(f"{context.name}: form=choice needs both answers; give task {task.name!r} a template.other")
    if spec and spec.tokenizer:
        template_tokens(spec.tokenizer, template)


def require_template(task: Task) -> Template:
    """Returns the task's template. Raises UserError when it has none."""
    if task.template is None:
        raise UserError(f"task {task.name!r} has no template to show two replies in; give it one")
    return task.template


def form_name(form: PreferenceForm) -> str:
    """Returns the name of a form, a function."""
    return getattr(form, "__name__", str(form))


def describe_form(context: Context, form: PreferenceForm) -> None:
    """Writes preference.json: how an exported preference model is asked."""
    task = context.task
    description = {
        "form": form_name(form),
        "template": require_template(task)._asdict(),
        "format": task.format._asdict(),
    }
    storage.write_json(context.folder / "preference.json", description)
