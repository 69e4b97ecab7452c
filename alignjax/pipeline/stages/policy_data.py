"""Where a policy's batches come from: responses that samplers draw, or pairs on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from alignjax.distributed import sharding
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, no_effect, stage_input
from alignjax.models.tokenizer import blank_tokens, encode_prompt, pad
from alignjax.pipeline.experiment import Context, Exposure, Program, abstract_array, abstract_tokens, function_of
from alignjax.pipeline.networks import Network
from alignjax.pipeline.stages.pair_batches import PairLimits, abstract_pair_batch, pair_batches, read_stage_pairs
from alignjax.pipeline.stages.writing import shorten_prompts, stop_tokens, unseen_stops, writing_model
from alignjax.pipeline.trained_parts import TrainedParts
from alignjax.preferences.judges import judged_length
from alignjax.sampling.samplers import Sampler
from alignjax.tasks.task import EOS, Task
from alignjax.training import data
from alignjax.training.collect import Collector, Frozen, PreferenceView, complete_batch, roles_of
from alignjax.training.learn import COLLECT, step_key
from alignjax.training.loop import Collect, Loop
from alignjax.training.shared_tree import SharedTree
from alignjax.training.text_bridge import TextBridge
from alignjax.types import Objective, PolicyFunctions, PreferenceBatch, Role, Sample, Tokens, TrainState


class PolicySetup(NamedTuple):
    """What a TrainPolicy stage and its data share; the networks are abstract."""

    objective: Objective
    loop: Loop
    buckets: tuple[int, ...]
    max_new_tokens: int
    seed: int
    start: Network
    reference: Network
    parts: TrainedParts
    policy: PolicyFunctions
    state: TrainState


class Batches(NamedTuple):
    """What the loop draws from."""

    plan: Callable[[int], data.BatchPlan]
    make_batch: Callable[[data.BatchPlan], Any]
    collect: Collect
    figures: dict[str, Any]


class PolicyData(Protocol):
    """A frozen dataclass: where batches come from."""

    @property
    def examples(self) -> int | None:
        """The most examples that there can be. None: this is not known before the stage runs."""
        ...

    def check(self, context: Context, objective: Objective) -> None:
        """Raises UserError when the objective cannot learn from this data."""
        ...

    def exposure(self, context: Context) -> Exposure:
        """Returns what a policy that learns from it depends on."""
        ...

    def preference_network(self, context: Context, load: Callable[[str], Network]) -> Network | None:
        """Returns the preference model's network by ``load``, where there is one."""
        ...

    def programs(self, context: Context, setup: PolicySetup) -> tuple[Program, ...]:
        """Returns the programs that collect; those that end in a PreferenceBatch come last, one a bucket."""
        ...

    def batches(self, context: Context, setup: PolicySetup, programs: tuple[Program, ...]) -> Batches:
        """Returns the batches, over those programs."""
        ...


