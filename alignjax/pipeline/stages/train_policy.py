"""A policy that learns from preferences, drawn or stored, by any objective."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.models.build import build
from alignjax.models.log_probs import policy_functions
from alignjax.models.lora import Lora
from alignjax.models.model import tempered
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, Program, function_of
from alignjax.pipeline.networks import Network
from alignjax.pipeline.stages.fit_preference import check_adapters
from alignjax.pipeline.stages.policy_data import OfflineData, PolicyData, PolicySetup, reads_average
from alignjax.pipeline.stages.writing import SHORTENED, check_positions, check_stop
from alignjax.pipeline.trained_parts import TrainedParts, split_trained, trained_spec, with_critic
from alignjax.training.collect import Frozen
from alignjax.training.loop import Learner, LearnerSpec, Loop, train
from alignjax.training.optimizer import Adam
from alignjax.types import Completion, Objective, Params, PolicyFunctions, PreferenceBatch, Prompt, Response, Roles

AVERAGE = "average"
"""What ``KeptPolicy.at`` calls the moving average."""


@dataclasses.dataclass(frozen=True)
class Critic:
    """A critic with a network of its own, which begins as another stage's. It is trained whole, and not saved."""

    start: str = stage_input(Kind.POLICY, Kind.PREFERENCE, Kind.REWARD)
    head: str | None = None  # the start's head that the value head begins as, such as "reward"; None: zero