@dataclasses.dataclass(frozen=True)
class OnlineData:
    """Draws responses with samplers and compares them with a preference model."""

    samplers: tuple[Sampler, ...]  # (policy, mixture(beta)) is Nash-MD; response 0 comes from the first
    prompts: int
    preference: str = stage_input(Kind.PREFERENCE)
    unfinished_loses: bool = True  # a response without a stop sequence loses to one with it
    response: int | None = None  # the most tokens for a preference model of another tokenizer; None: 2 max_new_tokens
    gather: bool = no_effect(True)  # gather the weights over data and fsdp before writing; False saves memory

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        if self.response is not None:
            check_range(self, 1, math.inf, "response")

    @property
    def examples(self) -> int:
        """The number of prompts that are asked for."""
        return self.prompts

    def check(self, context: Context, objective: Objective) -> None:
        """Raises UserError when the objective reads responses that no sampler writes, or the task has no prompts."""
        wanted = 1 + max((*objective.scored, *(k for pair in objective.compared for k in pair)), default=0)
        is_group = len(objective.on_policy) == wanted  # all responses are the policy's, and their number is stated
        if len(self.samplers) < wanted or (len(self.samplers) > wanted and is_group):
            more = "more" if len(self.samplers) < wanted else "fewer"
            raise UserError(f"{context.name}.data.samplers writes {len(self.samplers)} responses and the objective "
                            f"reads {wanted}; name {more} samplers")  # fmt: skip
        for role, numbers in ((Role.POLICY, objective.on_policy), (Role.REFERENCE, objective.extras.of_reference)):
            if others := [k for k in numbers if self.samplers[k].weights() != {role: 1}]:
                who = role.name.lower()
                raise UserError(f"{context.name}.data.samplers[{others[0]}] is not the {who}, and the objective is "
                                f"right for the {who}'s own responses alone; put aj.{who} there")  # fmt: skip
        context.task.source.prompts("train", 1, context.seed())

    def exposure(self, context: Context) -> Exposure:
        """Returns the preference model as what the policy is trained against."""
        model = context.exposure(self.preference)
        against = model.identity | model.trained_against
        return Exposure(trained_against=against, fitted=model.fitted, measured=model.measured)

    def preference_network(self, context: Context, load: Callable[[str], Network]) -> Network:
        """Returns the preference model's network."""
        return load(self.preference)

    def collector(self, context: Context, setup: PolicySetup) -> Collector:
        """Returns how a batch is collected. Raises UserError when the objective reads rewards and there are none."""
        task, tokenizer = context.task, setup.start.tokenizer
        network = context.abstract(self.preference)
        form = context.experiment.stages[self.preference].preference_model(task, network)
        if setup.objective.rewarded and form.reward is None:
            raise UserError(f"{context.name}: the objective reads rewards and {self.preference!r} is no reward "
                            "model; fit it with form=bradley_terry")  # fmt: skip
        blank = blank_tokens(tokenizer, setup.start.model.config.vocab_size)
        return Collector(
            writing_model(setup.start.model, self.gather), self.samplers, setup.max_new_tokens,
            stop_tokens(task, tokenizer), unseen_stops(task, tokenizer), blank, setup.objective, setup.policy, form,
            self.unfinished_loses,
        )  # fmt: skip

    def programs(self, context: Context, setup: PolicySetup) -> tuple[Program, ...]:
        """Returns the programs that collect, one a bucket. With two tokenizers one program draws and one compares."""
        network = context.abstract(self.preference)
        frozen = SharedTree(Frozen(setup.parts.base, setup.reference.params, network.all_params))
        rows, size = sharding.row_sharding(context.mesh), setup.loop.batch
        functions = collect_functions(self.collector(context, setup), setup.parts)
        collect, draw, compare = (
            jax.jit(function, in_shardings=(None, None, *[rows] * batches), out_shardings=rows, keep_unused=True)
            for function, batches in zip(functions, (1, 1, 3), strict=True)
        )

        def program(name: str, function: Any, length: int) -> Program:
            tokens = size * (length + len(self.samplers) * setup.max_new_tokens)
            return Program(f"{name} {length}", function, (setup.state, frozen, abstract_tokens(size, length)), tokens)

        if shares_tokens(context.task, setup.start, network):
            return tuple(program("collect", collect, length) for length in setup.buckets)
        drawing = tuple(program("draw", draw, length) for length in setup.buckets)
        comparing = []
        for length, drawn in zip(setup.buckets, drawing, strict=True):
            samples, view = jax.eval_shape(draw, *drawn.arguments), self.abstract_view(size, length, setup)
            comparing.append(Program(f"compare {length}", compare, (*drawn.arguments, samples, view), drawn.tokens))
        return (*drawing, *comparing)

    def abstract_view(self, size: int, length: int, setup: PolicySetup) -> PreferenceView:
        """Returns what a preference model of another tokenizer reads, as shapes."""
        response = abstract_tokens(size, self.response or 2 * setup.max_new_tokens)
        accepted = abstract_array("bool", size)
        count = len(self.samplers)
        return PreferenceView(abstract_tokens(size, judged_length(length)), (response,) * count, (accepted,) * count)

    def batches(self, context: Context, setup: PolicySetup, programs: tuple[Program, ...]) -> Batches:
        """Returns batches of prompts, and how responses are drawn and compared."""
        drawn = context.task.source.prompts("train", self.prompts, context.seed(setup.seed))
        prompts, counts = shorten_prompts(context.task, setup.start.tokenizer, drawn, max(setup.buckets))
        ids = [encode_prompt(setup.start.tokenizer, text) for text in prompts]
        kept = [i for i, row in enumerate(ids) if len(row) <= max(setup.buckets)]
        if not kept:
            raise UserError(f"{context.name}: all {len(ids)} prompts are longer than {max(setup.buckets)} tokens; "
                            f"add a larger one to {context.name}.buckets")  # fmt: skip
        plan = data.plan_batches([len(ids[i]) for i in kept], setup.buckets, setup.loop.batch, context.seed(setup.seed))

        def make_batch(chosen: data.BatchPlan) -> Tokens:
            return pad([ids[kept[i]] for i in chosen.indices], chosen.length)

        figures = {"prompts": len(kept), "too_long": len(ids) - len(kept), **counts}
        return Batches(plan, make_batch, self.collect(context, setup, programs, [prompts[i] for i in kept]), figures)

    def collect(
        self, context: Context, setup: PolicySetup, programs: tuple[Program, ...], prompts: list[str]
    ) -> Collect:
        """Returns what the loop calls: one compiled program, or two with text between them."""
        network = context.abstract(self.preference)
        if shares_tokens(context.task, setup.start, network):
            return function_of(programs, "collect", setup.buckets)
        draw, compare = (function_of(programs, name, setup.buckets) for name in ("draw", "compare"))
        policy, preference = setup.start.tokenizer, network.tokenizer
        bridge = TextBridge(
            context.task, policy, preference, stop_tokens(context.task, policy),
            self.response or 2 * setup.max_new_tokens,
            {tuple(policy.encode(prompt)): preference.encode(prompt) for prompt in prompts}, context.mesh,
        )  # fmt: skip

        def through_text(state: TrainState, frozen: SharedTree, prompt: Tokens) -> PreferenceBatch:
            samples = draw(state, frozen, prompt)
            return compare(state, frozen, prompt, samples, bridge.view(prompt, samples))

        return through_text