@dataclasses.dataclass(frozen=True)
class TrainPolicy:
    """Trains a policy with an objective, on the batches of ``data``.

    At another ``temperature`` than 1 the policy is softmax(logits / temperature), in drawing and in all log-probs, the
    reference's too; its network remembers it, so that it is judged as what it was trained as.

    Beside its network it keeps the policy's parameters after the steps ``keep_at`` and, with ``average_decay``, their
    moving average at the end: ``KeptPolicy`` makes each a policy.

    With ``extragradient`` (``learn.at_anchor``) warm-up and decay of the learning rate count pairs of batches. On the
    second batch of a pair metrics are of the half point's responses.
    """

    objective: Objective  # for example PreferenceGradient(partial(losses.nash_md, tau=0.02))
    data: PolicyData  # OnlineData(...) or OfflineData(...)
    adam: Adam
    loop: Loop
    buckets: tuple[int, ...]  # prompt lengths in tokens
    max_new_tokens: int  # the most tokens of a response
    start: str = stage_input(Kind.POLICY)
    reference: str = stage_input(Kind.POLICY)
    critic: Critic | None = None  # None: the critic of an objective that has one is a head on the policy
    lora: Lora | None = None  # train adapters over the start's frozen base
    temperature: float = 1.0
    average_decay: float | None = None  # of the moving average that ``samplers.moving_average`` reads
    keep_at: tuple[int, ...] = ()  # steps after which the policy's parameters are kept
    extragradient: bool = False  # two batches make one step, whose half point writes the second (EGPO, 2503.08942)
    seed: int = 0
    makes: ClassVar[Kind] = Kind.POLICY

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "buckets", "max_new_tokens")
        check_range(self, 1e-3, 1e3, "temperature")
        if self.average_decay is not None:
            check_range(self, 0, 1, "average_decay")
        if self.keep_at != ():
            check_range(self, 1, self.loop.steps, "keep_at")
            if len(set(self.keep_at)) < len(self.keep_at):
                raise UserError(f"TrainPolicy.keep_at={self.keep_at} names a step twice; name each once")

    @property
    def meanings(self) -> dict[str, str]:
        """What metrics and figures show."""
        own = {"prompts": "that fit a bucket", "pairs": "trained on", "too_long": "longer than every bucket, left out"}
        own |= {"shortened": f"prompts {SHORTENED}"}
        return {**self.objective.meanings, **own}

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the start's network, trained."""
        start = context.spec(self.start)
        if start is None:
            return None
        own = {} if self.critic else self.objective.extras.heads(start.record.config.width)
        heads = networks.head_shapes(own)
        spec = trained_spec(start, self.start, self.lora, heads)
        return spec._replace(record=dataclasses.replace(spec.record, temperature=self.temperature))

    def exposure(self, context: Context) -> Exposure:
        """Returns what the data, the start, the reference and the critic depend on.

        A critic that was a preference model is one that the policy is trained against.
        """
        found = context.derived_exposure(self.start, self.reference) | self.data.exposure(context)
        if self.critic is None:
            return found
        critic = context.exposure(self.critic.start)
        is_policy = context.experiment.stages[self.critic.start].makes == Kind.POLICY
        against = critic.trained_against | (frozenset() if is_policy else critic.identity)
        return found | Exposure(trained_against=against, fitted=critic.fitted, measured=critic.measured)

    def check(self, context: Context) -> None:
        """Raises UserError when the batch, the data, the adapters or the objective do not fit each other."""
        self.loop.check(context.name, context.mesh, self.data.examples)
        self.data.check(context, self.objective)
        for source in (self.start, self.reference):
            check_positions(context, source, "buckets", max(self.buckets) + self.max_new_tokens)
        check_adapters(context, self.start, self.lora)
        check_stop(context, self.start)
        check_objective(context.name, self.objective)
        if self.critic and self.objective.extras.heads(1).keys() != {"value"}:
            raise UserError(f"{context.name}.critic is set and the objective has no critic, which is a head called "
                            "'value'; leave it out, or use PPO")  # fmt: skip
        if self.critic:
            check_positions(context, self.critic.start, "buckets", max(self.buckets) + self.max_new_tokens)
            known = context.spec(self.critic.start)
            if known and self.critic.head is not None and self.critic.head not in known.record.heads:
                raise UserError(f"{context.name}.critic.head={self.critic.head!r} is no head of {self.critic.start!r}, "
                                f"which has {', '.join(known.record.heads) or 'none'}; name one, or None")  # fmt: skip
        if self.loop.accumulate > 1 and self.objective.extras.whole_minibatch:
            raise UserError(f"{context.name}.loop.accumulate={self.loop.accumulate} would change the objective, which "
                            "whitens over whole minibatches; set it to 1")  # fmt: skip
        if self.extragradient:
            self.check_extragradient(context.name)
        if reads_average(self.data) and self.average_decay is None:
            raise UserError(f"{context.name}: the sampler moving_average needs average_decay; set it, e.g. 0.999")

    def check_extragradient(self, name: str) -> None:
        """Raises UserError where the half point, which writes every second batch, makes no sense or would do harm."""
        if set(self.objective.on_policy) & set(self.objective.scored) or isinstance(self.data, OfflineData):
            raise UserError(f"{name}.extragradient learns, at another point, from what the half point writes; use it "
                            "with OnlineData and with OpponentAlignment")  # fmt: skip
        if self.average_decay is not None:
            raise UserError(f"{name}.average_decay={self.average_decay} would average half points too; "
                            f"leave it out, or {name}.extragradient")  # fmt: skip
        ends = [("loop.steps", self.loop.steps), ("loop.best.every", self.loop.best.every if self.loop.best else 0)]
        for field, steps in (*ends, *(("keep_at", step) for step in self.keep_at)):
            if steps % 2:
                raise UserError(f"{name}.{field}={steps} ends at a half point, for an extragradient step takes "
                                "two batches; make it even")  # fmt: skip

    def trained_parts(self, context: Context, start: Network, critic: Network | None) -> TrainedParts:
        """Returns what is trained: the start's network, the objective's heads, and a critic of its own."""
        heads = self.objective.extras.heads((critic or start).model.config.width)
        start = start if critic is None else dataclasses.replace(start, heads={})  # its critic was a head on itself
        parts = split_trained(start, self.lora, heads, context.key(self.seed))
        return with_critic(parts, critic, self.critic.head) if critic and self.critic else parts

    def critic_network(self, context: Context, load: Callable[[str], Network], start: Network) -> Network | None:
        """Returns the network that the critic begins as, by ``load``. Raises UserError when its tokens are others."""
        critic = load(self.critic.start) if self.critic else None
        if critic and critic.token_digest != start.token_digest:
            raise UserError(f"{context.name}: {self.start!r} and the critic {critic.stage!r} have different "
                            "tokenizers; use one start")  # fmt: skip
        return critic

    def setup(self, context: Context) -> tuple[PolicySetup, Learner]:
        """Returns what the programs are made from, and the compiled training."""
        start, reference = context.abstract(self.start), context.abstract(self.reference)
        if reference.model.config != start.model.config or reference.token_digest != start.token_digest:
            raise UserError(
                f"{context.name}: {self.start!r} and {self.reference!r} are different models; use one start"
            )
        critic = self.critic_network(context, context.abstract, start)
        parts = self.trained_parts(context, start, critic)
        model = tempered(build(start.model.config), self.temperature)
        start = dataclasses.replace(start, model=model, temperature=self.temperature)
        policy = policy_functions(start.model, critic.model if critic else None)
        loss, extras = functools.partial(self.objective, policy=policy), self.objective.extras
        learning = LearnerSpec(
            self.loop, self.adam, loss, parts.rules, parts.assemble, self.average_decay, extras, self.extragradient
        )
        learner = learning.compile(parts.params, context.mesh)
        setup = PolicySetup(
            self.objective, self.loop, self.buckets, self.max_new_tokens, self.seed, start, reference, parts, policy,
            learner.state,
        )  # fmt: skip
        return setup, learner

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that collect and those that learn, one a bucket each."""
        self.loop.check(context.name, context.mesh)
        setup, learner = self.setup(context)
        collect = self.data.programs(context, setup)
        learned = max(len(self.objective.scored), len(self.objective.on_policy))  # responses
        learn = []
        for length, program in zip(self.buckets, collect[-len(self.buckets) :], strict=True):
            batch = jax.eval_shape(program.function, *program.arguments)
            arguments = (program.arguments[0], program.arguments[1], batch)
            tokens = self.loop.batch * learned * (length + self.max_new_tokens)
            learn.append(Program(f"learn {length}", learner.learn, arguments, tokens * self.loop.epochs))
        return (*collect, *learn)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Trains the policy and writes its network."""
        setup, learner = self.setup(context)
        learner = learner._replace(learn=function_of(programs, "learn", self.buckets))
        batches = self.data.batches(context, setup, programs)

        def parameters() -> tuple[Any, Frozen]:
            start, reference = context.load(self.start), context.load(self.reference)
            preference = self.data.preference_network(context, context.load)
            parts = self.trained_parts(context, start, self.critic_network(context, context.load, start))
            context.release()
            judged = preference.all_params if preference else None
            return parts.params, Frozen(parts.base, reference.params, judged)

        def keep(steps: int, params: Params) -> None:
            if steps in self.keep_at:
                networks.save_kept(context.folder, steps, setup.parts.network(setup.start, params))

        trained = train(
            context.training_run(self.seed), learner, parameters, batches.plan, batches.make_batch, batches.collect,
            keep,
        )  # fmt: skip
        if self.average_decay is not None:
            networks.save_kept(context.folder, AVERAGE, setup.parts.network(setup.start, trained.average))
        networks.save(context.folder, setup.parts.network(setup.start, trained.params))
        return {**batches.figures, **trained.figures}


def check_objective(name: str, objective: Objective) -> None:
    """Raises UserError when the objective refuses its own settings, by tracing it over one token.

    Other errors are ignored here: they come from the tiny input, and will be raised again when the objective runs.
    """
    tokens = Prompt(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))

    def score(params: Any, prompt: Prompt, completion: Completion) -> jax.Array:
        return jnp.zeros(completion.tokens.shape)

    def states(params: Any, prompt: Prompt, completion: Completion) -> jax.Array:
        return jnp.zeros((*completion.tokens.shape, 1))

    def call() -> Any:
        zeros = jnp.zeros((1, 1))
        response = Response(tokens, zeros, zeros, jnp.ones(1, bool), jnp.ones(1, bool))
        count = 1 + max((*objective.scored, *(k for pair in objective.compared for k in pair), 1))
        matrix, every = jnp.full((1, count, count), 0.5), tuple((i, j) for j in range(count) for i in range(j))
        batch = PreferenceBatch(tokens, (response,) * count, matrix, jnp.zeros((1, count)), every)
        policy, extras = PolicyFunctions(score, states, 1), objective.extras
        params = extras.heads(1)
        batch = extras.prepare(Roles(params, {}, {}, {}, extras.controls()), batch, policy)
        return objective(params, batch, jax.random.key(0), policy=policy)

    try:
        jax.eval_shape(call)
    except UserError as error:
        raise UserError(f"{name}.objective: {error}") from None
    except Exception:  # of any kind: the objective may be a user's function, which was given almost nothing
        return