def collect_functions(collector: Collector, parts: TrainedParts) -> tuple[Callable[..., Any], ...]:
    """Returns collect, draw and compare as functions of (state, frozen trees, prompt, ...)."""

    def collect(state: TrainState, frozen: SharedTree, prompt: Tokens) -> PreferenceBatch:
        roles = roles_of(state, frozen.tree(), parts.assemble)
        return collector.collect(roles, prompt, step_key(state, COLLECT))

    def draw(state: TrainState, frozen: SharedTree, prompt: Tokens) -> tuple[Sample, ...]:
        return collector.draw(roles_of(state, frozen.tree(), parts.assemble), prompt, step_key(state, COLLECT))

    def compare(
        state: TrainState, frozen: SharedTree, prompt: Tokens, samples: tuple[Sample, ...], view: PreferenceView
    ) -> PreferenceBatch:
        return collector.compare(roles_of(state, frozen.tree(), parts.assemble), prompt, samples, view)

    return collect, draw, compare


def shares_tokens(task: Task, policy: Network, preference: Network) -> bool:
    """Returns whether the preference model can read the policy's tokens as they are.

    Their tokenizers are equal, and no end token stands where the task's format has an end marker of its own.
    """
    return policy.token_digest == preference.token_digest and not (EOS in task.format.stop and task.format.end)


@dataclasses.dataclass(frozen=True)
class OfflineData:
    """Reads pairs from disk: a Label or LoadPairs stage's."""

    pairs: str = stage_input(Kind.PAIRS)
    examples: ClassVar[None] = None  # how many pairs there are is not known before the stage runs

    def check(self, context: Context, objective: Objective) -> None:
        """Raises UserError when the objective reads more than a pair, or rewards."""
        if objective.on_policy:
            raise UserError(f"{context.name}: the objective learns from responses that the policy has just written; "
                            "pairs on disk are not such; use OnlineData, or DirectAlignment")  # fmt: skip
        wanted = {*objective.scored, *(k for pair in objective.compared for k in pair)}
        if max(wanted, default=0) > 1 or objective.rewarded:
            raise UserError(f"{context.name}: the objective reads more than two responses, or rewards, which pairs on "
                            "disk do not have; use OnlineData")  # fmt: skip

    def exposure(self, context: Context) -> Exposure:
        """Returns the pairs as what the policy is fitted to."""
        return context.exposure(self.pairs)

    def preference_network(self, context: Context, load: Callable[[str], Network]) -> None:
        """Returns None: the pairs have labels."""

    def programs(self, context: Context, setup: PolicySetup) -> tuple[Program, ...]:
        """Returns the programs in which the reference scores the pairs, one a bucket."""
        frozen = SharedTree(Frozen(setup.parts.base, setup.reference.params))
        rows = sharding.row_sharding(context.mesh)

        def collect(state: TrainState, frozen: SharedTree, batch: PreferenceBatch) -> PreferenceBatch:
            roles = roles_of(state, frozen.tree(), setup.parts.assemble)
            return complete_batch(setup.objective, setup.policy, roles, batch)

        jitted, size = (
            jax.jit(collect, in_shardings=(None, None, rows), out_shardings=rows, keep_unused=True),
            setup.loop.batch,
        )
        programs = []
        for length in setup.buckets:
            arguments = setup.state, frozen, abstract_pair_batch(size, length, setup.max_new_tokens)
            tokens = 2 * size * (length + setup.max_new_tokens)
            programs.append(Program(f"collect {length}", jitted, arguments, tokens))
        return tuple(programs)

    def batches(self, context: Context, setup: PolicySetup, programs: tuple[Program, ...]) -> Batches:
        """Returns batches of the pairs that fit."""
        limits, tokenizer = PairLimits(setup.buckets, setup.max_new_tokens), setup.start.tokenizer
        rows, seed = read_stage_pairs(context, self.pairs, "train"), context.seed(setup.seed)
        pairs = pair_batches(rows, tokenizer, context.task, limits, setup.loop.batch, seed)
        return Batches(pairs.plan, pairs.make_batch, function_of(programs, "collect", setup.buckets), pairs.figures)


def reads_average(policy_data: Any) -> bool:
    """Returns whether a sampler reads the moving average."""
    return isinstance(policy_data, OnlineData) and any(Role.AVERAGE in s.weights() for s in policy_data.samplers)
